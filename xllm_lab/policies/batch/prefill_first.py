"""Prompts have the step to themselves; decoding requests run only when no prompt could be scheduled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import BatchPlan, BatchView, Choice, Flag, Knob, Packing, refuse_below
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
class PrefillFirst:
    """Prompts first and alone: the shortest TTFT, at the price of stalled decodes.

    xLLM's PrefillFirstPolicy (prefill_first_policy.cpp:31-125 at 3906f5a), which it also takes whenever batches may
    not be mixed. Fields as in `DecodeFirst`.
    """

    decides: ClassVar[str] = "batch"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {"enable_chunked_prefill": True, "enable_mix_batch": False}

    max_tokens_per_chunk: Annotated[int, Knob(32, 10240, log=True), Flag("max_tokens_per_chunk_for_prefill")] = 10240
    watermark_frac: Annotated[float, Knob(0.5, 1.0), Flag("prefill_scheduling_memory_usage_threshold")] = 0.95
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
        if not 0 < self.watermark_frac <= 1:
            raise ValueError(f"watermark_frac is {self.watermark_frac}, more than 0 and at most 1 is accepted")

    def decide(self, view: BatchView) -> BatchPlan:
        packing = Packing(view)
        chunking = prefilling_in_order(view, self.order)
        decoding = view.decoding
        admission = Admission(
            view,
            packing,
            Stopwatch(view, self.max_ttft_us),
            max_tokens_per_chunk=self.max_tokens_per_chunk,
            watermark_frac=self.watermark_frac if decoding else 1.0,
            # Blocks that decoding requests hold stay theirs while they wait.
            reserved_blocks=view.num_blocks - view.num_free_blocks,
        )
        admission.admit(chunking, fresh=False)
        if len(admission.granted) == len(chunking) and not (decoding and self._is_nearly_full(view)):
            admission.admit(waiting_in_order(view, self.order), fresh=True)
        if packing:
            return packing.plan("prompts")
        decode_watch = Stopwatch(view, self.max_tpot_us)
        decode_with_preemption(view, packing, chunking, self.order, decode_watch)
        unblock_the_oldest(packing, chunking, self.max_tokens_per_chunk)
        # What keeps a prompt out, keeps it out while blocks in use only grow; a time budget weighs the clock.
        is_timed = not (decode_watch.is_unlimited and Stopwatch(view, self.max_ttft_us).is_unlimited)
        return packing.plan("decodes", repeats=not is_timed)

    def _is_nearly_full(self, view: BatchView) -> bool:
        return view.num_blocks - view.num_free_blocks >= self.watermark_frac * view.num_blocks
