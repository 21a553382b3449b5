"""xLLM's default: every decoding request first, then prompts with what is left of the budget (Sarathi-style)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Annotated, ClassVar

from xllm_lab.policies.api import (
    BatchPlan,
    BatchView,
    Choice,
    Flag,
    Knob,
    Packing,
    RequestView,
    num_missing_tokens,
    refuse_below,
)
from xllm_lab.policies.batch.admission import (
    ORDERS,
    Admission,
    Stopwatch,
    decode_with_preemption,
    prefilling_in_order,
    queue_order,
    unblock_the_oldest,
    waiting_in_order,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeFirst:
    """Decode, then continue prompts, then admit new ones; left-over budget lengthens the chunks.

    xLLM's DecodeFirstPolicy (decode_first_policy.cpp:30-150 at 3906f5a). A later prompt chunk never re-matches the
    prefix cache here, which xLLM does `chunked_match_frequency` times.

    Attributes:
        max_tokens_per_chunk: `max_tokens_per_chunk_for_prefill`.
        watermark_frac: `prefill_scheduling_memory_usage_threshold`.
        footprint_margin: blocks in use count this much when a fresh prompt is weighed while others decode. No knob: it
            is a constant in xLLM.
        order: `priority_strategy`.
        max_ttft_us: `max_global_ttft_ms`, budget of a step without decodes; needs step times.
        max_tpot_us: `max_global_tpot_ms`, budget of a step with decodes; needs step times.
    """

    decides: ClassVar[str] = "batch"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {"enable_chunked_prefill": True, "enable_mix_batch": True}

    max_tokens_per_chunk: Annotated[int, Knob(32, 10240, log=True), Flag("max_tokens_per_chunk_for_prefill")] = 10240
    watermark_frac: Annotated[float, Knob(0.5, 1.0), Flag("prefill_scheduling_memory_usage_threshold")] = 0.95
    footprint_margin: float = 1.1
    order: Annotated[str, Choice(*ORDERS), Flag("priority_strategy")] = "fcfs"
    max_ttft_us: Annotated[int | None, Flag("max_global_ttft_ms", divide_by=1000)] = None
    max_tpot_us: Annotated[int | None, Flag("max_global_tpot_ms", divide_by=1000)] = None

    def __post_init__(self) -> None:
        queue_order(self.order)
        refuse_below(
            1,
            max_tokens_per_chunk=self.max_tokens_per_chunk,
            max_ttft_us=self.max_ttft_us,
            max_tpot_us=self.max_tpot_us,
        )
        refuse_below(0, footprint_margin=self.footprint_margin)
        if not 0 < self.watermark_frac <= 1:
            raise ValueError(f"watermark_frac is {self.watermark_frac}, more than 0 and at most 1 is accepted")

    def decide(self, view: BatchView) -> BatchPlan:
        packing = Packing(view)
        chunking = prefilling_in_order(view, self.order)
        decode_watch = Stopwatch(view, self.max_tpot_us)
        decode_with_preemption(view, packing, chunking, self.order, decode_watch)
        has_decodes = bool(packing)
        if has_decodes and (packing.is_full or not (chunking or view.waiting)):
            return packing.plan("decode first", repeats=decode_watch.is_unlimited)
        used_blocks = view.num_blocks - packing.blocks_left
        admission = Admission(
            view,
            packing,
            decode_watch if has_decodes else Stopwatch(view, self.max_ttft_us),
            max_tokens_per_chunk=self.max_tokens_per_chunk,
            watermark_frac=self.watermark_frac,
            reserved_blocks=self.footprint_margin * used_blocks if has_decodes else 0.0,
        )
        admission.admit(chunking, fresh=False)
        if len(admission.granted) == len(chunking) and not packing.is_full:
            admission.admit(waiting_in_order(view, self.order), fresh=True)
        if packing.tokens_left:
            admission.give_back_the_rest()
        if not packing:
            unblock_the_oldest(packing, chunking, self.max_tokens_per_chunk)
        # What keeps a prompt out, keeps it out while blocks in use only grow; a time budget weighs the clock.
        if not decode_watch.is_unlimited:
            return packing.plan("decode first")
        return packing.plan(
            "decode first",
            repeats=True,
            chunk_repeats=_chunks_to_come(packing, admission.granted),
            # Or its next chunk would find the pool in use up to the watermark.
            keeps_free_blocks=view.num_blocks - ceil(self.watermark_frac * view.num_blocks) + 1,
        )


def _chunks_to_come(packing: Packing, granted: list[RequestView]) -> int:
    """How often the only prompt, which takes all tokens that decodes leave, does so again without being finished."""
    if len(granted) != 1 or packing.tokens_left:
        return 0
    return max(0, (num_missing_tokens(granted[0]) - 1) // packing.granted(granted[0]) - 1)
