"""What drafts are worth to one stream on real text: SmolLM2, requests one at a time, in processor time.

    python benchmarks/speculation.py --packages wheels --dtype float32 --rounds 3 --prompts 3

Each round serves the next few prompts of each kind of text (`speculation_prompts.py`, downloaded into `--packages`) by
every draft policy in turns, and without drafts first and last, so that the machine's own drift shows beside the gains.
Texts end where the model ends them, or after `--tokens`. Greedy, and for one kind sampled. One JSON object a line for
each run; at the end Markdown: tokens per CPU second from the first token on, the gain over no drafts (median and range
over the rounds), that of whole requests, and tokens per step with drafts.

Fails if a policy's tokens are not those of plain decoding; with `--count-differences` it counts them instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from speculation_prompts import KINDS, downloaded, prompts

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.draft import DraftPolicy
from xllm_lab.policies.draft.acceptance_driven import AcceptanceDriven
from xllm_lab.policies.draft.adaptive_pruning import AdaptivePruning
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import Off
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records, RequestRecord
from xllm_lab.step_time import StepTime
from xllm_lab.workload import ClosedLoop, Prompt, Request, RequestId, Sampling, Workload

CONFIG = InstanceConfig(
    max_tokens_per_batch=1024, max_seqs_per_batch=4, block_size=16, num_kv_blocks=256, max_model_len=2048
)
ONE_CLIENT = ClosedLoop(num_clients=1)
SAMPLED = "writing, sampled"
GREEDY, BY_CHANCE = Sampling(ignore_eos=False), Sampling(ignore_eos=False, temperature=0.8)
PLAIN, AGAIN = "off", "off again"
POLICIES: Mapping[str, DraftPolicy] = {
    PLAIN: Off(),
    **{f"{m} {k}": Fixed(method=m, num_speculative_tokens=k) for m in ("ngram", "suffix") for k in (2, 4, 8)},
    "acceptance-driven": AcceptanceDriven(),
    "adaptive-pruning": AdaptivePruning(),
    AGAIN: Off(),
}


class Outcome(NamedTuple):
    """Sums over the requests of one run; times in CPU microseconds.

    Attributes:
        later_tokens, decode_us: without each request's first token, and the time to it.
        num_steps: verifications, and plain decodes.
    """

    tokens: list[list[int]]
    later_tokens: int
    decode_us: int
    whole_us: int
    num_steps: int
    drafted: int
    accepted: int
    draft_us: int
    host_us: int

    @property
    def per_s(self) -> float:
        return self.later_tokens / self.decode_us * 1e6


def workload(engine: Engine, tokenizer: Any, texts: Sequence[str], sampling: Sampling, output_tokens: int) -> Workload:
    """One client that asks them one after another, in the model's chat template."""
    made = []
    for number, text in enumerate(texts):
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        prompt = Prompt(num_tokens=len(ids), token_ids=ids)
        made.append(
            Request(id=RequestId(number), arrival_us=0, prompt=prompt, output_tokens=output_tokens, sampling=sampling)
        )
    return Workload(requests=tuple(made), closed_loop=ONE_CLIENT)


def run(engine: Engine, work: Workload, policies: Policies, step_time: StepTime | None) -> Outcome:
    records = Records()
    engine.serve(work, CONFIG, policies, records, step_time=step_time)
    requests = records.sort().requests
    decoding = [s for s in records.steps if s.num_computed_tokens[0] >= requests[s.ids[0]].prompt_tokens]
    return Outcome(
        tokens=[r.output_token_ids.tolist() for r in requests],
        later_tokens=sum(len(r.output_token_ids) - 1 for r in requests),
        decode_us=sum(_decode_us(r) for r in requests),
        whole_us=sum(r.token_times_us[-1] - r.arrival_us for r in requests),
        num_steps=len(decoding),
        drafted=sum(sum(s.num_drafted) for s in decoding),
        accepted=sum(sum(s.num_accepted) for s in decoding),
        draft_us=sum(s.draft_us or 0 for s in decoding),
        host_us=sum(s.host_us or 0 for s in decoding),
    )


def _decode_us(request: RequestRecord) -> int:
    return request.token_times_us[-1] - request.token_times_us[0]


def measured(args: argparse.Namespace) -> dict[str, dict[str, list[Outcome]]]:
    """Outcomes of the rounds, by kind of text and policy."""
    engine = Engine(EngineOptions(device="cpu", dtype=args.dtype, timer="cpu"))
    archives, tokenizer = downloaded(args.packages), engine.model.load_tokenizer()
    step_time, shapes = engine.measure_step_time(CONFIG), make_policy("shapes", args.shapes)
    wanted = args.prompts * args.rounds
    found: dict[str, dict[str, list[Outcome]]] = {kind: {} for kind in args.kinds}
    for index in range(args.rounds):
        for kind in args.kinds:
            texts = prompts(archives, "writing" if kind == SAMPLED else kind, wanted)
            texts = texts[index * args.prompts : (index + 1) * args.prompts]
            sampling = BY_CHANCE if kind == SAMPLED else GREEDY
            work = workload(engine, tokenizer, texts, sampling, args.tokens)
            for name in args.policies:
                policies = Policies(DecodeFirst(), shapes=shapes, draft=POLICIES[name])
                outcome = run(engine, work, policies, step_time)
                found[kind].setdefault(name, []).append(outcome)
                print(json.dumps({"round": index, "kind": kind, "policy": name, **outcome._asdict()}), flush=True)
            refuse_differences(found[kind], kind, count=args.count_differences)
    return found


def refuse_differences(by_policy: Mapping[str, list[Outcome]], kind: str, *, count: bool) -> None:
    plain = by_policy[PLAIN][-1].tokens
    for name, outcomes in by_policy.items():
        differing = sum(a != b for a, b in zip(outcomes[-1].tokens, plain, strict=True))
        if differing and not count:
            raise SystemExit(f"{kind}, {name}: {differing} of {len(plain)} texts are not those of plain decoding")
        if differing:
            print(json.dumps({"kind": kind, "policy": name, "texts_that_differ": differing}), flush=True)


def row(kind: str, name: str, outcomes: Sequence[Outcome], plain: Sequence[tuple[Outcome, ...]]) -> str:
    """A line of the table; `plain` are the runs without drafts of each round."""
    gains, whole = [], []
    for outcome, others in zip(outcomes, plain, strict=True):
        gains.append(outcome.per_s / statistics.mean(o.per_s for o in others))
        whole.append(statistics.mean(o.whole_us for o in others) / outcome.whole_us)
    tokens, us = sum(o.later_tokens for o in outcomes), sum(o.decode_us for o in outcomes)
    steps, drafted = sum(o.num_steps for o in outcomes), sum(o.drafted for o in outcomes)
    kept = f"{sum(o.accepted for o in outcomes) / drafted:.0%}" if drafted else "-"
    return (
        f"| {kind} | {name} | {tokens / us * 1e6:.1f} | **{statistics.median(gains):.2f}** ({min(gains):.2f} to "
        f"{max(gains):.2f}) | {statistics.median(whole):.2f} | {tokens / steps:.2f} | {kept} "
        f"| {sum(o.draft_us for o in outcomes) / steps / 1e3:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", default="eager", help="which steps run in captured graphs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=3, help="of each kind, in a round")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, SAMPLED], default=[*KINDS, SAMPLED])
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--count-differences", action="store_true")
    args = parser.parse_args()
    args.policies = [PLAIN, *(p for p in args.policies if p not in (PLAIN, AGAIN)), AGAIN]
    found = measured(args)
    print(
        "\n| text | drafts | tokens/CPU s | gain (range) | whole requests | tokens/step | kept | drafting, ms a step |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for kind, by_policy in found.items():
        plain = list(zip(by_policy[PLAIN], by_policy[AGAIN], strict=True))
        for name, outcomes in by_policy.items():
            print(row(kind, name, outcomes, plain))


if __name__ == "__main__":
    main()
