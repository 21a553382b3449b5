"""vLLM's scheduler: what runs comes first, in the order it was let in; then what waits, in order of arrival."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Annotated, ClassVar

from xllm_lab.policies.api import (
    BatchPlan,
    BatchView,
    Choice,
    Packing,
    admission_key,
    by_arrival,
    ceil_div,
    num_missing_tokens,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """First come, first served as vLLM V1 does it, prompts cut to what is left of the token budget.

    When blocks run out, the request let in last is preempted, be it the one in need; a step that preempted lets nobody
    in. Who drains is on the list of running requests like any other: it takes a place there, and can be preempted.
    `Scheduler.schedule` in `vllm/v1/core/sched/scheduler.py` of vLLM 0.19.

    Attributes:
        reserve_whole_prompt: let a request in only if all that is known of it fits, not just its first chunk
            (`scheduler_reserve_full_isl`).
    """

    decides: ClassVar[str] = "batch"
    reserve_whole_prompt: Annotated[bool, Choice(True, False)] = True

    def decide(self, view: BatchView) -> BatchPlan:
        packing = Packing(view)
        all_decode = not view.prefilling and packing.grant_all_decoding()
        queues = () if all_decode else (view.decoding, view.prefilling, view.draining)
        running = sorted(chain.from_iterable(queues), key=admission_key)
        draining = {r.id for r in view.draining}
        position = num_preempted = 0
        while position < len(running) and packing.tokens_left:
            request = running[position]
            if request.id in draining:
                position += 1
                continue
            if packing.grant(request, min(packing.tokens_left, num_missing_tokens(request))):
                position += 1
                continue
            packing.preempt(running.pop())
            num_preempted += 1
        if num_preempted:
            return packing.plan("first come, first served; blocks ran out")
        num_running = len(view.running) + len(draining)
        for request in by_arrival(view.waiting):
            if not packing.tokens_left or num_running >= view.max_seqs_per_batch:
                break
            whole = ceil_div(request.num_tokens, view.block_size) - request.num_blocks + request.num_idle_blocks
            if self.reserve_whole_prompt and whole > packing.blocks_left:
                break
            if not packing.grant(request, min(packing.tokens_left, num_missing_tokens(request))):
                break
            num_running += 1
        # A prompt that does not fit now does not while blocks in use only grow.
        return packing.plan("first come, first served", repeats=True)
