"""In which captured graph a step runs: the interface, and one file a policy beside it.

A graph holds the work of a step of fixed size. A smaller step is padded to it and pays for the padding; a step that no
graph holds runs eagerly, kernel by kernel, and pays for their launches. A policy is a frozen, keyword-only dataclass
whose annotated fields are its knobs. Those that xLLM has are named as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol


class ShapeView(Protocol):
    """A step that was planned, as the device will see it, and its instance's limits."""

    @property
    def num_tokens(self) -> int:
        """Tokens it computes, at least one a sequence."""
        ...

    @property
    def num_seqs(self) -> int: ...
    @property
    def is_decode(self) -> bool:
        """Every sequence computes one token."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Of the longest sequence, in KV and computed now."""
        ...

    @property
    def max_tokens_per_batch(self) -> int: ...
    @property
    def max_seqs_per_batch(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePlan:
    """The size of graph that runs the step, and why, in one phrase for the counters.

    Attributes:
        num_tokens: the graph's, padding included: one token for each of so many sequences if the step only decodes.
            None: it runs eagerly.
    """

    num_tokens: int | None
    reason: str


class ShapesPolicy(Protocol):
    """Which graph a step runs in."""

    decides: ClassVar[str]  # "shapes"
    # Flags that make xLLM do so, whatever the knobs say. A policy without them cannot be exported.
    # xllm_flags: ClassVar[Mapping[str, bool | str]]

    def decide(self, view: ShapeView) -> ShapePlan:
        """A legal plan (see `shape_checks.shape_violations`). Pure."""
        ...


def most_tokens(view: ShapeView) -> int:
    """The largest graph that this instance can have use for: no step like this one is larger."""
    if view.is_decode:
        return min(view.max_seqs_per_batch, view.max_tokens_per_batch)
    return view.max_tokens_per_batch


def replayed(view: ShapeView, num_tokens: int) -> ShapePlan:
    """In a graph of that size, cut to what the instance can have use for."""
    size = min(num_tokens, most_tokens(view))
    return ShapePlan(num_tokens=size, reason="exact" if size == view.num_tokens else "padded")


def eagerly(reason: str) -> ShapePlan:
    """In no graph."""
    return ShapePlan(num_tokens=None, reason=reason)
