"""Experts of a simulated instance: what each slot has to do in a step, and how long it takes to copy some.

Popularity is a curve: of each layer, which part of its rows each expert gets, for as long as nothing newer is known. A
step's rows follow from its tokens and from when it begins, not from chance, so that skipped steps are the stepped ones.
"""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T times, L layers with experts, E experts, P slots of all devices of a layer, D devices

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xllm_lab.errors import ConfigError, TraceError
from xllm_lab.expert_records import ExpertLoadRecord
from xllm_lab.rebalancing import Change, ExpertLayout, expert_tokens
from xllm_lab.sim.experts.loads import Counts, ExpertLoads
from xllm_lab.sim.experts.routing import Routing
from xllm_lab.sim.experts.shares import Placement
from xllm_lab.step import Step, StepExperts

# Of steps with as many tokens, at one time and in one placement, rows are the same: so many are remembered.
_MOST_KNOWN = 512
# A row in parts: of a few rows most experts get none, step after step, if rows are whole.
ROW_UNITS = 1 << 16


class Popularity:
    """Which part of a layer's rows each expert gets. Behind the end it begins anew.

    Args:
        ends_us: [T], from 0 on, rising: until when each row of tokens holds.
        tokens_TLE: what there was to do; a layer without any is even.

    Raises:
        TraceError: no times, or times that do not rise.
    """

    def __init__(self, ends_us: Sequence[int], tokens_TLE: Counts) -> None:
        self.ends_us = [*ends_us]
        if not self.ends_us or self.ends_us[0] < 1 or any(b <= a for a, b in pairwise(ends_us)):
            raise TraceError("loads of experts end at times that do not rise from 0 on; accepted: those that do")
        self._tokens_TLE = tokens_TLE
        self.num_layers, self.num_experts = tokens_TLE.shape[1:]
        self._edges: dict[int, npt.NDArray[np.float64]] = {}

    def at(self, now_us: int) -> tuple[int, int]:
        """Which row holds, and until when."""
        rounds, within_us = divmod(now_us, self.ends_us[-1])
        row = bisect.bisect_right(self.ends_us, within_us)
        return row, rounds * self.ends_us[-1] + self.ends_us[row]

    def shares(self, row: int) -> npt.NDArray[np.float64]:
        """Each expert's part of its layer's rows, [L, E]."""
        tokens_LE = self._tokens_TLE[row].astype(np.float64)
        tokens_LE[tokens_LE.sum(axis=1) == 0] = 1.0
        parts_LE: npt.NDArray[np.float64] = tokens_LE / tokens_LE.sum(axis=1, keepdims=True)
        return parts_LE

    def shared_out(self, row: int, num_rows: int) -> Counts:
        """`num_rows` rows shared out by popularity; none is lost."""
        edges_LE = self._edges.get(row)
        if edges_LE is None:
            edges_LE = self._edges[row] = self.shares(row).cumsum(axis=1)
            edges_LE[:, -1] = 1.0
        # Each expert's rows are those between its edge and the one before: they add up, whatever is rounded.
        at_LE = np.floor(edges_LE * num_rows + 0.5).astype(np.int64)
        return np.diff(at_LE, axis=1, prepend=0)


def popularity_of(loads: ExpertLoads) -> Popularity:
    """By ticks; of those without a step, what came before."""
    busy = np.flatnonzero(loads.num_steps > 0)
    if not len(busy):
        raise TraceError("loads of experts without any step; accepted: those with some")
    # A tick without a step says nothing: the one before lasts on.
    ends_us = [*((busy[1:]) * loads.tick_us).tolist(), loads.num_ticks * loads.tick_us]
    return Popularity(ends_us, loads.tokens[busy])


def recorded_popularity(records: Sequence[ExpertLoadRecord], slots_of: Sequence[Sequence[Sequence[int]]]) -> Popularity:
    """Of what an instance counted, wherever its experts lay.

    Args:
        slots_of: of each placement, in order, of each layer the expert in each slot.

    Raises:
        TraceError: nothing was counted.
    """
    if not records:
        raise TraceError("no step counted its experts; accepted: a run with some")
    num_experts = max(max(own) for own in slots_of[0]) + 1
    tokens = [expert_tokens(slots_of[r.placement], r.slot_tokens_LP, num_experts) for r in records]
    return Popularity([r.end_us for r in records], np.stack(tokens))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedExperts:
    """What a simulated machine knows of its experts.

    Attributes:
        experts_per_token: rows of a token in each layer.
        link_bytes_per_s: at which a device receives weights beside its steps.
        activation_us: for which the step is held up that begins a change.
        row_us: what a row more on the most loaded device costs, where the cost model does not price that.
        num_alike: instances whose experts these are, each with as many tokens; one of them is simulated.
        route: tells the cost model how tokens choose experts, and where these lie, if it wants to know.
    """

    layout: ExpertLayout
    popularity: Popularity
    experts_per_token: int
    link_bytes_per_s: float
    activation_us: int = 0
    row_us: float = 0.0
    route: Callable[[Routing | None], None] | None = None
    num_alike: int = 1

    def __post_init__(self) -> None:
        wanted = len(self.layout.layers), self.layout.num_experts
        if (self.popularity.num_layers, self.popularity.num_experts) != wanted:
            raise ConfigError(
                f"loads of {self.popularity.num_layers} layers of {self.popularity.num_experts} experts, the model has "
                f"{wanted[0]} of {wanted[1]}"
            )
        if not 0 < self.link_bytes_per_s < math.inf:
            raise ConfigError(f"link_bytes_per_s is {self.link_bytes_per_s}, more than 0 is accepted")
        for name, least in (("experts_per_token", 1), ("num_alike", 1), ("activation_us", 0), ("row_us", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} is {getattr(self, name)}, at least {least} is accepted")

    def described(self) -> dict[str, Any]:
        """For manifests."""
        return {
            "link_bytes_per_s": self.link_bytes_per_s,
            "activation_us": self.activation_us,
            "row_us": self.row_us,
            "num_times": len(self.popularity.ends_us),
        }


class StepLoad(NamedTuple):
    """What the slots do in a step.

    Attributes:
        rows_LP: of each slot, `ROW_UNITS` for a row.
        extra_us: that the step takes longer, for rows which the cost model does not price, and for what it activates.
        until_us: for steps that begin before, it is the same.
    """

    rows_LP: Counts
    extra_us: float
    until_us: int


class StepLoads:
    """Rows of slots, step by step; those of equal steps are found once."""

    def __init__(self, experts: ServedExperts) -> None:
        self._experts = experts
        self._placements: dict[tuple[tuple[int, ...], ...], Placement] = {}
        self._routed: tuple[int, tuple[tuple[int, ...], ...]] | None = None
        self._known: dict[tuple[int, int], tuple[Counts, float]] = {}

    def of(self, step: Step, num_tokens: int) -> StepLoad:
        """Of a step that begins."""
        assert step.experts is not None, f"step {step.index} has no experts"
        row, until_us = self._experts.popularity.at(step.start_us)
        if self._experts.route is not None and self._routed != (row, step.experts.slots):
            self._routed = row, step.experts.slots
            self._experts.route(self._routing(row, step.experts.slots))
        rows_LP, extra_us = self._rows(step.experts, row, num_tokens)
        return StepLoad(rows_LP, extra_us, until_us)

    def _routing(self, row: int, slots: tuple[tuple[int, ...], ...]) -> Routing:
        layout, popularity = self._experts.layout, self._experts.popularity
        shape: dict[str, Any] = {"num_devices": layout.num_devices, "num_per_token": self._experts.experts_per_token}
        return Routing(popularity.shares(row), slots_LP=np.asarray(slots, np.int64), **shape)

    def _rows(self, experts: StepExperts, row: int, num_tokens: int) -> tuple[Counts, float]:
        placement = self._placements.get(experts.slots)
        if placement is None:
            layout = self._experts.layout
            placement = Placement(experts.slots, num_experts=layout.num_experts, num_devices=layout.num_devices)
            self._placements = {experts.slots: placement}
            self._known.clear()
        key = (row, num_tokens)
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            num_units = num_tokens * self._experts.num_alike * self._experts.experts_per_token * ROW_UNITS
            rows_LE = self._experts.popularity.shared_out(row, num_units)
            rows_LP = placement.slot_tokens(rows_LE[None])[0]
            on_device_LD = rows_LP.reshape(len(rows_LP), placement.num_devices, -1).sum(axis=-1)
            more = float((on_device_LD.max(axis=-1) - on_device_LD.mean(axis=-1)).sum())
            self._known[key] = rows_LP, more / ROW_UNITS * self._experts.row_us
        return self._known[key]


class SimulatedMover:
    """A `Mover` over links: each device receives what it lacks at the link's rate, layer by layer.

    A layer is there when the device that lacks most of it has it, and then the next one is begun.
    """

    def __init__(self, experts: ServedExperts) -> None:
        self._experts = experts
        self._ready_us: int | None = None

    @property
    def layout(self) -> ExpertLayout:
        return self._experts.layout

    @property
    def row_units(self) -> int:
        return ROW_UNITS

    def prepare(self, change: Change, now_us: int) -> None:
        layout = self.layout
        moved_LP = np.zeros((len(change.slots), len(change.slots[0])), np.int64)
        for layer, slot, _ in change.moves:
            moved_LP[layer, slot] = 1
        lacking_LD = moved_LP.reshape(len(change.slots), layout.num_devices, -1).sum(axis=-1)
        num_bytes = int(lacking_LD.max(axis=1).sum()) * layout.expert_bytes
        self._ready_us = now_us + math.ceil(num_bytes / self._experts.link_bytes_per_s * 1e6)

    def ready_us(self, now_us: int) -> int | None:
        return self._ready_us if self._ready_us is not None and self._ready_us <= now_us else None

    @property
    def next_us(self) -> int | None:
        return self._ready_us

    def drop(self, now_us: int) -> None:
        self._ready_us = None
