"""Few graphs: each is twice the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Choice, Knob
from xllm_lab.policies.shapes import ShapePlan, ShapeView, eagerly, replayed


@dataclass(frozen=True, slots=True, kw_only=True)
class PowersOfTwo:
    """1, 2, 4, 8, ... tokens: the fewest graphs, and up to half of a step is padding.

    Attributes:
        max_graph_tokens: larger steps run eagerly.
        graphs_prefill: steps that compute more than one token of some sequence are replayed, too.
    """

    decides: ClassVar[str] = "shapes"

    max_graph_tokens: Annotated[int, Knob(1, 1024, log=True)] = 256
    graphs_prefill: Annotated[bool, Choice(False, True)] = False

    def __post_init__(self) -> None:
        if self.max_graph_tokens < 1:
            raise ValueError(f"max_graph_tokens is {self.max_graph_tokens}, at least 1 is accepted")

    def decide(self, view: ShapeView) -> ShapePlan:
        if not view.is_decode and not self.graphs_prefill:
            return eagerly("prefill")
        if view.num_tokens > self.max_graph_tokens:
            return eagerly("above the largest graph")
        return replayed(view, 1 << (view.num_tokens - 1).bit_length())
