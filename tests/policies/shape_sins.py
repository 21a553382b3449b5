"""Bad shapes policies, kept on purpose: each breaks one law of the contract. See `sins`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from xllm_lab.policies.shapes import ShapePlan, ShapeView


def graph(num_tokens: int) -> ShapePlan:
    return ShapePlan(num_tokens=num_tokens, reason="so be it")


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShapesSin:
    decides: ClassVar[str] = "shapes"


@dataclass(frozen=True, slots=True, kw_only=True)
class CutsTheStep(_ShapesSin):
    """Takes the multiple of 16 below. Broken law: legal."""

    def decide(self, view: ShapeView) -> ShapePlan:
        return graph(max(1, view.num_tokens // 16 * 16))


@dataclass(frozen=True, slots=True, kw_only=True)
class PadsBeyondUse(_ShapesSin):
    """Takes the multiple of 16 above, whatever the instance may hold. Broken law: legal."""

    def decide(self, view: ShapeView) -> ShapePlan:
        return graph(-(-view.num_tokens // 16) * 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Captures(_ShapesSin):
    """Runs eagerly what it has not seen before. Broken law: repeatable."""

    seen: set[int] = field(default_factory=set)

    def decide(self, view: ShapeView) -> ShapePlan:
        if view.num_tokens in self.seen:
            return graph(view.num_tokens)
        self.seen.add(view.num_tokens)
        return ShapePlan(num_tokens=None, reason="not captured")


@dataclass(frozen=True, slots=True, kw_only=True)
class PadsTheView(_ShapesSin):
    """Pads by writing. Broken law: pure."""

    def decide(self, view: Any) -> ShapePlan:
        view.num_seqs = view.num_tokens
        return graph(view.num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class LikesFullBlocks(_ShapesSin):
    """Runs eagerly while the longest context fills no whole block. Broken law: unbroken."""

    def decide(self, view: ShapeView) -> ShapePlan:
        if view.max_context_tokens % 16:
            return ShapePlan(num_tokens=None, reason="a block is open")
        return graph(view.num_tokens)
