"""Drafts that need no model: what proposing costs, and how much of it is kept.

    python benchmarks/draft_proposers.py speed --contexts 2000 8000
    python benchmarks/draft_proposers.py kept --texts texts.json

`speed`: a request whose context is Python's documentation, word by word, asks for 4 drafts whenever 2 more words are
known; 20,000 words of other requests' outputs have ended. Microseconds of processor time a call (median, middle half)
beside those of a search through all known tokens by numpy, which must draft the same. Turns are taken call by call.

`kept`: SmolLM2 writes greedily on passages of that documentation, on sources of the standard library, and freely (its
texts stay in the file); drafting is replayed over its outputs. Tokens a step, and the share of drafts that are kept.
One JSON object a line.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import random
import re
import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from xllm_lab.drafting import Asked, Proposer
from xllm_lab.engine.drafts.ngram import NgramProposer
from xllm_lab.engine.drafts.suffix import SuffixParams, SuffixProposer
from xllm_lab.ledger import Ledger
from xllm_lab.request_state import RequestState, new_record
from xllm_lab.workload import Prompt, Request, RequestId, Sampling, Workload

DEPTH = 4
NUM_CALLS, NEW_TOKENS = 200, 2
NUM_ENDED, ENDED_TOKENS = 100, 200
MODULES = (
    "argparse",
    "bisect",
    "calendar",
    "configparser",
    "csv",
    "difflib",
    "fractions",
    "heapq",
    "shlex",
    "textwrap",
)

Tokens = npt.NDArray[np.int32]


def documentation() -> dict[str, str]:
    return dict(importlib.import_module("pydoc_data.topics").topics)


def growing(number: int, prompt: Sequence[int]) -> RequestState:
    """A request whose output `tell` makes longer."""
    request = Request(id=RequestId(number), arrival_us=0, prompt=Prompt(num_tokens=len(prompt)), output_tokens=10**6)
    ledger = Ledger(1, 16, enable_prefix_cache=False)
    return RequestState(request, np.array(prompt, dtype=np.int32), ledger, new_record(request))


def tell(state: RequestState, tokens: Sequence[int]) -> None:
    state.record.output_token_ids += array("i", tokens)
    state.record.token_times_us += array("q", [0] * len(tokens))
    state.recount()


def searched_ngram(known: Tokens, depth: int, which: int) -> list[int]:
    """What followed the first (`which` 0) or last (-1) place at which the last 3, else 2, else 1 tokens stand."""
    for size in (3, 2, 1):
        places = len(known) - size
        same = np.ones(places, dtype=bool)
        for i in range(size):
            same &= known[i : i + places] == known[places + i]
        if same.any():
            end = int(same.nonzero()[0][which]) + size
            return [int(token) for token in known[end : end + depth]]
    return []


def searched_suffix(known: Tokens, ended: Tokens) -> list[int]:
    """What `SuffixProposer` drafts with its defaults, by looking at every place where the last token stands."""
    own, own_score = _searched(known, known)
    others, score = _searched(ended, known)
    return own if own_score >= score else others


def _searched(tokens: Tokens, known: Tokens) -> tuple[list[int], float]:
    """-1 ends a sequence."""
    tokens = np.append(tokens, np.full(DEPTH, -1, dtype=np.int32))
    params, best = SuffixParams(), (list[int](), 0.0)
    ends = (tokens == known[-1]).nonzero()[0]
    for matched in range(1, min(len(known), params.cache_max_depth)):
        if matched > 1:
            ends = ends[(ends >= matched - 1)]
            ends = ends[tokens[ends - matched + 1] == known[-matched]]
        if not len(ends):
            break
        drafts, probability, score, here = list[int](), 1.0, 0.0, ends
        while len(drafts) < min(params.most_tokens(matched, DEPTH), params.cache_max_depth - matched):
            following = tokens[here + len(drafts) + 1]
            values, counts = np.unique(following[following >= 0], return_counts=True)
            if not len(values):
                break
            probability *= int(counts.max()) / len(here)
            if probability < params.min_token_prob:
                break
            drafts.append(int(values[counts.argmax()]))
            score += probability
            here = here[following == drafts[-1]]
        if score >= best[1]:
            best = (drafts, score)
    return best


def speed(contexts: Sequence[int]) -> None:
    words = re.findall(r"\w+|[^\w\s]", " ".join(documentation().values()))
    numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokens = [numbers[word] for word in words]
    start = len(tokens) // 2
    outputs = [tokens[i : i + ENDED_TOKENS] for i in range(0, NUM_ENDED * ENDED_TOKENS, ENDED_TOKENS)]
    ended = np.array([t for output in outputs for t in (*output, -1)], dtype=np.int32)
    for context in contexts:
        for proposer, search in (
            (NgramProposer(), lambda known: searched_ngram(known, DEPTH, -1)),
            (SuffixProposer(), lambda known: searched_suffix(known, ended)),
        ):
            end_all(proposer, outputs)
            line = timed(proposer, tokens[start:], context, search)
            print(json.dumps({"method": proposer.methods[0], "context_tokens": context, **line}), flush=True)


def end_all(proposer: Proposer, outputs: list[list[int]]) -> None:
    for number, output in enumerate(outputs, 1):
        state = growing(number, [0])
        tell(state, output)
        proposer.propose([Asked(state, proposer.methods[0], 1, ())])
        proposer.forget(state.id)


def timed(
    proposer: Proposer, tokens: list[int], context: int, search: Callable[[Tokens], list[int]]
) -> dict[str, object]:
    """One request from its first call on."""
    state, method = growing(0, tokens[:context]), proposer.methods[0]
    begun = time.process_time_ns()
    proposer.propose([Asked(state, method, DEPTH, ())])
    first_us = (time.process_time_ns() - begun) / 1000
    ours: list[float] = []
    theirs: list[float] = []
    for call in range(NUM_CALLS):
        at = context + call * NEW_TOKENS
        tell(state, tokens[at : at + NEW_TOKENS])
        known = np.array(tokens[: at + NEW_TOKENS], dtype=np.int32)
        times = [time.process_time_ns()]
        (drafts,) = proposer.propose([Asked(state, method, DEPTH, ())])
        times.append(time.process_time_ns())
        found = search(known)
        times.append(time.process_time_ns())
        assert list(drafts) == found, f"{method} drafts {drafts}, a search {found}"
        ours.append((times[1] - times[0]) / 1000)
        theirs.append((times[2] - times[1]) / 1000)
    return {
        "call_us": quartiles(ours),
        "search_us": quartiles(theirs),
        "search_to_call": round(statistics.median(theirs) / statistics.median(ours), 1),
        "first_call_ms": round(first_us / 1000, 1),
    }


def quartiles(values: list[float]) -> list[float]:
    """Median first."""
    low, median, high = statistics.quantiles(values, n=4)
    return [round(median, 1), round(low, 1), round(high, 1)]


class Text(NamedTuple):
    """What a model wrote, and on what kind of task."""

    task: str
    prompt: list[int]
    output: list[int]


def kept(file: Path, num_prompts: int) -> None:
    if not file.exists():
        file.write_text(json.dumps(written(num_prompts)), encoding="utf-8")
    texts = [Text(*row) for row in json.loads(file.read_text(encoding="utf-8"))]
    makes: dict[str, Callable[[], Proposer]] = {
        "ngram 3..1": NgramProposer,
        "ngram 4..1": lambda: NgramProposer(max_ngram=4),
        "ngram 3..2": lambda: NgramProposer(min_ngram=2),
        "ngram 3..1, the earliest": EarliestNgram,
        "suffix": SuffixProposer,
        "suffix, factor 2": lambda: SuffixProposer(SuffixParams(max_spec_factor=2.0)),
        "suffix, own text only": lambda: SuffixProposer(SuffixParams(max_cached_requests=0)),
    }
    for depth in (2, 4, 8):
        for name, make in makes.items():
            print(json.dumps({"proposer": name, "depth": depth, **replayed(make(), texts, depth)}), flush=True)


class EarliestNgram:
    """vLLM's choice among equal n-grams, as far as drafts go."""

    methods = ("ngram",)

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        return [searched_ngram(one.state.token_ids(0, one.state.num_tokens), one.depth, 0) for one in asked]

    def forget(self, request: RequestId) -> None:
        """It knows nobody."""


def replayed(proposer: Proposer, texts: list[Text], depth: int) -> dict[str, str]:
    """Tokens a step and the share of drafts kept, by task and over all steps. Requests come one after another."""
    counts: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        state, done = growing(number, text.prompt), 1
        tell(state, text.output[:1])
        while done < len(text.output):
            (drafts,) = proposer.propose([Asked(state, proposer.methods[0], depth, ())])
            right = 0
            while (
                done + right < len(text.output) and right < len(drafts) and drafts[right] == text.output[done + right]
            ):
                right += 1
            told = text.output[done : done + right + 1]
            tell(state, told)
            done += len(told)
            for task in (text.task, "all"):
                sums = counts.setdefault(task, [0, 0, 0, 0])
                sums[:] = (a + b for a, b in zip(sums, (len(told), 1, right, len(drafts)), strict=True))
        proposer.forget(state.id)
    return {
        task: f"{told / steps:.2f} ({right / max(made, 1):.0%})" for task, (told, steps, right, made) in counts.items()
    }


def written(num_prompts: int) -> list[Text]:
    """So many prompts of each task, and what SmolLM2 says to them in up to 128 tokens."""
    from xllm_lab.engine.engine import Engine, EngineOptions
    from xllm_lab.engine.gguf_file import read_gguf
    from xllm_lab.engine.gguf_weights import gguf_tokenizer
    from xllm_lab.engine.models import embedded_model
    from xllm_lab.instance_config import InstanceConfig
    from xllm_lab.policies.catalog import make_batch_policy
    from xllm_lab.records import Records

    tokenizer = gguf_tokenizer(read_gguf(embedded_model()))
    asked = [
        (
            task,
            tokenizer.apply_chat_template(
                [{"role": "user", "content": words}], add_generation_prompt=True, return_dict=False
            ),
        )
        for task, words in prompts(num_prompts)
    ]
    requests = tuple(
        Request(
            id=RequestId(i),
            arrival_us=0,
            prompt=Prompt(num_tokens=len(ids), token_ids=tuple(ids)),
            output_tokens=128,
            sampling=Sampling(ignore_eos=False, stop_token_ids=(tokenizer.eos_token_id,)),
        )
        for i, (_, ids) in enumerate(asked)
    )
    where = InstanceConfig(
        max_tokens_per_batch=512, max_seqs_per_batch=16, block_size=16, num_kv_blocks=800, max_model_len=1024
    )
    records = Records()
    Engine(EngineOptions(device="cpu", dtype="float32")).serve(
        Workload(requests=requests), where, make_batch_policy("fcfs"), records
    )
    return [Text(asked[r.id][0], list(asked[r.id][1]), r.output_token_ids.tolist()) for r in records.sort().requests]


def prompts(count: int) -> list[tuple[str, str]]:
    draw = random.Random(0)
    long = [text for _, text in sorted(documentation().items()) if len(text) > 1800]
    modules = [importlib.import_module(name) for name in MODULES]
    functions = [f for m in modules for _, f in inspect.getmembers(m, inspect.isfunction) if f.__module__ == m.__name__]

    def passage(length: int) -> str:
        text = draw.choice(long)
        start = draw.randrange(len(text) - length)
        return text[start : start + length]

    asked = []
    for _ in range(count):
        source = inspect.getsource(draw.choice(functions))[:1200]
        hero = draw.choice(["a dog", "a ship", "a winter", "a king", "an old clock", "a river"])
        asked += [
            ("rewrite", f"Fix the grammar of this text and return the whole text.\n\n{passage(700)}"),
            ("quote", f"Read the passage.\n\n{passage(1500)}\n\nWhat does the passage say? Quote it."),
            ("summary", f"Summarize the following passage.\n\n{passage(1500)}"),
            ("code", f"Add type annotations to this Python function. Give all of it.\n\n```python\n{source}```"),
            ("story", f"Write a short story about {hero} and {draw.choice(['a thief', 'two friends', 'a storm'])}."),
        ]
    return asked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("speed").add_argument("--contexts", type=int, nargs="+", default=[2000, 8000])
    asked_for = verbs.add_parser("kept")
    asked_for.add_argument("--texts", type=Path, required=True)
    asked_for.add_argument("--prompts", type=int, default=16, help="of each of five tasks")
    given = parser.parse_args()
    if given.verb == "speed":
        speed(given.contexts)
    else:
        kept(given.texts, given.prompts)
