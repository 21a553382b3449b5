"""Where the experts of one instance lie, and how that changes while it serves: deciding and doing apart.

    a step is over      its tokens per slot are counted; where an interval ends, the policy is asked
    it wants a change   check; the mover copies what changes beside the steps         --> prepared on every device
    a step is planned   prepared, and it only decodes: the step and those behind it run with the experts where they
                        are to be; not prepared in time: the change is dropped, and nothing was ever different

Both hosts drive this one. Steps that were planned ahead of the change run, and are counted, where experts were before.
While a change is under way the policy is not asked.
"""

# Shapes: L layers with experts, E experts, P slots of all devices of a layer

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Protocol

import numpy as np

from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.expert_records import Counts, ExpertLoadRecord, ExpertsRecord
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.experts import RECENT_WINDOWS, ExpertsPlan, ExpertsPolicy, LayerId
from xllm_lab.policies.experts.placement import contiguous
from xllm_lab.policies.experts.static import STATIC
from xllm_lab.policies.experts_checks import experts_violations
from xllm_lab.records import Recorder
from xllm_lab.step import Step, StepExperts

# xLLM's `eplb_prepare_timeout_seconds` at 3906f5a.
PREPARE_TIMEOUT_US = 30_000_000
# Loads are recorded at least so often, however long the policy's interval is: another one may be tried on them.
RECORD_US = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """Who shares the experts of a model.

    Attributes:
        layers: those with experts, by their number in the model.
        num_groups: of neighbouring experts, among which the router chooses first.
        num_devices, num_nodes: each node has neighbouring devices.
        expert_bytes: weights of one expert in one layer.
        copy_us: time to bring them to a device; None if nobody knows.
        num_redundant_experts: slots that each device has beside those that hold every expert once; None: as many as
            the policy wants.
        prepare_timeout_us: a change that some device is not ready for by then is given up.

    Raises:
        ConfigError: experts or devices that do not divide evenly.
    """

    layers: tuple[int, ...]
    num_experts: int
    num_devices: int
    expert_bytes: int
    num_groups: int = 1
    num_nodes: int = 1
    copy_us: float | None = None
    num_redundant_experts: int | None = None
    prepare_timeout_us: int = PREPARE_TIMEOUT_US

    def __post_init__(self) -> None:
        for whole, of, part in (("experts", "devices", "num_devices"), ("experts", "groups", "num_groups")):
            if getattr(self, part) < 1 or self.num_experts % getattr(self, part):
                raise ConfigError(f"{self.num_experts} {whole} on {getattr(self, part)} {of}, a divisor is accepted")
        if self.num_nodes < 1 or self.num_devices % self.num_nodes:
            raise ConfigError(f"{self.num_devices} devices on {self.num_nodes} nodes, a divisor is accepted")

    def first_slots(self, wanted: int) -> tuple[tuple[int, ...], ...]:
        """Of each layer, before anything is known.

        Args:
            wanted: redundant slots of each device, as the policy says.

        Raises:
            ConfigError: redundant experts have no place.
        """
        try:
            first = contiguous(self.num_experts, self.num_devices, self.num_redundant(wanted))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return (first,) * len(self.layers)

    def num_redundant(self, wanted: int) -> int:
        """Slots of each device beside those that hold every expert once."""
        return wanted if self.num_redundant_experts is None else self.num_redundant_experts


def describe_experts(layout: ExpertLayout, wanted: int, decisions: Sequence[ExpertsRecord]) -> dict[str, Any]:
    """For manifests: who shares the experts, the memory of slots beside one for each, and what became of decisions.

    Args:
        wanted: redundant slots of each device, as the policy says.
    """
    redundant = layout.num_redundant(wanted)
    return {
        **asdict(layout),
        "layers": list(layout.layers),
        "num_redundant_experts": redundant,
        "redundant_bytes": redundant * len(layout.layers) * layout.expert_bytes,
        "counts": {
            "decisions": len(decisions),
            "changes": sum(d.active_step is not None for d in decisions),
            "dropped": sum(d.dropped_us is not None for d in decisions),
            "moved_slots": sum(d.num_moved_slots for d in decisions),
            "copied_bytes": sum(d.copied_bytes for d in decisions),
        },
    }


def layout_from(described: Mapping[str, Any]) -> ExpertLayout:
    """The layout in what `describe_experts` says."""
    names = {f.name for f in fields(ExpertLayout)}
    known = {name: value for name, value in described.items() if name in names}
    return ExpertLayout(**{**known, "layers": tuple(known["layers"])})


def placements(
    layout: ExpertLayout, num_redundant_experts: int, decisions: Sequence[ExpertsRecord]
) -> list[tuple[tuple[int, ...], ...]]:
    """Of each placement that held in a run, in order, the slots of every layer."""
    found = [layout.first_slots(num_redundant_experts)]
    for decision in decisions:
        if decision.active_step is not None:
            size = len(found[0][0])
            new = {layer: tuple(decision.slots[k * size : (k + 1) * size]) for k, layer in enumerate(decision.layers)}
            found.append(tuple(new.get(layer, own) for layer, own in zip(layout.layers, found[-1], strict=True)))
    return found


class Move(NamedTuple):
    """A slot that gets the weights of another expert; `layer` is a row of the layout's layers."""

    layer: int
    slot: int
    expert: int


class Change(NamedTuple):
    """New places: which decision it was, the slots of every layer from then on, and what is copied for that."""

    number: int
    slots: tuple[tuple[int, ...], ...]
    moves: tuple[Move, ...]


class Mover(Protocol):
    """A host that copies experts beside its steps. One change at a time."""

    @property
    def layout(self) -> ExpertLayout: ...
    @property
    def row_units(self) -> int:
        """What a row counts for in `Step.expert_rows_LP`: more than 1 where rows are expected ones, with fractions."""
        ...

    def prepare(self, change: Change, now_us: int) -> None:
        """Begin to copy what the change moves, to where it disturbs nobody."""
        ...

    def ready_us(self, now_us: int) -> int | None:
        """Since when every device has its weights; None if one has not by now."""
        ...

    @property
    def next_us(self) -> int | None:
        """When that will be, where it is known ahead."""
        ...

    def drop(self, now_us: int) -> None:
        """Nobody wants the change any more."""
        ...


class _Window(NamedTuple):
    """A `WindowView`."""

    expert_tokens: tuple[int, ...]
    slot_tokens: tuple[int, ...]


class _Layer(NamedTuple):
    """An `ExpertLayerView`."""

    id: LayerId
    slots: tuple[int, ...]
    windows: tuple[_Window, ...]
    num_steps_since_change: int


class _View(NamedTuple):
    """An `ExpertsView`."""

    now_us: int
    counted_until_us: int
    num_experts: int
    num_groups: int
    num_devices: int
    num_nodes: int
    expert_bytes: int
    copy_us: float | None
    layers: tuple[_Layer, ...]


class _Pending:
    """A change under way."""

    __slots__ = ("change", "is_ready", "record")

    def __init__(self, change: Change, record: ExpertsRecord) -> None:
        self.change, self.record, self.is_ready = change, record, False


class Rebalancing:
    """The experts of one instance.

    Attributes:
        slots: of each layer, where steps that are over ran.
        placement: how often they have changed since the instance began.
    """

    def __init__(self, policy: ExpertsPolicy, mover: Mover) -> None:
        self.policy, self.mover, self.layout = policy, mover, mover.layout
        self._first = self.layout.first_slots(policy.num_redundant_experts)
        self._interval_us = policy.interval_us
        self._record_us = RECORD_US if self._interval_us is None else min(self._interval_us, RECORD_US)
        self._num_decisions = 0
        self._pending: _Pending | None = None

    def serve(self, recorder: Recorder, instance: int) -> None:
        """An instance begins, or begins anew: with its experts where they were at first."""
        if self._pending is not None:
            self.mover.drop(0)
        self._recorder, self._instance = recorder, instance
        self.slots, self.placement = self._first, 0
        num_layers = len(self.layout.layers)
        self._of_steps = StepExperts(0, self.slots)
        self._pending = None
        self._switching: _Pending | None = None  # a planned step begins it, and is not over
        self._windows = [deque[_Window](maxlen=RECENT_WINDOWS) for _ in range(num_layers)]
        self._steps_since_L = [0] * num_layers
        self._window_LP, self._units_LP = self._no_tokens(), self._no_tokens()
        self._num_in_window = self._num_in_record = 0
        self._counted_until_us = self._looked_us = -1
        self._window_mark_us, self._record_mark_us = self._interval_us, self._record_us

    @property
    def next_us(self) -> int:
        """Something may be decided, recorded or begun at the end of the first step that ends at or after this."""
        times = [self._record_mark_us]
        if self._window_mark_us is not None:
            times.append(self._window_mark_us)
        if self._pending is not None and not self._pending.is_ready:
            times += [self._pending.record.decided_us + self.layout.prepare_timeout_us]
            times += [] if self.mover.next_us is None else [self.mover.next_us]
        return min(times)

    def look(self, now_us: int) -> None:
        """A step is about to be planned: is what is under way ready, or has it taken too long?"""
        pending, looked_us, self._looked_us = self._pending, self._looked_us, now_us
        if pending is None or pending.is_ready:
            return
        deadline_us = pending.record.decided_us + self.layout.prepare_timeout_us
        ready_us = self.mover.ready_us(now_us)
        if ready_us is not None and (ready_us := max(ready_us, looked_us + 1)) <= min(now_us, deadline_us):
            # Not before somebody looked in vain: who replays this must find it ready at the same look.
            pending.record.ready_us, pending.is_ready = ready_us, True
        elif now_us >= deadline_us:
            pending.record.dropped_us = deadline_us
            self._pending = None
            self.mover.drop(now_us)

    def place(self, step: Step, *, only_decodes: bool) -> None:
        """Say of a planned step where its experts lie: where they are to be, from the first that only decodes."""
        pending = self._pending
        if pending is not None and pending.is_ready and only_decodes:
            step.experts = StepExperts(self._of_steps.placement + 1, pending.change.slots, pending.change.number)
            self._of_steps = step.experts._replace(activates=None)
            self._switching, self._pending = pending, None
        else:
            step.experts = self._of_steps

    def completed(self, step: Step) -> None:
        """A step is over, with its repeats; count it, and ask the policy where an interval ends.

        Raises:
            PolicyError: an illegal plan; nothing was changed.
        """
        experts, now_us, num_steps = step.experts, step.ends_us[-1], len(step.ends_us)
        assert experts is not None, f"step {step.index} was planned without experts"
        if experts.activates is not None:
            self._switch(experts, step)
        assert experts.placement == self.placement, f"step {step.index} ran where experts were not"
        if step.expert_rows_LP is not None:
            self._units_LP += step.expert_rows_LP * num_steps
        self._num_in_window += num_steps
        self._num_in_record += num_steps
        self._steps_since_L = [steps + num_steps for steps in self._steps_since_L]
        self._counted_until_us = now_us
        is_window_over = self._window_mark_us is not None and now_us >= self._window_mark_us
        if is_window_over or now_us >= self._record_mark_us:
            self._close_record()
            self._record_mark_us = (now_us // self._record_us + 1) * self._record_us
        if is_window_over:
            assert self._interval_us is not None, "an interval is over that never began"
            self._close_window()
            self._window_mark_us = (now_us // self._interval_us + 1) * self._interval_us
            if self._pending is None and self._switching is None:
                self._decide(now_us)

    def finish(self) -> None:
        """Nothing more will be counted: record what was, and let go of what is under way."""
        self._close_record()
        if self._pending is not None:
            self.mover.drop(max(self._counted_until_us, 0))
            self._pending = None

    def _no_tokens(self) -> Counts:
        return np.zeros((len(self._first), len(self._first[0]) if self._first else 0), np.int64)

    def _switch(self, experts: StepExperts, step: Step) -> None:
        """What was counted so far was of experts elsewhere."""
        switching, self._switching = self._switching, None
        assert switching is not None, f"step {step.index} begins a change that nobody made"
        self._close_record()
        self._close_window()
        for layer, (old, new) in enumerate(zip(self.slots, experts.slots, strict=True)):
            if old != new:
                past = [window._replace(slot_tokens=()) for window in self._windows[layer]]
                self._windows[layer] = deque(past, maxlen=RECENT_WINDOWS)
                self._steps_since_L[layer] = 0
        self.slots, self.placement = experts.slots, experts.placement
        switching.record.active_step, switching.record.active_us = step.index, step.start_us

    def _close_record(self) -> None:
        if self._num_in_record:
            # Fractions are rounded slot by slot, each layer's sum stays.
            edges_LP = self._units_LP.cumsum(axis=1) // self.mover.row_units
            rows_LP = np.diff(edges_LP, axis=1, prepend=0)
            self._window_LP += rows_LP
            self._recorder.expert_load(
                ExpertLoadRecord(
                    end_us=self._counted_until_us,
                    num_steps=self._num_in_record,
                    placement=self.placement,
                    slot_tokens_LP=rows_LP,
                    instance=self._instance,
                )
            )
        self._units_LP, self._num_in_record = self._no_tokens(), 0

    def _close_window(self) -> None:
        """A window ends with its interval, or where experts begin to lie elsewhere: none has two placements."""
        if self._num_in_window:
            tokens_LE = expert_tokens(self.slots, self._window_LP, self.layout.num_experts)
            for windows, experts_E, slots_P in zip(self._windows, tokens_LE, self._window_LP, strict=True):
                windows.appendleft(_Window(tuple(experts_E.tolist()), tuple(slots_P.tolist())))
        self._window_LP, self._num_in_window = self._no_tokens(), 0

    def _decide(self, now_us: int) -> None:
        view = self._view(now_us)
        plan = self.policy.decide(view)
        if broken := experts_violations(view, plan):
            raise PolicyError(f"experts policy {policy_name(self.policy)} at {now_us} us: {'; '.join(broken)}")
        number, self._num_decisions = self._num_decisions, self._num_decisions + 1
        change = self._change(number, plan)
        record = ExpertsRecord(
            decision=number,
            decided_us=now_us,
            reason=plan.reason,
            layers=sorted(plan.slots),
            slots=[expert for layer in sorted(plan.slots) for expert in plan.slots[layer]],
            num_moved_slots=len(change.moves),
            copied_bytes=len(change.moves) * self.layout.expert_bytes,
            instance=self._instance,
        )
        self._recorder.experts(record)
        if plan.slots:
            self._pending = _Pending(change, record)
            self.mover.prepare(change, now_us)

    def _change(self, number: int, plan: ExpertsPlan) -> Change:
        after = tuple(
            tuple(plan.slots.get(LayerId(layer), own))
            for layer, own in zip(self.layout.layers, self.slots, strict=True)
        )
        moves = [
            Move(row, slot, new)
            for row, (olds, news) in enumerate(zip(self.slots, after, strict=True))
            for slot, (old, new) in enumerate(zip(olds, news, strict=True))
            if old != new
        ]
        return Change(number, after, tuple(moves))

    def _view(self, now_us: int) -> _View:
        layout = self.layout
        return _View(
            now_us=now_us,
            counted_until_us=now_us,
            num_experts=layout.num_experts,
            num_groups=layout.num_groups,
            num_devices=layout.num_devices,
            num_nodes=layout.num_nodes,
            expert_bytes=layout.expert_bytes,
            copy_us=layout.copy_us,
            layers=tuple(
                _Layer(LayerId(layer), slots, tuple(windows), steps)
                for layer, slots, windows, steps in zip(
                    layout.layers, self.slots, self._windows, self._steps_since_L, strict=True
                )
            ),
        )


def expert_tokens(slots: Sequence[Sequence[int]], slot_tokens_LP: Counts, num_experts: int) -> Counts:
    """Tokens of each expert, [L, E], whatever copy of it computed them."""
    tokens_LE = np.zeros((len(slots), num_experts), np.int64)
    for row, (own, tokens_P) in enumerate(zip(slots, slot_tokens_LP, strict=True)):
        np.add.at(tokens_LE[row], np.asarray(own), tokens_P)
    return tokens_LE


def rebalancing_of(policy: ExpertsPolicy, mover: Mover | None) -> Rebalancing | None:
    """The policy at work; None where no experts are divided among devices, and nobody needs to ask.

    Raises:
        ConfigError: a policy that would never be asked; experts that do not divide, or redundant ones without a place.
    """
    if mover is not None:
        return Rebalancing(policy, mover)
    if policy != STATIC:
        raise ConfigError(
            f"experts is {policy_name(policy)!r}, and no experts are divided among devices here; accepted: experts "
            f"{policy_name(STATIC)!r}, or a model with experts under expert parallelism and, in simulation, its loads"
        )
    return None
