"""Engine processes behind a router: every request ends once, whoever is lost, and its tokens are one engine's."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.engine.test_engine_serving import config, crowd, served
from tests.laws import fleet_obeys_the_laws
from tests.small_runs import STEP_TIME
from tests.tiny_models import VOCAB_SIZE
from xllm_lab.decisions import DECISION_SCHEMA, DECISIONS_FILE, Delivery, decision_table, decisions_from
from xllm_lab.engine.cluster.fleet import EngineFleet, Served
from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FleetConfig, LinkConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.outages import Outage
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache.cost_aware import CostAware
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.routing import InstanceId
from xllm_lab.records import FinishReason, Records, StepRecord
from xllm_lab.sim.parity import parity
from xllm_lab.workload import LONGEST_US, ClosedLoop, RequestId, Workload

ROUTES = tuple(policies("route"))


def fleet(route: str = "round-robin", failover: str = "requeue", **changes: Any) -> FleetConfig:
    """Three instances that tell their loads every other millisecond, unless a test says otherwise."""
    usual = {"num_instances": 3, "heartbeat_us": 2000}
    made = {"route": make_policy("route", route, {}), "failover": make_policy("failover", failover, {})}
    return FleetConfig(**{**usual, **made, **changes})


def sessions(num_sessions: int = 6, num_turns: int = 4, gap_us: int = 30_000) -> Workload:
    """Conversations: each turn's prompt begins with that of the turn before, and comes when that has long ended."""
    requests = [
        replace(
            crowd(1).requests[0],
            id=RequestId(turn * num_sessions + session),
            arrival_us=turn * gap_us + 700 * session,
            prompt=replace(
                crowd(1).requests[0].prompt,
                num_tokens=24 * (turn + 1) + 3,
                block_hashes=tuple(100 * session + block for block in range(6 * (turn + 1))),
            ),
        )
        for turn in range(num_turns)
        for session in range(num_sessions)
    ]
    return Workload(requests=tuple(requests), seed=3)


def serve(
    engines: EngineFleet, work: Workload, how: FleetConfig, where: InstanceConfig, records: Records | None = None
) -> tuple[Records, Served]:
    """Served, and held to the laws."""
    kept = Records() if records is None else records
    told = engines.serve(work, how, where, Policies(Fcfs()), kept)
    as_it_was = replace(how, outages=outages_of(told.deliveries))
    fleet_obeys_the_laws(work, as_it_was, where, kept.sort(), vocab_size=VOCAB_SIZE)
    return kept, told


def outages_of(deliveries: Sequence[Delivery]) -> tuple[Outage, ...]:
    """Those that were configured, and those that were not."""
    downs: list[Outage] = []
    for met in deliveries:
        if met.kind == "down":
            downs.append(Outage(instance=met.instance, start_us=met.us, end_us=LONGEST_US))
        elif met.kind == "up":
            ended = [d for d in downs if d.instance == met.instance and d.end_us == LONGEST_US]
            downs = [d for d in downs if d not in ended] + [replace(d, end_us=met.us) for d in ended]
    return tuple(downs)


def tokens(records: Records) -> dict[int, list[int]]:
    return {r.id: list(r.output_token_ids) for r in records.requests}


@pytest.mark.parametrize("route", ROUTES)
def test_tokens_are_one_engines_whatever_the_routing(engines: EngineFleet, route: str) -> None:
    """And each request has one record, from the instance that its decision names."""
    work = crowd(24)
    records, told = serve(engines, work, fleet(route), config())
    assert tokens(records) == tokens(served(work, config(), Fcfs()))
    sent = {d.request.id: int(d.chosen) for d in told.decisions if d.request is not None}
    assert sent == {r.id: r.instance for r in records.requests}
    assert sum(len(s.ids) for s in records.steps) > 0


@pytest.mark.parametrize("mode", ["off", "on", "length_aware"])
def test_a_run_is_decided_alike_by_the_simulator(engines: EngineFleet, mode: str, tmp_path: Path) -> None:
    """Every step of every instance, every decision of the router, through an outage."""
    down = (Outage(instance=InstanceId(1), start_us=2000, end_us=6000),)
    how = fleet("prefix-affinity", outages=down)
    run = engines.replay(crowd(24), how, config(async_scheduling=mode), Policies(Fcfs()), out=tmp_path / "run")
    found = parity(run)
    assert found.is_identical, found
    assert found.num_steps == len(run.records.steps) > 0
    assert found.num_decisions >= 24


def test_a_router_that_decided_otherwise_is_found(in_lockstep: EngineFleet, tmp_path: Path) -> None:
    """One recorded decision is changed; parity says which."""
    run = in_lockstep.replay(crowd(9), fleet("least-loaded"), config(), Policies(Fcfs()), out=tmp_path / "run")
    decisions = decisions_from(pq.read_table(run.path / DECISIONS_FILE, schema=DECISION_SCHEMA))
    decisions[4] = replace(decisions[4], chosen=str((int(decisions[4].chosen) + 1) % 3))
    pq.write_table(decision_table(decisions), run.path / DECISIONS_FILE)
    found = parity(run)
    assert (found.is_identical, found.decision) == (False, 4)


def test_an_instance_that_decided_otherwise_is_found(in_lockstep: EngineFleet, tmp_path: Path) -> None:
    """Another batch policy parts ways somewhere, and parity says on which instance."""
    run = in_lockstep.replay(crowd(24), fleet(), config(), Policies(Fcfs()), out=tmp_path / "run")
    found = parity(run, policies=Policies(make_policy("batch", "decode-first", {"max_tokens_per_chunk": 8})))
    assert not found.is_identical
    assert found.instance is not None


def test_lockstep_does_not_depend_on_who_is_faster(in_lockstep: EngineFleet) -> None:
    """Requests far apart: nothing that happens on one instance can change what another one does."""
    work = crowd(9)
    apart = replace(work, requests=tuple(r.at(40_000 * r.id) for r in work.requests))
    runs = [serve(in_lockstep, apart, fleet("least-loaded"), config())[0] for _ in range(2)]
    placed = [[(r.id, r.instance, r.cached_tokens) for r in records.requests] for records in runs]
    assert placed[0] == placed[1]
    assert tokens(runs[0]) == tokens(runs[1])


def test_a_link_takes_its_time_in_lockstep(in_lockstep: EngineFleet) -> None:
    """No request is looked at before its bytes are there; real links are not to be told how slow they are."""
    link = LinkConfig(latency_us=5000)
    records, _ = serve(in_lockstep, crowd(6), fleet(link=link), config())
    waited = [r.first_scheduled_us - r.arrival_us for r in records.requests if r.first_scheduled_us is not None]
    assert len(waited) == 6
    assert min(waited) >= 5000


def test_a_policy_without_its_times_is_refused(in_lockstep: EngineFleet) -> None:
    """Before anything is sent; the fleet serves on."""
    policies = Policies(Fcfs(), cache=CostAware())
    with pytest.raises(ConfigError, match=r"cache policy cost-aware needs copy times; accepted: a machine's"):
        in_lockstep.serve(crowd(2), fleet(), config(), policies, Records(), step_time=STEP_TIME)
    records, _ = serve(in_lockstep, crowd(2), fleet(), config())
    assert len(records.requests) == 2


def test_real_links_are_not_configured(in_real_time: EngineFleet) -> None:
    """In one line."""
    with pytest.raises(ConfigError, match=r"\[link\] on clock 'wall'"):
        in_real_time.serve(crowd(2), fleet(link=LinkConfig(latency_us=5)), config(), Policies(Fcfs()), Records())


def test_clients_in_a_closed_loop_are_served(engines: EngineFleet) -> None:
    """The router learns of each end, and its client goes on."""
    work = replace(crowd(15), closed_loop=ClosedLoop(num_clients=4, think_us=100))
    records, _ = serve(engines, work, fleet("least-loaded"), config())
    assert [r.finish_reason for r in records.requests] == [FinishReason.LENGTH] * 15


def test_loads_may_be_told_after_every_step(engines: EngineFleet) -> None:
    """A heartbeat period of 0: the router's figures are those of the latest plan, and spread simultaneous requests."""
    records, told = serve(engines, crowd(18), fleet("prefix-affinity", heartbeat_us=0), config())
    assert len({r.instance for r in records.requests}) == 3
    assert all(i.as_of_us == d.now_us for d in told.decisions for i in d.instances or ())


def test_clients_may_go_away(engines: EngineFleet) -> None:
    """Before, while and after they are served; those that stay get all their tokens."""
    work = crowd(18)
    leaving = tuple(replace(r, cancel_us=r.arrival_us + (1 + r.id) * 300) if r.id % 2 else r for r in work.requests)
    records, _ = serve(engines, replace(work, requests=leaving), fleet(), config())
    stayed = [r for r in records.requests if r.id % 2 == 0]
    assert all(r.finish_reason is FinishReason.LENGTH for r in stayed)


def test_an_instance_comes_back_empty(engines: EngineFleet) -> None:
    """An outage of a cluster file kills the process; another incarnation takes its place, and serves."""
    down = (Outage(instance=InstanceId(0), start_us=1500, end_us=4000),)
    late = crowd(30)
    late = replace(late, requests=tuple(r.at(r.arrival_us if r.id < 15 else 5_000_000) for r in late.requests))
    records, told = serve(engines, late, fleet(outages=down), config())
    assert [d.kind for d in told.deliveries if d.instance == 0 and d.request is None] == ["up", "down", "up"]
    assert tokens(records) == tokens(served(late, config(), Fcfs()))
    assert {r.instance for r in records.requests if r.id >= 15} == {0, 1, 2}


class Killing(Records):
    """Records that kill an engine process, as `kill -9` does, when so many steps were recorded."""

    def __init__(self, kills: dict[int, Callable[[], None]]) -> None:
        super().__init__()
        self._kills = kills

    @property
    def steps(self) -> list[StepRecord]:
        for num_steps in [n for n in self._kills if n <= len(self._steps)]:
            self._kills.pop(num_steps)()
        return super().steps


def killer(engines: EngineFleet, instance: int, how: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    def kill() -> None:
        pid = engines.process_ids.get(InstanceId(instance))
        if pid is not None:
            os.kill(pid, how)

    return kill


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("failover", ["requeue", "cancel"])
def test_whoever_is_killed_each_request_ends_once(engines: EngineFleet, failover: str, seed: int) -> None:
    """One or two of three processes, at moments drawn by the seed: finished with the right tokens, or failed."""
    rng, work = random.Random(seed), crowd(24)
    victims = rng.sample(range(3), 1 + seed % 2)
    kills = {rng.randint(0, 12): killer(engines, victim) for victim in victims}
    records, told = serve(engines, work, fleet("least-loaded", failover), config(), Killing(kills))
    assert sorted(r.id for r in records.requests) == list(range(24))
    right = tokens(served(work, config(), Fcfs()))
    for record in records.requests:
        assert record.finish_reason in (FinishReason.LENGTH, FinishReason.FAILED)
        drawn = list(record.output_token_ids)
        assert drawn == right[record.id][: len(drawn)]
        if failover == "requeue":
            assert drawn == right[record.id]
    assert len([d for d in told.deliveries if d.kind == "down"]) >= 1


def test_with_nobody_left_everything_ends(engines: EngineFleet) -> None:
    """All three are killed: what is there fails, and what comes later fails, too; nothing waits for ever."""
    kills = {4 + k: killer(engines, k) for k in range(3)}
    records, _ = serve(engines, crowd(24), fleet(), config(), Killing(kills))
    assert len(records.requests) == 24
    assert FinishReason.FAILED in {r.finish_reason for r in records.requests}


def test_a_process_that_hangs_loses_its_lease(in_lockstep: EngineFleet) -> None:
    """It is stopped, not dead: no connection breaks, and it is given up when its lease ends."""
    kills = {3: killer(in_lockstep, 1, signal.SIGSTOP)}
    records, told = serve(in_lockstep, crowd(12), fleet(), config(), Killing(kills))
    assert [r.finish_reason for r in records.requests] == [FinishReason.LENGTH] * 12
    assert [d.instance for d in told.deliveries if d.kind == "down"] == [1]


def test_sessions_find_their_prefixes_where_they_were_computed(in_lockstep: EngineFleet) -> None:
    """Affinity brings every turn back to its instance; turns by turns do not, and the score finds the whole prompt."""
    work = replace(sessions(5), seed=3)
    hits = {}
    for route in ROUTES:
        records, _ = serve(in_lockstep, work, fleet(route), config(num_kv_blocks=256))
        hits[route] = sum(r.cached_tokens for r in records.requests)
    assert hits["prefix-affinity"] > hits["round-robin"]
    assert hits["cache-aware-corrected"] > hits["round-robin"]
