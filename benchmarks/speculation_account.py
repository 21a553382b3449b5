"""What drafts are worth by the account: the same loop and drafts as the engine's, over texts that are known.

    python benchmarks/verification_rows.py > rows.jsonl
    python benchmarks/speculation_account.py --packages wheels --texts texts.json --rows rows.jsonl --prompts 24

A measured run of a minute scatters by more than the few percent that a policy may lose. Here SmolLM2 writes many texts
once, in one batch (they stay in the file), and every policy is served on them, one request at a time, by the scheduler
and the proposers that the engine has. For the worst case the free texts are served once more with their tokens in
random order, so that lookups find much and almost all of it misleads. Each step takes the time that
`verification_rows.py` measured for its rows, and what the policy and drafting took on the host in `speculation.py`
(`--host-ms`). Prints Markdown: the gain in tokens per time over no drafts, for all texts of a kind, and the range over
quarters of them; tokens a step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from speculation import AGAIN, BY_CHANCE, CONFIG, GREEDY, ONE_CLIENT, PLAIN, POLICIES, SAMPLED, workload
from speculation_prompts import KINDS, downloaded, prompts

from xllm_lab.drafting import Asked, Proposer, drafting_of
from xllm_lab.engine.drafts.ngram import NgramProposer
from xllm_lab.engine.drafts.suffix import SuffixProposer
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.draft import DraftPolicy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.scheduler import Sampled, Scheduler
from xllm_lab.serving import Completion, Idle, WorkloadFeed, serve
from xllm_lab.step import Step
from xllm_lab.step_time import TERMS, StepTime
from xllm_lab.workload import Prompt, Request, RequestId, Workload

SHUFFLED = "writing, shuffled"
Text = tuple[list[int], list[int]]  # prompt, output
BATCH = InstanceConfig(
    max_tokens_per_batch=1024, max_seqs_per_batch=32, block_size=16, num_kv_blocks=2048, max_model_len=2048
)


def written(packages: Path, num_prompts: int, output_tokens: int) -> dict[str, list[Text]]:
    """By kind of text; greedy in bfloat16, and one kind sampled."""
    engine = Engine(EngineOptions(device="cpu", dtype="bfloat16", timer="cpu"))
    archives, tokenizer, found = downloaded(packages), engine.model.load_tokenizer(), {}
    for kind in [*KINDS, SAMPLED]:
        asked = prompts(archives, "writing" if kind == SAMPLED else kind, num_prompts)
        one_by_one = workload(engine, tokenizer, asked, BY_CHANCE if kind == SAMPLED else GREEDY, output_tokens)
        together, records = Workload(requests=one_by_one.requests), Records()
        engine.serve(together, BATCH, Policies(DecodeFirst()), records)
        prompt_ids = [list(r.prompt.token_ids or ()) for r in one_by_one.requests]
        outputs = [r.output_token_ids.tolist() for r in records.sort().requests]
        found[kind] = list(zip(prompt_ids, outputs, strict=True))
    return found


class Lookups:
    """Both methods that need no model, as one proposer."""

    methods = ("ngram", "suffix")

    def __init__(self) -> None:
        self._by_method: dict[str, Proposer] = {"ngram": NgramProposer(), "suffix": SuffixProposer()}

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        return [self._by_method[one.method].propose([one])[0] for one in asked]

    def forget(self, request: RequestId) -> None:
        for proposer in self._by_method.values():
            proposer.forget(request)


def served(texts: Sequence[Text], policy: DraftPolicy, rows_us: Sequence[float]) -> list[list[int]]:
    """For each text, the rows of each step that decodes it.

    Args:
        rows_us: of a step of 1, 2, ... rows, as policies are told that ask for it.
    """
    made = []
    for number, (ids, out) in enumerate(texts):
        prompt = Prompt(num_tokens=len(ids), token_ids=tuple(ids))
        made.append(Request(id=RequestId(number), arrival_us=0, prompt=prompt, output_tokens=len(out)))
    work = Workload(requests=tuple(made), closed_loop=ONE_CLIENT)
    row_us = (rows_us[-1] - rows_us[0]) / (len(rows_us) - 1)
    weights = dict.fromkeys(TERMS, 0.0) | {"eager_us": rows_us[0] - row_us, "token_us": row_us}
    step_time = StepTime(tuple(weights[term] for term in TERMS))
    drafting = drafting_of(policy, Lookups(), step_time=step_time)
    scheduler = Scheduler(CONFIG, DecodeFirst(), Records(), step_time=step_time, drafting=drafting)
    conversation = serve(scheduler, WorkloadFeed(work), lambda r: np.array(texts[r.id][0], dtype=np.int32))
    drawn, rows, now_us = [0] * len(texts), [list[int]() for _ in texts], 0
    command = next(conversation)
    try:
        while True:
            assert not isinstance(command, Idle), "one client always has a request"
            (chunk,) = command.chunks
            if drawn[chunk.id]:
                rows[chunk.id].append(chunk.num_tokens)
            now_us += 1000
            command = conversation.send(Completion((now_us,), sampled(command, texts, drawn)))
    except StopIteration:
        assert drawn == [len(out) for _, out in texts], "a text was not served to its end"
        return rows


def sampled(step: Step, texts: Sequence[Text], drawn: list[int]) -> dict[RequestId, Sampled]:
    """What the model that wrote the texts makes of a step; counts it in `drawn`."""
    found: dict[RequestId, Sampled] = {}
    drafts = {draft.id: draft.token_ids for draft in step.drafts}
    for chunk in step.chunks:
        if not chunk.samples:
            continue
        left = texts[chunk.id][1][drawn[chunk.id] :]
        kept = 0
        while kept < len(drafts.get(chunk.id, ())) and drafts[chunk.id][kept] == left[kept]:
            kept += 1
        found[chunk.id] = Sampled(left[kept], False, left[:kept])
        drawn[chunk.id] += kept + 1
    return found


def rows_us(lines: Sequence[Mapping[str, Any]], dtype: str, where: str, most: int = 16) -> list[float]:
    """Of 1 to `most` rows, straight between those measured."""
    here = [line for line in lines if line["dtype"] == dtype and line["in"] == where]
    one_us = next(line["ms"] for line in here if line["rows"] == 1) * 1e3
    rows, ratios = [line["rows"] for line in here], [line["ratio"] for line in here]
    return [one_us * float(np.interp(n, rows, ratios)) for n in range(1, most + 1)]


def main() -> None:
    drafting = [name for name in POLICIES if name not in (PLAIN, AGAIN)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--texts", type=Path, required=True, help="file to keep them in, made if it is not there")
    parser.add_argument("--rows", type=Path, required=True, help="output of verification_rows.py")
    parser.add_argument("--prompts", type=int, default=24, help="of each kind")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--host-ms", type=float, default=0.65, help="of a draft policy and drafting, each step")
    parser.add_argument("--policies", nargs="+", choices=drafting, default=drafting)
    args = parser.parse_args()
    if not args.texts.exists():
        args.texts.write_text(json.dumps(written(args.packages, args.prompts, args.tokens)), encoding="utf-8")
    texts: dict[str, list[Text]] = json.loads(args.texts.read_text(encoding="utf-8"))
    texts[SHUFFLED] = [(ids, random.Random(n).sample(out, len(out))) for n, (ids, out) in enumerate(texts["writing"])]
    lines = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    modes = {f"{d}, {w}": rows_us(lines, d, w) for d in ("float32", "bfloat16") for w in ("eager", "graph")}
    print("| text | drafts | tokens/step | " + " | ".join(modes) + " |\n|---|---|---|" + "---|" * len(modes))
    for kind, some in texts.items():
        tokens = [len(out) - 1 for _, out in some]
        for name in args.policies:
            rows: list[list[int]] = []
            cells = ""
            for times_us in modes.values():
                if not rows or getattr(POLICIES[name], "needs_step_time", False):
                    rows = served(some, POLICIES[name], times_us)
                spent_us = [sum(times_us[n - 1] + args.host_ms * 1e3 for n in steps) for steps in rows]
                gains = [sum(tokens[n::4]) * times_us[0] / sum(spent_us[n::4]) for n in range(4)]
                whole = sum(tokens) * times_us[0] / sum(spent_us)
                cells += f" **{whole:.2f}** ({min(gains):.2f} to {max(gains):.2f}) |"
            print(f"| {kind} | {name} | {sum(tokens) / sum(map(len, rows)):.2f} |{cells}", flush=True)


if __name__ == "__main__":
    main()
