"""xLLM's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Choice, Flag, Knob, ceil_div
from xllm_lab.policies.shapes import ShapePlan, ShapeView, eagerly, replayed


@dataclass(frozen=True, slots=True, kw_only=True)
class XllmBuckets:
    """1, 2, 4, 8, then multiples of 16; by default, decode batches of 17 sequences and more run eagerly.

    Source: xLLM at 3906f5a, `acl_graph_executor_impl.cpp` for decode, `cuda_graph_executor_impl.cpp` for prefill.

    Attributes:
        acl_graph_decode_batch_size_limit: larger decode batches run eagerly; xLLM asks so on NPUs only.
        enable_graph_mode_decode_no_padding: a graph for each size of a decode batch.
        enable_prefill_piecewise_graph: steps with prompts are replayed, too, but for their attention.
        max_tokens_for_graph_mode: the largest of those; 0 is none.
    """

    decides: ClassVar[str] = "shapes"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {"enable_graph": True}

    acl_graph_decode_batch_size_limit: Annotated[
        int, Knob(1, 256, log=True), Flag("acl_graph_decode_batch_size_limit")
    ] = 16
    enable_graph_mode_decode_no_padding: Annotated[
        bool, Choice(False, True), Flag("enable_graph_mode_decode_no_padding")
    ] = False
    enable_prefill_piecewise_graph: Annotated[bool, Choice(False, True), Flag("enable_prefill_piecewise_graph")] = False
    max_tokens_for_graph_mode: Annotated[int, Flag("max_tokens_for_graph_mode")] = 2048

    def __post_init__(self) -> None:
        for name in ("acl_graph_decode_batch_size_limit", "max_tokens_for_graph_mode"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, at least 0 is accepted")

    def decide(self, view: ShapeView) -> ShapePlan:
        if view.max_context_tokens > view.max_model_len:
            return eagerly("context above the model's")
        if not view.is_decode:
            return self._prefill(view)
        if view.num_seqs > self.acl_graph_decode_batch_size_limit:
            return eagerly("decode batch above the limit")
        return replayed(view, view.num_tokens if self.enable_graph_mode_decode_no_padding else _bucket(view.num_tokens))

    def _prefill(self, view: ShapeView) -> ShapePlan:
        if not self.enable_prefill_piecewise_graph:
            return eagerly("prefill")
        if view.num_tokens > self.max_tokens_for_graph_mode:
            return eagerly("prefill above the limit")
        return replayed(view, _bucket(view.num_tokens))


def _bucket(num_tokens: int) -> int:
    return 1 << (num_tokens - 1).bit_length() if num_tokens <= 8 else 16 * ceil_div(num_tokens, 16)
