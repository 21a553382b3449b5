"""vLLM's graphs."""

from __future__ import annotations

import functools
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
        cudagraph_capture_sizes: as vLLM's, in place of those, with commas between; larger steps run eagerly.
    """

    decides: ClassVar[str] = "shapes"

    cudagraph_mode: Annotated[str, Choice(*_MODES)] = "full_and_piecewise"
    cudagraph_capture_sizes: str = ""

    def __post_init__(self) -> None:
        if self.cudagraph_mode not in _MODES:
            raise ValueError(f"cudagraph_mode is {self.cudagraph_mode!r}, accepted: {', '.join(_MODES)}")
        _captured(self.cudagraph_capture_sizes)

    def decide(self, view: ShapeView) -> ShapePlan:
        if not view.is_decode and self.cudagraph_mode == "full_decode_only":
            return eagerly("prefill")
        if sizes := _captured(self.cudagraph_capture_sizes):
            size = next((size for size in sizes if size >= view.num_tokens), None)
        else:
            size = _bucket(view.num_tokens)
            size = size if size <= min(2 * view.max_seqs_per_batch, 512) else None
        return eagerly("above the largest graph") if size is None else replayed(view, size)


@functools.cache
def _captured(sizes: str) -> tuple[int, ...]:
    """The sizes named, ascending. ValueError if they are no numbers of tokens."""
    try:
        found = tuple(sorted({int(size) for size in sizes.split(",")})) if sizes else ()
    except ValueError:
        found = (0,)
    if found and found[0] < 1:
        raise ValueError(
            f"cudagraph_capture_sizes is {sizes!r}, numbers of at least 1 with commas between are accepted"
        )
    return found


def _bucket(num_tokens: int) -> int:
    if num_tokens <= 4:
        return 1 << (num_tokens - 1).bit_length()
    return 8 * ceil_div(num_tokens, 8) if num_tokens <= 248 else 16 * ceil_div(num_tokens, 16)
