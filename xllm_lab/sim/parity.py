"""One policy, two hosts: feed an engine run's arrivals and step times to the simulator and compare every decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

from xllm_lab.copies import Copy, CopyEnd, CopyRecord
from xllm_lab.drafting import Asked
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.expert_records import ExpertsRecord
from xllm_lab.policies.draft import METHODS
from xllm_lab.policies.of_instance import Policies
from xllm_lab.rebalancing import Change, ExpertLayout, layout_from
from xllm_lab.records import FinishReason, Records, RequestRecord, StepRecord, flat
from xllm_lab.request_state import placeholder
from xllm_lab.runs import Run
from xllm_lab.scheduler import Sampled
from xllm_lab.sim.instance import Stretch
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.step import PageMoves, Step
from xllm_lab.workload import RequestId, Workload

_ON_EXPERTS = "on places of experts"


class AskedCopy(NamedTuple):
    """What was decided of a copy between tiers."""

    asked_us: int
    kind: str
    request: int | None
    blocks: tuple[int, ...]
    slots: tuple[int, ...]


class Decision(NamedTuple):
    """What parity compares: everything the scheduler decided for a step, and when."""

    start_us: int
    tokens: tuple[tuple[int, int, int], ...]  # (id, num_tokens, num_computed_tokens)
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]
    reason: str
    graph_tokens: int | None = None
    drafts: tuple[tuple[int, str, int, int], ...] = ()  # (id, method, asked for, made)
    pages: tuple[tuple[int, ...], ...] = ()  # mapped before, mapped beside, unmapped; as records have them
    copies: tuple[AskedCopy, ...] = ()  # since the step before was planned


class RouterDecision(NamedTuple):
    """What parity compares beside steps: the instance, action, or places of experts that were chosen, and why."""

    chosen: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """The outcome. `step` is the first that differs, with what each host decided; `None` if all are identical.

    Attributes:
        instance: of a fleet, whose step it is.
        num_decisions: of a fleet's router, or on experts, all alike if `decision` is None, which else is the first that
            differs: `routed` as it was recorded, `routed_again` as the policy takes it on the same view.
        of: what was decided so.
    """

    num_steps: int
    step: int | None = None
    engine: Decision | None = None
    simulator: Decision | None = None
    instance: int | None = None
    num_decisions: int = 0
    decision: int | None = None
    routed: RouterDecision | None = None
    routed_again: RouterDecision | None = None
    of: str = "of the router"

    @property
    def is_identical(self) -> bool:
        return self.step is None and self.decision is None


class RecordedMover:
    """A `Mover` whose devices are ready when an engine's were."""

    def __init__(self, layout: ExpertLayout, decisions: Sequence[ExpertsRecord]) -> None:
        self._layout, self._decisions = layout, decisions
        self._number: int | None = None

    @property
    def layout(self) -> ExpertLayout:
        return self._layout

    @property
    def row_units(self) -> int:
        return 1

    @property
    def next_us(self) -> int | None:
        return None

    def prepare(self, change: Change, now_us: int) -> None:
        self._number = change.number

    def ready_us(self, now_us: int) -> int | None:
        if self._number is None or self._number >= len(self._decisions):
            return None
        ready_us = self._decisions[self._number].ready_us
        return None if ready_us is None or ready_us > now_us else ready_us

    def drop(self, now_us: int) -> None:
        self._number = None


class DifferenceError(Exception):
    """`args` are the step's index and its `Decision`: SimPy raises what a process raised anew, from its args alone."""


class Recorded:
    """An engine run's times, drafts and tokens as a simulated host's answers; stops at the first decision that differs.

    Args:
        methods: of drafting, those that the engine had.
        has_store: whether it had a store below the host.
        layout: of its experts, if they were divided; what it counted of them and decided is in the records.
    """

    def __init__(
        self,
        records: Records,
        *,
        methods: Sequence[str] = METHODS,
        has_store: bool = False,
        layout: ExpertLayout | None = None,
    ) -> None:
        self._layout, self._decisions = layout, records.decisions
        self._loads = {load.end_us: load.slot_tokens_LP for load in records.expert_loads}
        self.methods, self._has_store = methods, has_store
        self._steps = records.steps
        self._requests = {r.id: r for r in records.requests}
        self._over_us = max((r.finish_us or 0 for r in records.requests), default=0)
        self._next = 0
        self._copies = records.copies
        self.asked: list[AskedCopy] = []

    @property
    def proposer(self) -> Recorded:
        return self

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        """As many as the engine had; none where it did not ask, which the decision will show."""
        step = self._steps[self._next] if self._next < len(self._steps) else None
        made = {} if step is None else dict(zip(step.draft_ids, step.num_drafted, strict=True))
        return [(placeholder(a.state.id),) * min(made.get(a.state.id, 0), a.depth) for a in asked]

    def forget(self, request: RequestId) -> None:
        """Nothing is kept of it."""

    def links(self, block_size: int) -> Recorded:
        self._block_size = block_size
        return self

    @property
    def has_store(self) -> bool:
        return self._has_store

    def mover(self) -> RecordedMover | None:
        return None if self._layout is None else RecordedMover(self._layout, self._decisions)

    def fail(self, now_us: int) -> None:
        """A life ends there."""

    def end_of(self, copy: Copy, now_us: int) -> CopyEnd | None:
        """As recorded; that it was another copy, the next step will show."""
        self.asked.append(AskedCopy(now_us, copy.kind, copy.request, copy.blocks, copy.slots))
        known = self._copies[copy.number] if copy.number < len(self._copies) else None
        if known is None or known.end_us is None or known.num_moved_tokens is None:
            return None
        return CopyEnd(copy.number, known.end_us, known.num_moved_tokens // self._block_size)

    @property
    def num_replayed(self) -> int:
        """Steps that were decided alike so far."""
        return self._next

    def wake_us(self, until_us: int) -> int:
        # A real host oversleeps; it looked again when it asked for its next copy, or its next step started, or, without
        # one, when all had ended: a request may have come and gone while it slept.
        looked_us = self.next_decision_us
        return max(until_us, self._over_us if looked_us is None else looked_us)

    @property
    def next_decision_us(self) -> int | None:
        """When the engine planned its next step, or asked for its next copy; None if it did neither any more."""
        planned = [s.start_us for s in self._steps[self._next : self._next + 1]]
        asked = [c.asked_us for c in self._copies[len(self.asked) : len(self.asked) + 1]]
        return min(planned + asked, default=None)

    def stretch(self, step: Step) -> Stretch:
        decided = _decision_of_step(step)._replace(copies=self._asked_for(step.index, step.num_copies))
        if self._next == len(self._steps) or self.recorded_decision(self._next) != decided:
            raise DifferenceError(step.index, decided)
        self._next += 1
        # All that was counted since it was recorded last: only sums over recorded stretches decide anything.
        step.expert_rows_LP = self._loads.get(self._steps[step.index].end_us)
        return Stretch((self._steps[step.index].end_us,), (False,))

    def recorded_decision(self, index: int) -> Decision:
        """The engine's for a step, and the copies that it asked for since the one before."""
        step = self._steps[index]
        first = self._steps[index - 1].num_copies if index else 0
        copies = tuple(map(_asked_copy, self._copies[first : step.num_copies]))
        return decision_of_record(step)._replace(copies=copies)

    def _asked_for(self, index: int, num_copies: int) -> tuple[AskedCopy, ...]:
        first = self._steps[index - 1].num_copies if index else 0
        return tuple(self.asked[first:num_copies])

    def ran(self, stretch: Stretch) -> None:
        """Recorded times extrapolate nothing."""

    def sampled(self, step: Step) -> Mapping[RequestId, Sampled]:
        record = self._steps[step.index]
        kept = dict(zip(record.draft_ids, record.num_accepted, strict=True))
        rejected = {d.id: len(d.token_ids) - kept[d.id] for d in step.drafts}
        return {
            c.id: _drawn(
                self._requests[c.id],
                c.num_computed_tokens + c.num_tokens - rejected.get(c.id, 0),
                kept.get(c.id, 0),
            )
            for c in step.chunks
            if c.samples
        }


def parity(run: Run, *, policies: Policies | None = None) -> Parity:
    """Compare an engine run's decisions with the simulator's on the same arrivals, step times and tokens.

    Args:
        policies: decide in the simulator instead of the run's own, to see where they would part ways.

    Raises:
        ConfigError: the run is not an engine's.
    """
    if run.manifest.host != "engine":
        raise ConfigError(f"{run.path}: is a {run.manifest.host} run; accepted: an engine run")
    if run.manifest.fleet is not None:
        from xllm_lab.sim.fleet_parity import fleet_parity  # which needs what stands here

        return fleet_parity(run, policies=policies)
    records = run.records
    # Where the engine did not speculate, a policy that would may choose from all.
    methods = METHODS if run.manifest.drafts is None else run.manifest.drafts["methods"]
    layout = None if run.manifest.expert_layout is None else layout_from(run.manifest.expert_layout)
    recorded = Recorded(records, methods=methods, has_store=run.manifest.store is not None, layout=layout)
    again = Records()
    try:
        again = run_simulation(
            as_it_arrived(run.workload, records),
            run.manifest.instance_config(),
            policies or run.manifest.instance_policies(),
            recorded,
            vocab_size=run.manifest.model["vocab_size"],
            step_time=run.manifest.step_time_model(),
            draft_time=run.manifest.draft_time_model(),
            copy_time=run.manifest.copy_time_model(),
        )
    except DifferenceError as difference:
        step, simulator = difference.args
        engine = recorded.recorded_decision(step) if step < len(records.steps) else None
        return Parity(num_steps=len(records.steps), step=step, engine=engine, simulator=simulator)
    except PolicyError:
        pass  # it gave up before the engine did; the count below says where
    step = recorded.num_replayed
    if step < len(records.steps):
        return Parity(num_steps=len(records.steps), step=step, engine=recorded.recorded_decision(step))
    if recorded.asked != [*map(_asked_copy, records.copies)]:  # behind the last step
        return Parity(num_steps=len(records.steps), step=step)
    return _of_experts(len(records.steps), records.decisions, again.decisions)


def _of_experts(num_steps: int, engine: Sequence[ExpertsRecord], simulator: Sequence[ExpertsRecord]) -> Parity:
    """All steps are alike; so may be where experts were put, when and why."""
    for number, (own, other) in enumerate(zip_longest(engine, simulator)):
        if own != other:
            return Parity(
                num_steps=num_steps,
                num_decisions=len(engine),
                decision=number,
                routed=_said(own),
                routed_again=_said(other),
                of=_ON_EXPERTS,
            )
    return Parity(num_steps=num_steps, num_decisions=len(engine), of=_ON_EXPERTS)


def _said(decision: ExpertsRecord | None) -> RouterDecision | None:
    if decision is None:
        return None
    d = decision
    what = f"layers {d.layers} slots {d.slots}" if d.layers else "experts stay"
    came = f"ready {d.ready_us}, step {d.active_step} at {d.active_us}, given up {d.dropped_us}"
    return RouterDecision(what, f"{d.reason}; decided {d.decided_us} us, {came}")


def _drawn(request: RequestRecord, num_tokens: int, num_accepted: int) -> Sampled:
    """What followed the first `num_tokens` tokens of a request, of which the last `num_accepted` were drafts."""
    position = num_tokens - request.prompt_tokens
    # A request that ended or was cancelled while its step ran drew a token that nobody kept.
    if position >= request.output_tokens:
        return Sampled(-1, accepted=(-1,) * num_accepted)
    is_last = position == request.output_tokens - 1
    accepted = request.output_token_ids[position - num_accepted : position]
    return Sampled(request.output_token_ids[position], is_last and request.finish_reason is FinishReason.STOP, accepted)


def as_it_arrived(workload: Workload, records: Records) -> Workload:
    """The workload with the arrivals of a run, which in a closed loop are known only afterwards."""
    arrival_us = {r.id: r.arrival_us for r in records.requests}

    moved = tuple(request.at(arrival_us[request.id]) for request in workload.requests)
    return replace(workload, requests=moved, closed_loop=None)


def _asked_copy(copy: CopyRecord) -> AskedCopy:
    return AskedCopy(copy.asked_us, copy.kind, copy.request, tuple(copy.blocks), tuple(copy.slots))


def _decision_of_step(step: Step) -> Decision:
    tokens = tuple((int(c.id), c.num_tokens, c.num_computed_tokens) for c in step.chunks)
    graph_tokens = step.shape.num_tokens
    drafts = tuple((int(d.id), d.method, d.num_asked, len(d.token_ids)) for d in step.drafts)
    moves = step.pages or PageMoves()
    pages = tuple(tuple(flat(runs)) for runs in (moves.maps, moves.ahead, moves.unmaps))
    return Decision(
        step.start_us, tokens, tuple(step.admitted), tuple(step.preempted), step.reason, graph_tokens, drafts, pages
    )


def decision_of_record(step: StepRecord) -> Decision:
    """What an engine decided for a step."""
    tokens = tuple(zip(step.ids, step.num_tokens, step.num_computed_tokens, strict=True))
    admitted, preempted, graph_tokens = tuple(step.admitted), tuple(step.preempted), step.graph_tokens
    drafts = tuple(zip(step.draft_ids, step.draft_methods, step.num_asked, step.num_drafted, strict=True))
    pages = (tuple(step.page_maps), tuple(step.page_maps_ahead), tuple(step.page_unmaps))
    return Decision(step.start_us, tokens, admitted, preempted, step.reason, graph_tokens, drafts, pages)
