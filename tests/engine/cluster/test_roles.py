"""Engine processes with roles: a request's first token comes from one, the others from another, and all are one's."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.engine.cluster.test_fleet import Killing, fleet, killer, serve, tokens
from tests.engine.test_engine_serving import config, crowd, served
from xllm_lab.decisions import DECISION_SCHEMA, DECISIONS_FILE, decision_table, decisions_from
from xllm_lab.engine.cluster.fleet import EngineFleet, Served
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.outages import Outage
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.roles.slo_flip import SloFlip
from xllm_lab.policies.roles.static import Static
from xllm_lab.policies.routing import InstanceId
from xllm_lab.records import FinishReason, Records
from xllm_lab.run_writer import ROLES_FILE
from xllm_lab.sim.parity import parity
from xllm_lab.workload import Slo, Workload

# Deciding anew after some steps, on what some steps brought.
OFTEN = {"role_interval_us": 3000, "role_window_us": 20_000}


def disaggregated(num_prefill: int = 1, **changes: Any) -> FleetConfig:
    return fleet("least-loaded", **{"roles": Static(num_prefill=num_prefill), **OFTEN, **changes})


def restless(**changes: Any) -> FleetConfig:
    """Roles that change as fast as they may."""
    flips = SloFlip(low_frac=0.85, high_frac=0.85, min_dwell_us=3000, min_return_us=6000, min_requests=1)
    return fleet("least-loaded", **{"roles": flips, **OFTEN, **changes})


def with_promises(work: Workload) -> Workload:
    """First tokens are late, and all others are not."""
    return replace(work, requests=tuple(replace(r, slo=Slo(ttft_us=1)) for r in work.requests))


def steps_of(records: Records, request: int) -> list[tuple[int, int]]:
    """(end, instance) of the steps that computed some of a request."""
    return [(s.end_us, s.instance) for s in records.steps if request in s.ids]


@pytest.mark.parametrize("mode", ["off", "on", "length_aware"])
@pytest.mark.parametrize("where", ["roomy", "preempting"])
def test_tokens_are_those_of_one_engine(engines: EngineFleet, mode: str, where: str) -> None:
    """And a request's first token is the prefill instance's, all others another's."""
    tight = {"block_size": 4, "num_kv_blocks": 26} if where == "preempting" else {}
    work, how = crowd(18, output=20), config(async_scheduling=mode, **tight)
    records, _ = serve(engines, work, disaggregated(), how)
    assert tokens(records) == tokens(served(work, config(), Fcfs()))
    for record in records.requests:
        assert (record.prefill_instance, record.instance in (1, 2)) == (0, True)
        assert record.handed_over_us is not None
        for end_us, instance in steps_of(records, record.id):
            # A row that was planned ahead is computed in vain.
            assert (instance == 0) == (end_us <= record.handed_over_us) or mode == "on"
    assert (where == "preempting") == any(r.num_preemptions for r in records.requests)


def test_one_token_is_all_and_ends_where_it_is_drawn(in_lockstep: EngineFleet) -> None:
    """Nothing is handed over."""
    records, _ = serve(in_lockstep, crowd(6, output=1), disaggregated(), config())
    assert {(r.instance, r.prefill_instance, r.handed_over_us) for r in records.requests} == {(0, None, None)}


def test_clients_may_go_away_at_any_time(engines: EngineFleet) -> None:
    """Before, at, and after the handover."""
    work = crowd(24, output=12)
    leaving = tuple(replace(r, cancel_us=r.arrival_us + (1 + r.id) * 200) if r.id % 2 else r for r in work.requests)
    records, _ = serve(engines, replace(work, requests=leaving), disaggregated(), config())
    assert all(r.finish_reason is FinishReason.LENGTH for r in records.requests if r.id % 2 == 0)
    assert FinishReason.CANCELLED in {r.finish_reason for r in records.requests}


@pytest.mark.parametrize("mode", ["off", "length_aware"])
def test_parity_covers_roles_and_handovers(engines: EngineFleet, mode: str, tmp_path: Path) -> None:
    """Each step, each route for each stage, each decision on roles, through flips and an outage."""
    work = with_promises(crowd(40, output=12))
    work = replace(work, requests=tuple(r.at(1000 * r.id) for r in work.requests))
    down = (Outage(instance=InstanceId(0), start_us=8000, end_us=12_000),)
    how = restless(outages=down)
    run = engines.replay(work, how, config(async_scheduling=mode), Policies(Fcfs()), out=tmp_path / "run")
    found = parity(run)
    assert found.is_identical, found
    decisions = decisions_from(pq.read_table(run.path / DECISIONS_FILE, schema=DECISION_SCHEMA))
    assert found.num_decisions == len(decisions)
    kinds = Counter("roles" if d.request is None else d.stage for d in decisions)
    assert min(kinds[kind] for kind in ("roles", "prefill", "decode")) > 1, kinds
    changes = pq.read_table(run.path / ROLES_FILE).to_pylist()
    assert len(changes) > 3, "roles are given at the beginning, and change"
    assert {c["us"] for c in changes} == {d.now_us for d in decisions if d.heard is not None and d.chosen}


def test_roles_that_were_decided_otherwise_are_found(in_lockstep: EngineFleet, tmp_path: Path) -> None:
    """One recorded decision is changed; parity says which."""
    run = in_lockstep.replay(crowd(6), disaggregated(), config(), Policies(Fcfs()), out=tmp_path / "run")
    decisions = decisions_from(pq.read_table(run.path / DECISIONS_FILE, schema=DECISION_SCHEMA))
    assert decisions[0].chosen == "0 prefill, 1 decode, 2 decode"
    decisions[0] = replace(decisions[0], chosen="0 decode, 1 prefill, 2 decode")
    pq.write_table(decision_table(decisions), run.path / DECISIONS_FILE)
    found = parity(run)
    assert (found.is_identical, found.decision) == (False, 0)


def out_of_role(told: Served) -> set[tuple[str | None, str]]:
    return {(d.stage, d.out_of_role) for d in told.decisions if d.out_of_role is not None}


@pytest.mark.parametrize(("victim", "lacks"), [(0, "prefill"), (1, "decode")])
def test_without_anybody_of_its_role_another_serves(engines: EngineFleet, victim: int, lacks: str) -> None:
    """A side of one is killed: the others serve to the end, and the decisions say why."""
    work = crowd(24)
    num_prefill = 1 if victim == 0 else 2
    kills = {5: killer(engines, 0 if victim == 0 else 2)}
    records, told = serve(engines, work, disaggregated(num_prefill), config(), Killing(kills))
    assert tokens(records) == tokens(served(work, config(), Fcfs()))
    assert {stage for stage, _ in out_of_role(told)} == {lacks}


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))])
def test_whoever_is_killed_each_request_ends_once(engines: EngineFleet, seed: int) -> None:
    """One or two of three processes at drawn moments, roles static or changing: the right tokens, or failed."""
    rng, work = random.Random(seed), with_promises(crowd(24, output=10))
    failover = rng.choice(("requeue", "requeue", "cancel"))
    how = rng.choice((disaggregated(), disaggregated(2), restless()))
    how = replace(how, failover=make_policy("failover", failover))
    kills = {rng.randint(0, 15): killer(engines, victim) for victim in rng.sample(range(3), 1 + seed % 2)}
    records, _ = serve(engines, work, how, config(), Killing(kills))  # on wall time a kill may come after the end
    assert sorted(r.id for r in records.requests) == list(range(24))
    right = tokens(served(work, config(), Fcfs()))
    for record in records.requests:
        assert record.finish_reason in (FinishReason.LENGTH, FinishReason.FAILED)
        drawn = list(record.output_token_ids)
        assert drawn == right[record.id][: len(drawn)]
        if failover == "requeue":
            assert drawn == right[record.id]
