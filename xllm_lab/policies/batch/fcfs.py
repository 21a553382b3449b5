"""The plain policy that the others are measured against: no phases, no gates, strict order of arrival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.api import BatchPlan, BatchView, Packing, by_arrival, num_missing_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Fcfs:
    """First come, first served: running and waiting requests in order of arrival, each all it lacks.

    When blocks run out, the running request that arrived last is preempted, never one older than the request in need.
    """

    decides: ClassVar[str] = "batch"

    def decide(self, view: BatchView) -> BatchPlan:
        packing = Packing(view)
        # A prompt that is being computed may have come before a decoding request, and then goes before it.
        all_decode = not view.prefilling and packing.grant_all_decoding()
        running = [] if all_decode else list(by_arrival(view.running))
        position = 0
        while position < len(running) and packing.tokens_left and packing.seqs_left:
            request = running[position]
            if packing.grant(request, min(packing.tokens_left, num_missing_tokens(request))):
                position += 1
            elif running[-1] is not request:
                packing.preempt(running.pop())
            else:
                return packing.plan("first come, first served; blocks ran out")
        for request in by_arrival(view.waiting):
            if not packing.tokens_left or not packing.seqs_left:
                break
            if not packing.grant(request, min(packing.tokens_left, num_missing_tokens(request))):
                break
        # A prompt that does not fit now does not while blocks in use only grow.
        return packing.plan("first come, first served", repeats=True)
