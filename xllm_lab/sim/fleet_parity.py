"""Parity of an engine's fleet: every life of every instance scheduled anew, every decision of the router taken anew.

an instance's life      from the moment in which it comes up to its end, or to its failure: what it met and when it
                        looked is in deliveries.parquet, how long its steps took in steps.parquet
a router's decision     decisions.parquet has the view that it was taken on
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import simpy

from xllm_lab.copies import CopyRecord
from xllm_lab.decisions import (
    DECISION_SCHEMA,
    DECISIONS_FILE,
    DELIVERIES_FILE,
    DELIVERY_SCHEMA,
    DOWN,
    LEAVES,
    PREFILLS,
    UP,
    Delivery,
    FleetDecision,
    SeenFailover,
    SeenRoles,
    SeenRoute,
    decisions_from,
    deliveries_from,
    roles_text,
)
from xllm_lab.errors import PolicyError
from xllm_lab.fleet_config import FleetConfig, fleet_config
from xllm_lab.policies.draft import METHODS
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.routing import ById
from xllm_lab.records import Records, RequestRecord, StepRecord
from xllm_lab.request_state import new_record
from xllm_lab.runs import Run, read_parquet
from xllm_lab.scheduler_of import scheduler_of
from xllm_lab.serving import Event, serve
from xllm_lab.sim.copies import SimulatedCopies
from xllm_lab.sim.instance import Instance
from xllm_lab.sim.parity import DifferenceError, Parity, Recorded, RouterDecision, as_it_arrived, decision_of_record
from xllm_lab.workload import Request, RequestId, TokenIds, prompt_token_ids


@dataclass(slots=True)
class Life:
    """One incarnation of an instance.

    Attributes:
        down_us: when it failed; None if it did not.
        met: what it looked at, in order.
    """

    instance: int
    up_us: int
    down_us: int | None = None
    met: list[Delivery] = field(default_factory=list)

    def has(self, step: StepRecord) -> bool:
        """Whether a step is its."""
        return self.covers(step.instance, step.start_us)

    def covers(self, instance: int, us: int) -> bool:
        """Whether what an instance did then is its."""
        return instance == self.instance and self.up_us <= us and (self.down_us is None or us < self.down_us)


class Met:
    """A `Feed` of what an instance met, at the times when it looked."""

    def __init__(self, events: Iterable[tuple[int, Event]]) -> None:
        self._events = deque(events)

    @property
    def next_us(self) -> int | None:
        return self._events[0][0] if self._events else None

    @property
    def is_over(self) -> bool:
        return not self._events

    def pop_due(self, now_us: int) -> Event | None:
        return self._events.popleft()[1] if self._events and self._events[0][0] <= now_us else None

    def on_end(self, request: RequestId, now_us: int) -> None:
        """Who comes next is known."""

    def on_handover(self, request: Request, record: RequestRecord, now_us: int) -> None:
        """Where it goes on is another life."""


class RecordedLife(Recorded):
    """As `Recorded`; it is known when the engine looked."""

    def wake_us(self, until_us: int) -> int:
        return until_us


def fleet_parity(run: Run, *, policies: Policies | None = None) -> Parity:
    """Compare an engine fleet's decisions with the simulator's on the same deliveries, step times, tokens and views.

    Args:
        policies: as of `parity`; the router's are the run's own.

    Raises:
        RunError: the run does not say what its router saw.
    """
    assert run.manifest.fleet is not None, "a fleet's run"
    deliveries = deliveries_from(read_parquet(run.path / DELIVERIES_FILE, DELIVERY_SCHEMA))
    decisions = decisions_from(read_parquet(run.path / DECISIONS_FILE, DECISION_SCHEMA))
    num_steps = len(run.records.steps)
    requests = {r.id: r for r in as_it_arrived(run.workload, run.records).requests}
    for life in lives_of(deliveries):
        differs = _life_differs(run, policies or run.manifest.instance_policies(), life, requests)
        if differs is not None:
            return differs
    found = Parity(num_steps=num_steps, num_decisions=len(decisions))
    for number, (routed, again) in enumerate(_routed_again(fleet_config(run.manifest.fleet), decisions)):
        if routed != again:
            return replace(found, decision=number, routed=routed, routed_again=again)
    return found


def lives_of(deliveries: Sequence[Delivery]) -> list[Life]:
    """Lives in order of their beginnings."""
    present: dict[int, Life] = {}
    lives: list[Life] = []
    for met in deliveries:
        if met.kind == UP:
            present[met.instance] = Life(met.instance, met.us)
            lives.append(present[met.instance])
        elif met.kind == DOWN:
            present[met.instance].down_us = met.us
        else:
            present[met.instance].met.append(met)
    return lives


def _life_differs(run: Run, policies: Policies, life: Life, requests: Mapping[RequestId, Request]) -> Parity | None:
    """The first step that was decided otherwise, if there is one."""
    manifest, config = run.manifest, run.manifest.instance_config()
    steps, copies = _of_life(run.records, life)
    feed = Met(_events(life, requests, {r.id: r for r in run.records.requests}))
    recorded = RecordedLife(
        Records(run.records.requests, steps, copies),
        methods=METHODS if manifest.drafts is None else manifest.drafts["methods"],
        has_store=manifest.store is not None,
    )
    env = simpy.Environment(initial_time=life.up_us)
    copier = SimulatedCopies(env, recorded.links(config.block_size), has_store=recorded.has_store)
    scheduler = scheduler_of(
        *(config, policies, Records()),
        proposer=recorded,
        copier=copier,
        step_time=manifest.step_time_model(),
        draft_time=manifest.draft_time_model(),
        copy_time=manifest.copy_time_model(),
        instance=life.instance,
    )

    def prompt_ids(request: Request) -> TokenIds:
        return prompt_token_ids(request, vocab_size=manifest.model["vocab_size"], seed=run.workload.seed)

    Instance(env, serve(scheduler, feed, prompt_ids, start_us=life.up_us), recorded, feed, copies=copier)
    at, simulator = None, None
    try:
        env.run()
    except DifferenceError as difference:
        at, simulator = difference.args
    except PolicyError:
        pass  # it gave up before the engine did; the count below says where
    if recorded.num_replayed == len(steps) and (at is None or life.down_us is not None):
        return None  # of one that failed, the next step never was
    at = recorded.num_replayed if at is None else at
    engine = decision_of_record(steps[at]) if at < len(steps) else None
    index = steps[at].step if at < len(steps) else len(steps)
    return Parity(
        num_steps=len(run.records.steps), step=index, engine=engine, simulator=simulator, instance=life.instance
    )


def _of_life(records: Records, life: Life) -> tuple[list[StepRecord], list[CopyRecord]]:
    """Its steps and copies, and these numbered from 0."""
    steps = [step for step in records.steps if life.has(step)]
    copies = [c for c in records.copies if life.covers(c.instance, c.asked_us)]
    first = copies[0].copy if copies else steps[0].num_copies if steps else 0
    return (
        [replace(step, num_copies=step.num_copies - first) for step in steps],
        [replace(copy, copy=copy.copy - first) for copy in copies],
    )


def _events(
    life: Life, requests: Mapping[RequestId, Request], records: Mapping[RequestId, RequestRecord]
) -> Iterator[tuple[int, Event]]:
    for us, _, kind, request_id in life.met:
        assert request_id is not None, f"{kind} of no request"
        request = requests[request_id]
        if kind == LEAVES:
            yield us, Event(False, request)
        else:
            yield us, Event(True, request, _as_it_came(request, records[request_id], us), hands_over=kind == PREFILLS)


def _as_it_came(request: Request, ended: RequestRecord, us: int) -> RequestRecord:
    """The record of a request that came with the tokens that it had, from an instance before."""
    record = new_record(request)
    num_tokens = bisect_right(ended.token_times_us, us)
    record.token_times_us = array("q", ended.token_times_us[:num_tokens])
    record.output_token_ids = array("i", ended.output_token_ids[:num_tokens])
    return record


def _routed_again(
    fleet: FleetConfig, decisions: Sequence[FleetDecision]
) -> Iterator[tuple[RouterDecision, RouterDecision]]:
    """Of each decision, the recorded one and the one that the policy takes on the recorded view."""
    for d in decisions:
        if d.request is None:
            assert d.instances is not None, "a decision on roles"
            assert d.heard is not None, "a decision on roles"
            roles = fleet.roles.decide(SeenRoles(d.now_us, ById(d.instances), d.heard))
            again = RouterDecision(roles_text(roles), roles.reason)
        elif d.instances is None:
            lost = fleet.failover.decide(SeenFailover(d.now_us, d.request, d.num_up_instances))
            again = RouterDecision(lost.action, lost.reason)
        else:
            assert d.num_routed is not None, "a routing decision"
            assert d.block_size is not None, "a routing decision"
            assert d.stage is not None, "a routing decision"
            up = ById(d.instances)
            plan = fleet.route.decide(SeenRoute(d.now_us, d.request, d.stage, d.num_routed, d.block_size, up))
            again = RouterDecision(str(plan.instance), plan.reason)
        yield RouterDecision(d.chosen, d.reason), again
