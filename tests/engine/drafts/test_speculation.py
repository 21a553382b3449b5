"""Speculation on real tensors: the tokens are those of plain decoding, whatever drafts them and whatever else is on.

Every pair of settings of two switches meets in some combination below (all pairs, found greedily).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

from tests.engine.drafts.tiny_mtp import mtp_checkpoint
from tests.laws import obey_the_laws
from tests.small_runs import STEP_TIME, WildDrafts
from tests.tiny_models import VOCAB_SIZE
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.draft import DraftPolicy
from xllm_lab.policies.draft.acceptance_driven import AcceptanceDriven
from xllm_lab.policies.draft.adaptive_pruning import AdaptivePruning
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.records import Records
from xllm_lab.workload import Prompt, Request, RequestId, Sampling, Workload

NUM_PROMPTS, NUM_TOKENS = 40, 14
WHERE = InstanceConfig(
    max_tokens_per_batch=256, max_seqs_per_batch=16, block_size=4, num_kv_blocks=400, max_model_len=128
)
SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "draft": (
        Fixed(method="ngram", num_speculative_tokens=3),
        Fixed(method="suffix", num_speculative_tokens=5),
        Fixed(method="draft_model", num_speculative_tokens=2),
        Fixed(method="mtp", num_speculative_tokens=3),
        AcceptanceDriven(row_cost_frac=0.01),
        AdaptivePruning(),
        WildDrafts(),
    ),
    "batch": (DecodeFirst(), Fcfs()),
    "shapes": (EAGER, PowersOfTwo(), PowersOfTwo(graphs_prefill=True)),
    "async_scheduling": ASYNC_SCHEDULING,
    "enable_prefix_cache": (True, False),
    "max_tokens_per_batch": (256, 24),  # prompts are cut
    "num_kv_blocks": (400, 60),  # requests lose their KV
}


def all_pairs(switches: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Combinations in which every pair of settings of two switches occurs."""
    left = {
        (a, x, b, y)
        for a, b in combinations(switches, 2)
        for x in range(len(switches[a]))
        for y in range(len(switches[b]))
    }
    ways = list(product(*(range(len(s)) for s in switches.values())))
    names = list(switches)
    while left:
        best = max(
            ways,
            key=lambda way: sum(
                (a, x, b, y) in left for (a, x), (b, y) in combinations(zip(names, way, strict=True), 2)
            ),
        )
        left -= {(a, x, b, y) for (a, x), (b, y) in combinations(zip(names, best, strict=True), 2)}
        yield {name: switches[name][k] for name, k in zip(names, best, strict=True)}


def workload(sampling: Sampling) -> Workload:
    """Prompts that repeat themselves, some of which begin alike."""
    rng = np.random.default_rng(5)
    requests = []
    for i in range(NUM_PROMPTS):
        phrase = rng.integers(3, VOCAB_SIZE, 6)
        tokens = np.concatenate(
            [np.arange(3, 12) if i % 3 == 0 else rng.integers(3, VOCAB_SIZE, 4), *[phrase] * (1 + i % 4)]
        )
        prompt = Prompt(num_tokens=len(tokens), token_ids=tuple(tokens.tolist()))
        requests.append(
            Request(id=RequestId(i), arrival_us=0, prompt=prompt, output_tokens=NUM_TOKENS, sampling=sampling)
        )
    return Workload(requests=tuple(requests))


GREEDY, BY_CHANCE = Sampling(), Sampling(temperature=0.4, top_k=4, seed=3)


@cache
def engine() -> Engine:
    """With a prediction module, and itself as a draft model, so that drafts are kept."""
    options = EngineOptions(
        model=str(mtp_checkpoint("mimo").folder), device="cpu", dtype="float32", draft_model="layers:0-1"
    )
    return Engine(options)


@cache
def plain(sampling: Sampling) -> list[list[int]]:
    return tokens_of(served(workload(sampling), WHERE, Policies(Fcfs())))


def served(work: Workload, config: InstanceConfig, policies: Policies) -> Records:
    records = Records()
    engine().serve(work, config, policies, records, step_time=STEP_TIME)
    obey_the_laws(work, config, records.sort(), vocab_size=VOCAB_SIZE)
    return records


def _drafts(records: Records) -> list[tuple[Sequence[int], Sequence[int]]]:
    return [(r.num_drafted, r.num_accepted) for r in records.requests]


def tokens_of(records: Records) -> list[list[int]]:
    return [r.output_token_ids.tolist() for r in records.requests]


@pytest.mark.parametrize(
    "combination", list(all_pairs(SWITCHES)), ids=lambda c: "-".join(str(v)[:12] for v in c.values())
)
@pytest.mark.parametrize("sampling", [GREEDY, BY_CHANCE], ids=["greedy", "sampled"])
def test_the_tokens_are_those_of_plain_decoding(combination: dict[str, Any], sampling: Sampling) -> None:
    """Even sampled ones, as lookups draft nothing by chance; a model does, and then they are only as likely."""
    batch: BatchPolicy = combination["batch"]
    draft: DraftPolicy = combination["draft"]
    limits = {k: v for k, v in combination.items() if k not in ("batch", "draft", "shapes")}
    policies = Policies(batch, shapes=combination["shapes"], draft=draft)
    records = served(workload(sampling), replace(WHERE, **limits), policies)
    if sampling == GREEDY or getattr(draft, "method", None) in ("ngram", "suffix"):
        assert tokens_of(records) == plain(sampling)
    drafted, accepted = (sum(sum(counts) for counts in c) for c in zip(*_drafts(records), strict=True))
    assert drafted > 0, "nothing was drafted"
    assert accepted > 0 or getattr(draft, "method", None) == "mtp", "no draft was kept"  # its weights are random
