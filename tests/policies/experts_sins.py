"""Experts policies that sin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.experts import ExpertsPlan, ExpertsView, LayerId


@dataclass(frozen=True, slots=True, kw_only=True)
class LosesTheColdest:
    """Its slot goes to an expert that has one already."""

    decides: ClassVar[str] = "experts"

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        slots = {layer.id: (layer.slots[-1], *layer.slots[1:]) for layer in view.layers if layer.windows}
        return ExpertsPlan(slots=slots, reason="cold")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsIntoMissingWindows:
    decides: ClassVar[str] = "experts"

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        newest = [layer.windows[0] for layer in view.layers]
        return ExpertsPlan(slots={}, reason=f"{len(newest)} counted")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapsOddLayers:
    """A layer's number means nothing."""

    decides: ClassVar[str] = "experts"

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        slots = {layer.id: tuple(layer.slots[::-1]) for layer in view.layers if layer.id % 2 and len(layer.slots) > 1}
        return ExpertsPlan(slots=slots, reason="odd")


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstListedLayerOnly:
    decides: ClassVar[str] = "experts"

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        listed = [layer for layer in view.layers if len(layer.slots) > 1]
        chosen: dict[LayerId, tuple[int, ...]] = {layer.id: tuple(layer.slots[::-1]) for layer in listed[:1]}
        return ExpertsPlan(slots=chosen, reason="first")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapsInPlace:
    decides: ClassVar[str] = "experts"

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        for layer in view.layers:
            layer.windows.clear()  # type: ignore[attr-defined]
        return ExpertsPlan(slots={}, reason="cleared")
