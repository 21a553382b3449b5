"""xLLM's cache-aware routing as it was meant, each flaw mended and each term weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, Needs
from xllm_lab.policies.routing import InstanceView, RoutePlan, RouteView, in_turn


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAwareCorrected:
    """xLLM's cache-aware score with its divisions, its candidates and its view of the queues put right.

    Against `CacheAware`:

    - Quotients are fractions: half a prompt cached is worth half a whole one.
    - Every instance that is up is a candidate: an idle one can win against a busy one that has the first block.
    - Requests sent since the last heartbeat count as waiting: requests between two heartbeats spread.
    - Queues are measured in sequences of a batch, not in the longest queue. There, one waiting request where the others
      have none weighs as much as a cached prompt.
    - Whose turn it is decides among equals, not the order of a hash table or the smallest id.
    - Somebody is always chosen.

    Attributes:
        match_weight: worth of a prompt that is cached whole.
        usage_weight: cost of a pool that is full.
        waiting_weight: cost of a whole batch that waits.
    """

    decides: ClassVar[str] = "route"

    match_weight: Annotated[float, Knob(0.0, 4.0), Needs("instances", 2)] = 1.0
    usage_weight: Annotated[float, Knob(0.0, 4.0), Needs("instances", 2)] = 1.0
    waiting_weight: Annotated[float, Knob(0.0, 16.0), Needs("instances", 2)] = 1.0

    def __post_init__(self) -> None:
        for name in ("match_weight", "usage_weight", "waiting_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, at least 0 is accepted")

    def decide(self, view: RouteView) -> RoutePlan:
        def score(instance: InstanceView) -> float:
            num_waiting = instance.num_waiting + instance.num_sent_since
            return (
                self.match_weight * instance.num_matched_tokens / view.request.num_prompt_tokens
                - self.usage_weight * instance.kv_used_frac
                - self.waiting_weight * num_waiting / instance.max_seqs_per_batch
            )

        return RoutePlan(instance=max(in_turn(view), key=score).id, reason="best score")
