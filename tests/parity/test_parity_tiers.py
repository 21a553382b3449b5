"""Parity of runs with copies between tiers: a pretended engine's, whose copies end late and unevenly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import VOCAB_SIZE, obey_the_laws
from tests.parity.test_parity_sim import PretendedEngine
from tests.small_runs import COPY_TIME, STEP_TIME, TIERED, batch_policies, busy_workloads, request, tight_configs
from xllm_lab.copies import Copy, CopyEnd, CopyRecord
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.cache.device_only import DEVICE_ONLY
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.of_instance import Policies
from xllm_lab.runs import Manifest, Run, describe, read_run, write_run
from xllm_lab.sim.parity import parity
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.workload import RequestId, Workload

CONFIG = InstanceConfig(max_tokens_per_batch=64, max_seqs_per_batch=6, block_size=4, num_kv_blocks=20)


class UnevenLinks:
    """`Links` of their own time."""

    def __init__(self) -> None:
        self._free_us: dict[str, int] = {}

    def end_of(self, copy: Copy, now_us: int) -> CopyEnd:
        begins_us = max(now_us, self._free_us.get(copy.kind, 0))
        self._free_us[copy.kind] = begins_us + 3 + 11 * copy.number % 17 + len(copy.blocks)
        return CopyEnd(copy.number, self._free_us[copy.kind], len(copy.keys))

    def fail(self, now_us: int) -> None:
        """Nobody does."""


class CopiesUnevenly(PretendedEngine):
    """A link that takes longer now and then, and each way has its own."""

    def links(self, block_size: int) -> UnevenLinks:
        return UnevenLinks()


def engine_run(work: Workload, config: InstanceConfig, policies: Policies) -> Run:
    """A run that claims to be an engine's; not on disk."""
    told = describe(config, policies, STEP_TIME, work, copy_time=COPY_TIME)
    manifest = Manifest(
        host="engine", timing={}, model={"vocab_size": VOCAB_SIZE}, versions={}, commit="", hardware={}, **told
    )
    presented = Run(Path("pretended"), manifest)
    presented.workload = work
    presented.records = run_simulation(
        *(work, config, policies, CopiesUnevenly()),
        vocab_size=VOCAB_SIZE,
        step_time=STEP_TIME,
        copy_time=COPY_TIME,
    )
    return presented


def sessions() -> Workload:
    """Five prompts in turns that grow; the device holds two of them."""
    turns = [(turn, k) for turn in range(4) for k in range(5)]
    return Workload(
        requests=tuple(
            request(i, 90 * i, prompt=24 + 4 * turn + k, output=4, hashes=tuple(range(100 * k, 100 * k + 12)))
            for i, (turn, k) in enumerate(turns)
        )
    )


def told(run: Run) -> list[CopyRecord]:
    restored = [c for c in run.records.copies if c.kind == "restore"]
    assert len(restored) >= 3, "not enough was fetched to say anything"
    return restored


@given(
    work=busy_workloads(),
    config=st.builds(replace, tight_configs(), async_scheduling=st.sampled_from(ASYNC_SCHEDULING)),
    policy=batch_policies(),
    cache=st.sampled_from(TIERED),
)
def test_any_run_with_copies_replays_identically(
    work: Workload, config: InstanceConfig, policy: BatchPolicy, cache: CachePolicy
) -> None:
    presented = engine_run(work, replace(config, enable_prefix_cache=True), Policies(policy, cache=cache))
    outcome = parity(presented)
    assert outcome.is_identical, outcome


def test_a_run_with_copies_replays_from_its_folder(tmp_path: Path) -> None:
    """What was copied, and the times that the policy was told, are on disk."""
    presented = engine_run(sessions(), CONFIG, Policies(Fcfs(), cache=Lru()))
    obey_the_laws(presented.workload, CONFIG, presented.records)
    told(presented)
    write_run(tmp_path / "run", presented.manifest, presented.workload, presented.records)
    read = read_run(tmp_path / "run")
    assert read.records.copies == presented.records.copies
    assert parity(read).is_identical


def ends_later(copy: CopyRecord) -> None:
    assert copy.end_us is not None
    copy.end_us += 200


def is_the_other_way(copy: CopyRecord) -> None:
    copy.kind = "offload"


def has_other_blocks(copy: CopyRecord) -> None:
    copy.blocks = copy.blocks[::-1]


def has_other_slots(copy: CopyRecord) -> None:
    copy.slots = copy.slots[1:]


def is_somebody_elses(copy: CopyRecord) -> None:
    copy.request = RequestId(10_000)


@pytest.mark.parametrize(
    "tampers",
    [ends_later, is_the_other_way, has_other_blocks, has_other_slots, is_somebody_elses],
)
def test_a_copy_that_was_tampered_with_is_reported(tampers: Callable[[CopyRecord], None]) -> None:
    """At the first step that differs; one planned when the copy was asked for, or after its end at the latest."""
    presented = engine_run(sessions(), CONFIG, Policies(Fcfs(), cache=Lru()))
    copy = told(presented)[0]
    asked_us, end_us = copy.asked_us, copy.end_us
    tampers(copy)
    outcome = parity(presented)
    assert outcome.step is not None
    step = presented.records.steps[outcome.step]
    assert asked_us <= step.start_us
    assert end_us is not None
    before = presented.records.steps[: outcome.step]
    assert all(s.start_us <= end_us for s in before)
    if tampers is not ends_later:
        assert outcome.engine is not None
        assert outcome.simulator is not None
        assert outcome.engine.copies != outcome.simulator.copies


@pytest.mark.parametrize("other", [DEVICE_ONLY, Lru(max_restoring_blocks=1)], ids=["device-only", "one at a time"])
def test_another_policy_parts_where_it_copies_otherwise(other: Any) -> None:
    presented = engine_run(sessions(), CONFIG, Policies(Fcfs(), cache=Lru()))
    outcome = parity(presented, policies=Policies(Fcfs(), cache=other))
    assert outcome.engine is not None
    assert outcome.simulator is not None
    assert outcome.engine.copies != outcome.simulator.copies
