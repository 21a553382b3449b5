"""A policy that moves experts, over loads as they come: what becomes of peaks, and what moving costs."""

# Shapes: T ticks, L layers with experts, E experts, D devices, P slots of all devices of a layer

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.policies.experts import RECENT_WINDOWS, ExpertsPolicy, LayerId
from xllm_lab.policies.experts.placement import contiguous
from xllm_lab.policies.experts_checks import experts_violations
from xllm_lab.sim.experts.loads import Counts, ExpertLoads
from xllm_lab.sim.experts.shares import ExpertPrice, Placement, experts_us, peak_to_mean

# Ticks that are computed at once: bounds memory, changes nothing.
_CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """Who shares the experts, and what it takes to move one.

    Attributes:
        num_groups: the router's groups of experts.
        link_bytes_per_s: at which a device receives weights beside its steps.
        boundary_us: from when every device is ready until a step without prompts begins, in the mean.
        activation_us: for which that step is held up.
    """

    num_devices: int
    num_nodes: int = 1
    num_groups: int = 1
    expert_bytes: int
    link_bytes_per_s: float
    boundary_us: int = 0
    activation_us: int = 0

    def __post_init__(self) -> None:
        if self.num_devices < 1 or self.num_nodes < 1 or self.num_devices % self.num_nodes:
            raise ConfigError(
                f"num_devices is {self.num_devices} on {self.num_nodes} nodes, a multiple of the nodes is accepted"
            )
        for name, least in (("num_groups", 1), ("expert_bytes", 1), ("boundary_us", 0), ("activation_us", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, at least {least} is accepted")
        if not 0 < self.link_bytes_per_s < math.inf:
            raise ConfigError(f"link_bytes_per_s is {self.link_bytes_per_s}, more than 0 is accepted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One change.

    Attributes:
        decided_us, ready_us: when it was decided, and when every device had its weights.
        active_us: from then on it held: from the first tick after a step boundary that fits.
        copied_bytes: over all links.
        moved_slots: that got other weights.
        peak_to_mean: of the interval's tokens, where they were computed.
        peak_to_mean_after: of the same tokens, where they would have been.
    """

    decided_us: int
    ready_us: int
    active_us: int
    num_layers: int
    moved_slots: int
    copied_bytes: int
    peak_to_mean: float
    peak_to_mean_after: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Balanced:
    """What became of loads under a policy.

    Attributes:
        peak_to_mean: [T], see `shares.peak_to_mean`.
        experts_us: [T], time that each tick's steps spent in experts.
        stall_us: for which activations held steps up.
        redundant_bytes: of each device, for slots beside those that hold every expert once.
    """

    peak_to_mean: npt.NDArray[np.float64]
    experts_us: Counts
    published: tuple[Published, ...]
    num_decisions: int
    stall_us: int
    redundant_bytes: int

    @property
    def total_us(self) -> int:
        return int(self.experts_us.sum()) + self.stall_us

    @property
    def moved_slots(self) -> int:
        return sum(change.moved_slots for change in self.published)


class _Window(NamedTuple):
    expert_tokens: tuple[int, ...]
    slot_tokens: tuple[int, ...]


class _Layer(NamedTuple):
    id: LayerId
    slots: tuple[int, ...]
    windows: tuple[_Window, ...]
    num_steps_since_change: int


class _View(NamedTuple):
    now_us: int
    counted_until_us: int
    num_experts: int
    num_groups: int
    num_devices: int
    num_nodes: int
    expert_bytes: int
    copy_us: float | None
    layers: tuple[_Layer, ...]


class _Pending(NamedTuple):
    placement: Placement
    active_tick: int


def balance(policy: ExpertsPolicy, loads: ExpertLoads, devices: Devices, price: ExpertPrice) -> Balanced:
    """Run a policy over loads, from neighbouring experts on each device on.

    Its intervals are whole ticks, rounded up. While a change is prepared it is not asked.

    Raises:
        ConfigError: experts do not divide among devices or groups, or redundant ones have no place.
        PolicyError: a plan that is not legal.
    """
    if loads.num_experts % devices.num_groups:
        raise ConfigError(f"{loads.num_experts} experts in {devices.num_groups} groups, a divisor is accepted")
    try:
        first = contiguous(loads.num_experts, devices.num_devices, policy.num_redundant_experts)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return _Balancing(policy, loads, devices, price, first).run()


class _Balancing:
    """Everything that changes while a policy runs."""

    def __init__(
        self,
        policy: ExpertsPolicy,
        loads: ExpertLoads,
        devices: Devices,
        price: ExpertPrice,
        first: tuple[int, ...],
    ) -> None:
        self.policy, self.loads, self.devices, self.price = policy, loads, devices, price
        self.placement = self._placed([first] * loads.num_layers)
        self.steps_since_L = np.zeros(loads.num_layers, np.int64)
        self.changed_L = np.zeros(loads.num_layers, bool)
        self.windows: list[deque[_Window]] = [deque(maxlen=RECENT_WINDOWS) for _ in range(loads.num_layers)]
        self.pending: _Pending | None = None
        self.published = list[Published]()
        self.num_decisions = 0

    def run(self) -> Balanced:
        loads, every_us = self.loads, self.policy.interval_us
        every = loads.num_ticks if every_us is None else -(-every_us // loads.tick_us)
        ratios, times = [np.ones(0)], [np.zeros(0, np.int64)]
        tick = counted = 0
        while tick < loads.num_ticks:
            mark = (tick // every + 1) * every
            stops = [loads.num_ticks, mark, tick + _CHUNK]
            stops += [self.pending.active_tick] if self.pending else []
            end = min(stops)
            some = loads.between(tick, end)
            tokens_TLD = self.placement.device_tokens(some.tokens)
            ratios.append(peak_to_mean(tokens_TLD))
            times.append(experts_us(tokens_TLD, some.num_steps, self.price))
            self.steps_since_L += some.num_steps.sum()
            tick = end
            is_active = self.pending is not None and self.pending.active_tick == tick
            if is_active or tick == mark:
                self._close_window(counted, tick)
                counted = tick
            if is_active:
                self._activate()
            elif tick == mark and every_us is not None and self.pending is None:
                self._decide(tick, every)
        num_active = sum(change.active_us < loads.num_ticks * loads.tick_us for change in self.published)
        own = self.policy.num_redundant_experts
        return Balanced(
            peak_to_mean=np.concatenate(ratios),
            experts_us=np.concatenate(times),
            published=tuple(self.published),
            num_decisions=self.num_decisions,
            stall_us=num_active * self.devices.activation_us,
            redundant_bytes=own * loads.num_layers * self.devices.expert_bytes,
        )

    def _placed(self, slots: list[tuple[int, ...]]) -> Placement:
        return Placement(slots, num_experts=self.loads.num_experts, num_devices=self.devices.num_devices)

    def _close_window(self, first: int, end: int) -> None:
        """A window ends with its interval, or where experts begin to lie otherwise: none has two placements."""
        tokens_LE = self.loads.tokens[first:end].sum(axis=0)
        split_LP = self.placement.slot_tokens(tokens_LE[None])[0]
        for layer, windows in enumerate(self.windows):
            windows.appendleft(_Window(tuple(tokens_LE[layer].tolist()), tuple(split_LP[layer].tolist())))

    def _activate(self) -> None:
        assert self.pending is not None, "nothing to activate"
        is_new_L = (self.pending.placement.slots_LP != self.placement.slots_LP).any(axis=1)
        for layer in np.flatnonzero(is_new_L).tolist():
            old = [window._replace(slot_tokens=()) for window in self.windows[layer]]
            self.windows[layer] = deque(old, maxlen=RECENT_WINDOWS)
        self.steps_since_L[is_new_L] = 0
        self.placement, self.pending = self.pending.placement, None

    def _decide(self, tick: int, every: int) -> None:
        view = self._view(tick)
        plan = self.policy.decide(view)
        self.num_decisions += 1
        if broken := experts_violations(view, plan):
            raise PolicyError(f"{type(self.policy).__qualname__} {broken[0]}")
        if plan.slots:
            self._publish(tick, every, plan.slots, plan.reason)

    def _view(self, tick: int) -> _View:
        d, now_us = self.devices, tick * self.loads.tick_us
        return _View(
            now_us=now_us,
            counted_until_us=now_us,
            num_experts=self.loads.num_experts,
            num_groups=d.num_groups,
            num_devices=d.num_devices,
            num_nodes=d.num_nodes,
            expert_bytes=d.expert_bytes,
            copy_us=d.expert_bytes / d.link_bytes_per_s * 1e6,
            layers=tuple(
                _Layer(LayerId(i), tuple(slots), tuple(windows), steps)
                for i, (slots, windows, steps) in enumerate(
                    zip(self.placement.slots_LP.tolist(), self.windows, self.steps_since_L.tolist(), strict=True)
                )
            ),
        )

    def _publish(self, tick: int, every: int, slots: Mapping[LayerId, tuple[int, ...]], reason: str) -> None:
        before_LP = self.placement.slots_LP
        after = self._placed([slots.get(LayerId(i), tuple(row)) for i, row in enumerate(before_LP.tolist())])
        moved_LP = after.slots_LP != before_LP
        copied_LD = copied_slots(moved_LP.reshape(len(before_LP), self.devices.num_devices, -1))
        d, now_us = self.devices, tick * self.loads.tick_us
        # One layer after another, each as soon as the device that lacks most of it has it.
        ready_us = now_us + math.ceil(int(copied_LD.max(axis=1).sum()) * d.expert_bytes / d.link_bytes_per_s * 1e6)
        active_tick = -(-(ready_us + d.boundary_us) // self.loads.tick_us)
        self.pending = _Pending(after, max(active_tick, tick))
        newest = self.loads.tokens[tick - every : tick].sum(axis=0)[None]
        self.published.append(
            Published(
                decided_us=now_us,
                ready_us=ready_us,
                active_us=active_tick * self.loads.tick_us,
                num_layers=len(slots),
                moved_slots=int(moved_LP.sum()),
                copied_bytes=int(copied_LD.sum()) * d.expert_bytes,
                peak_to_mean=float(peak_to_mean(self.placement.device_tokens(newest))[0]),
                peak_to_mean_after=float(peak_to_mean(after.device_tokens(newest))[0]),
                reason=reason,
            )
        )


def copied_slots(moved_LDS: npt.NDArray[np.bool_]) -> Counts:
    """Slots that each device copies of each layer, [L, D]: as in xLLM those that change, or all if half of them do."""
    size = moved_LDS.shape[-1]
    changed_LD = moved_LDS.sum(axis=-1)
    copied: Counts = np.where(2 * changed_LD < size, changed_LD, size).astype(np.int64)
    return copied
