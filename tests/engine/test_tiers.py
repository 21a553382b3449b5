"""KV tiers of the engine: whatever is copied to the host and back, however late, the tokens are those without.

Every pair of settings of two switches meets in some combination below, as for drafts.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.engine.drafts.test_speculation import all_pairs
from tests.laws import obey_the_laws
from tests.small_runs import STEP_TIME, WildCache
from tests.tiny_models import VOCAB_SIZE, tiny_model
from xllm_lab.copy_time import KINDS, CopyTime, CopyWeights
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache.cost_aware import CostAware
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.cache.reuse_aware import ReuseAware
from xllm_lab.policies.cache.watermark import Watermark
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.records import Records
from xllm_lab.workload import Prompt, Request, RequestId, Workload

NUM_SESSIONS, NUM_TURNS, NUM_TOKENS = 6, 4, 5
WHERE = InstanceConfig(
    max_tokens_per_batch=256, max_seqs_per_batch=16, block_size=4, num_kv_blocks=400, max_model_len=128
)
TIGHT = 44  # blocks: two of the longest prompts
# Slower to compute than to copy, so that a policy that weighs them copies.
COPY_TIME = CopyTime(dict.fromkeys(KINDS, CopyWeights(1.0, 0.1)))
SWITCHES: dict[str, tuple[Any, ...]] = {
    "cache": (
        Lru(),
        Watermark(low_frac=1.0),
        ReuseAware(half_life_us=1_000),
        CostAware(),
        WildCache(host_blocks_factor=2.0),
        Lru(max_offloading_blocks=3, max_restoring_blocks=2),
    ),
    "batch": (DecodeFirst(), Fcfs()),
    "shapes": (EAGER, PowersOfTwo()),
    "draft": (
        OFF,
        Fixed(method="ngram", num_speculative_tokens=3),
        Fixed(method="draft_model", num_speculative_tokens=2),
    ),
    "async_scheduling": ASYNC_SCHEDULING,
    "max_tokens_per_batch": (256, 24),  # prompts are cut
    "num_kv_blocks": (80, TIGHT),  # requests lose their KV
    "link": (None, 2e7, 1e6),  # a block takes what the machine takes, or 0.2 ms, or a step's time and more
}


def sessions(turns: int = NUM_TURNS, *, gap_us: int = 3_000) -> Workload:
    """Clients who say a bit more each time, in turns, so that what they said is pushed out meanwhile."""
    rng = np.random.default_rng(7)
    said = [rng.integers(3, VOCAB_SIZE, 90).tolist() for _ in range(NUM_SESSIONS)]
    requests = []
    for i in range(NUM_SESSIONS * turns):
        turn, session = divmod(i, NUM_SESSIONS)
        tokens = tuple(said[session][: 24 + 20 * turn + session])
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        requests.append(Request(id=RequestId(i), arrival_us=gap_us * i, prompt=prompt, output_tokens=NUM_TOKENS))
    return Workload(requests=tuple(requests))


@functools.cache
def engine(link: float | None = None, clock: str = "virtual", timer: str = "cpu") -> Engine:
    """Its draft model is itself, so that drafts are kept."""
    return Engine(
        EngineOptions(
            model=str(tiny_model()),
            device="cpu",
            dtype="float32",
            draft_model="layers:0-1",
            clock=clock,
            timer=timer,
            host_link_bytes_per_s=link,
        )
    )


def served(
    host: Engine, work: Workload, config: InstanceConfig, policies: Policies, *, copy_time: CopyTime = COPY_TIME
) -> Records:
    records = Records()
    host.serve(work, config, policies, records, step_time=STEP_TIME, copy_time=copy_time)
    obey_the_laws(work, config, records.sort(), vocab_size=VOCAB_SIZE)
    return records


def tokens_of(records: Records) -> list[list[int]]:
    return [r.output_token_ids.tolist() for r in records.requests]


@functools.cache
def plain(gap_us: int = 3_000) -> list[list[int]]:
    """Without tiers, and with room for everybody."""
    return tokens_of(served(engine(), sessions(gap_us=gap_us), WHERE, Policies(Fcfs())))


@pytest.mark.parametrize(
    "combination", list(all_pairs(SWITCHES)), ids=lambda c: "-".join(str(v)[:12] for v in c.values())
)
def test_the_tokens_are_those_without_tiers(combination: dict[str, Any]) -> None:
    limits = {k: v for k, v in combination.items() if k not in ("cache", "batch", "shapes", "draft", "link")}
    policies = Policies(
        combination["batch"], shapes=combination["shapes"], draft=combination["draft"], cache=combination["cache"]
    )
    records = served(engine(combination["link"]), sessions(), replace(WHERE, **limits), policies)
    assert tokens_of(records) == plain()
    assert any(c.kind == "offload" for c in records.copies), "nothing was offloaded"
