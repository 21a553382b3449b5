"""xLLM's cache-aware routing, to the letter: what production does today."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.routing import InstanceView, RoutePlan, RouteView, by_id

# cache_aware_routing.cpp:20
MIN_SCORE = -2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAware:
    """xLLM's cache-aware score as shipped, integer divisions included.

    `load_balance_policy=CAR` of xllm-service (cache_aware_routing.cpp:22-85, global_kvcache_mgr.cpp:73-131 and
    instance_mgr.cpp:287-359 at c8033e0). The score is `matched blocks / blocks of the prompt - KV used - waiting / most
    waiting`, and the largest wins. As it is written there:

    - Both quotients are of integers: the first is 1 for a prompt that is cached whole and otherwise 0, the last is 1
      for the longest queue and otherwise 0.
    - An instance with one cached block keeps all others out of the comparison. If nobody has one, the least KV used
      decides alone, without the queues.
    - Figures are the last heartbeat's, so that all of a heartbeat period go to the same instance.
    - There, equal scores are decided by the order of a hash table, and when every candidate is as bad as can be (KV
      full, longest queue) the request is refused. Here the smallest id takes it.
    - An index entry counts for an instance that lacks the blocks before it. Blocks are evicted from the leaf here, so
      that there are no such entries.

    Attributes:
        enable_cache_upload: whether engines tell the router what they cache, as up to release 0.10.0. Engines of
            3906f5a have neither the flag nor the upload (xservice_client.cpp:352-372), which is `False`.
    """

    decides: ClassVar[str] = "route"

    enable_cache_upload: bool = True

    def decide(self, view: RouteView) -> RoutePlan:
        num_blocks = view.request.num_prompt_tokens // view.block_size
        matched = self._matched_blocks(view)
        candidates = [(i, n) for i, n in matched if n] or [(_least_used(by_id(view.instances)), 0)]
        most_waiting = max(i.num_waiting for i, _ in candidates)
        best, best_score = candidates[0][0], MIN_SCORE
        for instance, num_matched in candidates:
            score = (
                (num_matched // num_blocks if num_blocks else 0)
                - instance.kv_used_frac
                - (instance.num_waiting // most_waiting if most_waiting else 0)
            )
            if score > best_score:
                best, best_score = instance, score
        return RoutePlan(instance=best.id, reason="best score as shipped")

    def _matched_blocks(self, view: RouteView) -> list[tuple[InstanceView, int]]:
        if not self.enable_cache_upload:
            return []
        return [(i, i.num_matched_tokens // view.block_size) for i in by_id(view.instances)]


def _least_used(instances: Sequence[InstanceView]) -> InstanceView:
    return min(instances, key=lambda i: i.kv_used_frac)
