"""Tiers in simulated time: copies take their kind's link one after another, and whatever fails is forgotten whole."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import NEVER, VOCAB_SIZE, fleet_obeys_the_laws, is_repeatable, obey_the_laws
from tests.sim.test_fast_forward import Uneven
from tests.small_runs import (
    COPY_TIME,
    STEP_TIME,
    TIERED,
    batch_policies,
    busy_workloads,
    instance_config,
    request,
    tight_configs,
)
from xllm_lab.copies import Copy, CopyEnd, CopyRecord
from xllm_lab.copy_time import HOST_KINDS, CopyTime, CopyWeights
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.outages import Outage
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.failover.requeue import Requeue
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.routing import InstanceId
from xllm_lab.records import Records
from xllm_lab.sim.copies import PricedLinks, SimulatedCopies
from xllm_lab.sim.fleet import Fleet
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.workload import RequestId, Workload

# From links faster than any step to ones that outlast the run.
LINKS = st.builds(
    CopyWeights, call_us=st.sampled_from((0.0, 5.0, 400.0)), token_us=st.sampled_from((0.0, 0.3, 1.0, 90.0))
)
COPY_TIMES = st.builds(lambda *each: CopyTime(dict(zip(HOST_KINDS, each, strict=True))), *[LINKS] * len(HOST_KINDS))
# Policies that come to rest: on a slow link, blocks that are copied back and forth for ever are nobody's.
CACHES = st.sampled_from(TIERED)


def served(
    work: Workload,
    config: InstanceConfig,
    cache: CachePolicy,
    *,
    policy: BatchPolicy | None = None,
    copy_time: CopyTime = COPY_TIME,
) -> Records:
    return run_simulation(
        *(work, config, Policies(policy or Fcfs(), cache=cache), Predicted(Uneven(), copy_time=copy_time)),
        vocab_size=VOCAB_SIZE,
        step_time=STEP_TIME,
        copy_time=copy_time,
    )


@given(
    work=busy_workloads(),
    config=st.builds(
        *(replace, tight_configs()),
        async_scheduling=st.sampled_from(ASYNC_SCHEDULING),
        enable_prefix_cache=st.just(True),
    ),
    policy=batch_policies(),
    cache=CACHES,
    copy_time=COPY_TIMES,
)
def test_a_run_with_tiers_obeys_the_laws(
    work: Workload, config: InstanceConfig, policy: BatchPolicy, cache: CachePolicy, copy_time: CopyTime
) -> None:
    """Blocks are conserved, whatever is on its way how long, planned ahead or not; and the same run is the same."""
    run = partial(served, work, config, cache, policy=policy, copy_time=copy_time)
    records = run()
    obey_the_laws(work, config, records)
    each_kind_has_one_link(records.copies, copy_time, config.block_size)
    # A step may be under way in vain then, and a client still to go away.
    over_us = max(
        *(r.finish_us or 0 for r in records.requests),
        *(s.end_us for s in records.steps),
        *(r.cancel_us or 0 for r in work.requests),
    )
    assert all(c.asked_us <= over_us for c in records.copies), "a copy is asked for when all is over"
    assert all(c.end_us <= over_us for c in records.copies if c.end_us is not None), "and somebody heard of it"
    is_repeatable(run)


def each_kind_has_one_link(copies: list[CopyRecord], copy_time: CopyTime, block_size: int) -> None:
    """A copy begins when it is asked for or the one before it is done, and takes what it costs: none overlap."""
    free_us: dict[str, int] = defaultdict(int)
    for copy in copies:
        begins_us = max(copy.asked_us, free_us[copy.kind])
        free_us[copy.kind] = begins_us + max(1, round(copy_time.copy_us(copy.kind, len(copy.blocks) * block_size)))
        assert copy.end_us in {None, free_us[copy.kind]}, f"copy {copy.copy} ends at {copy.end_us}"
        assert copy.num_tokens == len(copy.blocks) * block_size


@pytest.mark.parametrize("cache", TIERED, ids=lambda c: type(c).__name__)
def test_what_was_restored_is_not_computed(cache: CachePolicy) -> None:
    """Nine prompts in turns, one after another: who waited for a copy computes what is behind it, and nothing else.

    What its copy held of the device is then all that it found there.
    """
    config = instance_config(num_kv_blocks=24, max_tokens_per_batch=128)
    turns = [k for _ in range(4) for k in range(5)]
    asked = [
        request(i, 2000 * i, prompt=40 + 8 * (i // 5) + 1, output=1, hashes=tuple(range(100 * k, 100 * k + 20)))
        for i, k in enumerate(turns)
    ]
    # A token costs 50 times as much as its copy, for who weighs.
    records = served(
        Workload(requests=tuple(asked)),
        config,
        cache,
        copy_time=CopyTime(dict.fromkeys(HOST_KINDS, CopyWeights(0.0, 0.02))),
    )
    restored = {c.request: c for c in records.copies if c.kind == "restore"}
    assert len(restored) >= 5, "not enough was fetched to say anything"
    for copy in restored.values():
        record = next(r for r in records.requests if r.id == copy.request)
        assert record.cached_tokens == copy.num_held_blocks * config.block_size
        assert copy.end_us is not None
        assert record.first_scheduled_us is not None
        assert record.first_scheduled_us >= copy.end_us
        (step,) = [s for s in records.steps if record.id in s.ids]
        assert step.num_tokens == [record.prompt_tokens - record.cached_tokens]


@given(
    asked=st.lists(st.tuples(st.integers(0, 300), st.sampled_from(HOST_KINDS), st.integers(1, 5)), max_size=12),
    copy_time=COPY_TIMES,
    stops_us=st.none() | st.integers(0, 300),
    looks=st.lists(st.integers(0, 4000), max_size=6),
)
def test_simulated_copies_are_two_queues(
    asked: list[tuple[int, str, int]], copy_time: CopyTime, stops_us: int | None, looks: list[int]
) -> None:
    """Each copy is told once, at the first look at or after its end, in order of ends; none that was under way when the
    instance stopped, and those asked for later do not wait for it."""
    env = simpy.Environment(initial_time=0)
    copies = SimulatedCopies(env, PricedLinks(copy_time, 4), has_store=False)
    events: list[tuple[int, int, tuple[str, int] | None]] = [(us, 1, (kind, n)) for us, kind, n in sorted(asked)]
    events += [] if stops_us is None else [(stops_us, 0, None)]
    events += [(us, 2, None) for us in [*looks, NEVER]]
    told: list[CopyEnd] = []
    expected: dict[int, int] = {}
    free_us: dict[str, int] = {}
    for us, what, copy in sorted(events, key=lambda e: e[:2]):
        env._now = us  # nothing else is on the calendar
        if copy is not None:
            kind, num_blocks = copy
            number, blocks = len(expected), tuple(range(num_blocks))
            keys = tuple(bytes([n]) for n in blocks)
            copies.launch(Copy(number, kind, None, blocks, blocks, keys, us))  # type: ignore[arg-type]
            took_us = max(1, round(copy_time.copy_us(kind, 4 * num_blocks)))  # type: ignore[arg-type]
            free_us[kind] = expected[number] = max(us, free_us.get(kind, 0)) + took_us
        elif what == 0:
            copies.stop()
            expected = {
                n: end if end in {e.end_us for e in told if e.number == n} else NEVER + 1 for n, end in expected.items()
            }
            free_us.clear()
        else:
            assert copies.next_us == min(
                (e for n, e in expected.items() if n not in {t.number for t in told} and e <= NEVER), default=None
            )
            new = copies.over()
            assert new == sorted(new, key=lambda e: (e.end_us, e.number))
            told += new
            assert {(e.number, e.end_us) for e in told} == {(n, e) for n, e in expected.items() if e <= us}
    assert len({e.number for e in told}) == len(told)


@given(
    work=busy_workloads(),
    config=tight_configs(),
    cache=CACHES,
    copy_time=COPY_TIMES,
    down_us=st.sampled_from((20, 60, 150, 501, 600)),
)
def test_an_instance_that_fails_forgets_its_copies(
    work: Workload, config: InstanceConfig, cache: CachePolicy, copy_time: CopyTime, down_us: int
) -> None:
    """And both of its tiers: it copies on as one that begins, to blocks of a host that is empty."""
    outages = tuple(Outage(instance=InstanceId(k), start_us=down_us, end_us=down_us + 30 + k) for k in range(2))
    fleet = FleetConfig(num_instances=2, heartbeat_us=0, outages=outages, failover=Requeue())
    config = replace(config, enable_prefix_cache=True)
    records = of_a_fleet(work, fleet, config, cache, copy_time)
    fleet_obeys_the_laws(work, fleet, config, records)
    for outage in outages:
        mine = [c for c in records.copies if c.instance == outage.instance]
        assert [c.copy for c in mine] == list(range(len(mine)))
        before = [c for c in mine if c.asked_us < outage.start_us]
        after = mine[len(before) :]
        assert all(c.asked_us >= outage.end_us for c in after)
        assert not after or all(c.end_us is None or c.end_us <= outage.start_us for c in before)
        for part in (before, after):
            each_kind_has_one_link(part, copy_time, config.block_size)
            host_is_filled_before_it_is_read(part)


def host_is_filled_before_it_is_read(copies: list[CopyRecord]) -> None:
    """Of a host that is empty at first."""
    filled: dict[int, int] = {}
    for copy in copies:
        for slot in copy.evicted:
            assert filled.pop(slot) <= copy.asked_us
        for slot in copy.slots:
            if copy.kind == "offload":
                assert slot not in filled
                filled[slot] = NEVER if copy.end_us is None else copy.end_us
            else:
                assert filled[slot] <= copy.asked_us


def of_a_fleet(
    work: Workload, fleet: FleetConfig, config: InstanceConfig, cache: CachePolicy, copy_time: CopyTime
) -> Records:
    records = Records()
    Fleet(
        *(work, fleet, config, Policies(Fcfs(), cache=cache), Predicted(Uneven(), copy_time=copy_time)),
        recorder=records,
        vocab_size=VOCAB_SIZE,
        step_time=STEP_TIME,
        copy_time=copy_time,
    ).run()
    return records.sort()


def test_who_waits_for_a_copy_of_a_failed_instance_is_computed_elsewhere() -> None:
    """The copy would have taken longer than anybody waits; the other instance knows nothing of the prompt."""
    said = tuple(range(10))
    asked = [request(0, 0, prompt=41, output=1, hashes=said), request(1, 0, prompt=5, output=1)]
    asked += [request(k, 500 * k, prompt=41 + 4 * k, output=1) for k in (2, 3, 4, 5)]
    asked += [request(6, 30_000, prompt=42, output=1, hashes=said)]
    slow = CopyTime({**COPY_TIME.weights, "restore": CopyWeights(1e7, 0.0)})
    fleet = FleetConfig(
        num_instances=2,
        heartbeat_us=0,
        outages=(Outage(instance=InstanceId(0), start_us=40_000, end_us=50_000),),
        failover=Requeue(),
    )
    work, config = Workload(requests=tuple(asked)), instance_config(max_tokens_per_batch=64)
    records = of_a_fleet(work, fleet, config, Lru(), slow)
    (restored,) = [c for c in records.copies if c.kind == "restore"]
    assert (restored.request, restored.instance, restored.end_us) == (RequestId(6), 0, None)
    last = next(r for r in records.requests if r.id == 6)
    assert (last.instance, last.cached_tokens, last.output_tokens) == (1, 0, 1)
    assert last.first_scheduled_us is not None
    assert last.first_scheduled_us >= 40_000
