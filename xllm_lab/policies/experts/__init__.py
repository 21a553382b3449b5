"""Which device holds which experts of a mixture: the interface; one file a policy beside it.

With expert parallelism each device has, in every layer with experts, the same number of slots, and a slot the weights
of one expert. There are as many slots as experts, or more: then some experts have copies, which share tokens evenly.
A step waits in each layer for the device that has the most tokens.

A host reads how many tokens each slot and each expert had, in windows of the policy's `interval_us`, and asks the
policy when one has ended. It keeps what was asked for until every device has the weights, and lets it begin between two
steps.
A policy keeps nothing: it is a frozen, keyword-only dataclass whose annotated fields are its knobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NewType, Protocol

LayerId = NewType("LayerId", int)
# The expert in each slot: first the slots of device 0, then those of device 1, and so on.
Slots = Sequence[int]
# So many windows does a host keep.
RECENT_WINDOWS = 8


class WindowView(Protocol):
    """What one layer had to do in one interval. A token counts once for each expert that it was sent to."""

    @property
    def expert_tokens(self) -> Sequence[int]:
        """Of each expert, whatever copy of it computed them."""
        ...

    @property
    def slot_tokens(self) -> Sequence[int]:
        """Of each slot; empty if the layer's experts lay otherwise in some of that interval."""
        ...


class ExpertLayerView(Protocol):
    """One layer with experts."""

    @property
    def id(self) -> LayerId: ...
    @property
    def slots(self) -> Slots:
        """The expert in each slot now."""
        ...

    @property
    def windows(self) -> Sequence[WindowView]:
        """The last intervals, the newest first, at most `RECENT_WINDOWS`. Those since the last change have slots."""
        ...

    @property
    def num_steps_since_change(self) -> int:
        """Steps that ran with the experts where they are."""
        ...


class ExpertsView(Protocol):
    """The experts of a model at the end of an interval.

    Experts, devices and nodes are numbers from 0 on: an expert's place in its router's output, a device's rank, and
    the node of each `num_devices / num_nodes` neighbouring ranks.
    """

    @property
    def now_us(self) -> int: ...
    @property
    def counted_until_us(self) -> int:
        """When the newest window ended."""
        ...

    @property
    def num_experts(self) -> int:
        """Of each layer."""
        ...

    @property
    def num_groups(self) -> int:
        """Groups of neighbouring experts among which the router chooses first; 1 if it does not."""
        ...

    @property
    def num_devices(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def expert_bytes(self) -> int:
        """Weights of one expert in one layer."""
        ...

    @property
    def copy_us(self) -> float | None:
        """Time to bring the weights of one expert to a device; None if nobody knows."""
        ...

    @property
    def layers(self) -> Sequence[ExpertLayerView]:
        """In no promised order. They all have as many slots, at most `num_experts` a device."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsPlan:
    """The new slots of each layer that changes, and why, in one phrase for the decision log."""

    slots: Mapping[LayerId, tuple[int, ...]]
    reason: str


class ExpertsPolicy(Protocol):
    """Which experts have copies, where they lie, and when that changes."""

    decides: ClassVar[str]  # "experts"
    # Flags that make xLLM do so, whatever the knobs say. A policy without them cannot be exported.
    # xllm_flags: ClassVar[Mapping[str, bool | str]]

    @property
    def num_redundant_experts(self) -> int:
        """Slots of each device beside those that hold every expert once."""
        ...

    @property
    def interval_us(self) -> int | None:
        """How long a window lasts; None if the policy need not be asked."""
        ...

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        """A legal plan (see `experts_checks.experts_violations`). Pure."""
        ...
