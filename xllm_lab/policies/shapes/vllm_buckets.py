"""vLLM's graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Choice, ceil_div
from xllm_lab.policies.shapes import ShapePlan, ShapeView, eagerly, replayed

_MODES = ("full_decode_only", "full_and_piecewise")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmBuckets:
    """1, 2, 4, every 8th below 256, every 16th up to min(2 * max_seqs_per_batch, 512) tokens; prompts included.

    Source: `VllmConfig._set_cudagraph_sizes` of vLLM 0.11 and later, which never captures more than a step may hold.

    Attributes:
        cudagraph_mode: as vLLM's, in lower case; its default replays steps with prompts, but for their attention.
    """

    decides: ClassVar[str] = "shapes"

    cudagraph_mode: Annotated[str, Choice(*_MODES)] = "full_and_piecewise"

    def __post_init__(self) -> None:
        if self.cudagraph_mode not in _MODES:
            raise ValueError(f"cudagraph_mode is {self.cudagraph_mode!r}, accepted: {', '.join(_MODES)}")

    def decide(self, view: ShapeView) -> ShapePlan:
        if not view.is_decode and self.cudagraph_mode == "full_decode_only":
            return eagerly("prefill")
        size = _bucket(view.num_tokens)
        if size > min(2 * view.max_seqs_per_batch, 512):
            return eagerly("above the largest graph")
        return replayed(view, size)


def _bucket(num_tokens: int) -> int:
    if num_tokens <= 4:
        return 1 << (num_tokens - 1).bit_length()
    return 8 * ceil_div(num_tokens, 8) if num_tokens <= 248 else 16 * ceil_div(num_tokens, 16)
