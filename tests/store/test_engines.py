"""Engine processes that share a store: one serves what the other computed, and an owner may die at any moment."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.engine.cluster.conftest import options
from tests.engine.cluster.test_fleet import Killing, fleet, killer, sessions, tokens
from tests.engine.test_engine_serving import config, served
from tests.engine.test_tiers import COPY_TIME
from tests.small_runs import STEP_TIME
from tests.store.conftest import HAS_MOONCAKE
from tests.store.places import Place
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.roles.static import Static
from xllm_lab.records import FinishReason, Records

# What it waits for the store, and what a busy machine may add.
TIMEOUT_US, SLACK_US = 300_000, 2_000_000
STORING = Policies(Fcfs(), cache=Lru(prefetch_timeout_us=TIMEOUT_US))
WHERE = config(num_kv_blocks=200)
# Of moments at which an owner is killed; where there is a master they are the more interesting.
NUM_KILLS = 20 if HAS_MOONCAKE else 4


@pytest.fixture
def sharing(place: Place) -> Iterator[EngineFleet]:
    with EngineFleet(replace(options("wall"), store=place.spec), 2) as engines:
        yield engines


def test_a_second_engine_serves_what_the_first_computed(sharing: EngineFleet) -> None:
    """Turns of odd sessions go to each of two engines in turn; what the other one said is not computed again."""
    work, records = sessions(num_sessions=3, num_turns=4, gap_us=400_000), Records()
    told = sharing.serve(
        work, fleet(num_instances=2), WHERE, STORING, records, step_time=STEP_TIME, copy_time=COPY_TIME
    )
    assert tokens(records) == tokens(served(work, WHERE, Fcfs()))
    before = {r.id: next(o for o in records.requests if o.id == r.id - 3) for r in records.requests if r.id >= 3}
    moved = [r for r in records.requests if r.id >= 3 and r.instance != before[r.id].instance]
    assert len(moved) == 9
    found = [r.cached_tokens for r in moved]
    assert sum(map(bool, found)) >= 7, f"those who moved found {found} tokens"
    assert told.store is not None
    assert all(one["num_hits"] for one in told.store["instances"])


@pytest.mark.slow
def test_an_owner_is_killed_at_any_moment(sharing: EngineFleet) -> None:
    """While others read what it gave: right tokens, each request once, and nobody waits beyond the deadline."""
    work = sessions(num_sessions=5, num_turns=4, gap_us=20_000)
    right = tokens(served(work, WHERE, Fcfs()))
    dice, num_prefetched, num_downs = random.Random(5), 0, 0
    for moment in range(NUM_KILLS):
        how = fleet(num_instances=2, roles=Static(num_prefill=1)) if moment % 2 else fleet(num_instances=2)
        records = Killing({dice.randint(0, 24): killer(sharing, moment % 2)})
        told = sharing.serve(work, how, WHERE, STORING, records, step_time=STEP_TIME, copy_time=COPY_TIME)
        assert sorted(r.id for r in records.requests) == [r.id for r in work.requests]
        assert {r.finish_reason for r in records.requests} == {FinishReason.LENGTH}
        assert tokens(records) == right
        asked = [c for c in records.copies if c.kind == "prefetch" and c.end_us is not None]
        assert all((c.end_us or 0) - c.asked_us < TIMEOUT_US + SLACK_US for c in asked)
        num_prefetched += sum(c.num_moved_tokens or 0 for c in asked)
        num_downs += sum(met.kind == "down" for met in told.deliveries)
    assert num_prefetched > 0
    assert num_downs > NUM_KILLS // 2, "hardly anybody was killed while it served"
