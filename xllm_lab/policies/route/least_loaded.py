"""The instance with the least to do, as far as the router can know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Choice
from xllm_lab.policies.routing import InstanceView, RoutePlan, RouteView, in_turn, num_outstanding

# What "load" may mean. Of equal rational loads the floats are equal, too: the quotient of two integers is rounded once.
LOADS: dict[str, Callable[[InstanceView], float]] = {
    "requests": num_outstanding,
    "seats": lambda i: num_outstanding(i) / i.max_seqs_per_batch,
    "tokens": lambda i: i.num_outstanding_tokens + i.num_sent_tokens_since,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastLoaded:
    """The instance with the least outstanding work; whose turn it is decides among equals.

    Running and waiting requests count, and those sent since the last heartbeat. A router that looks at the waiting
    queue alone sees no load until an instance is full (Vidur's LOR at 7d47513), and one that trusts heartbeats alone
    sends all requests of a heartbeat period to one instance.

    Attributes:
        load: `requests` outstanding; `seats`, the same as a part of the instance's sequence budget, for instances of
            unequal size; `tokens` still to compute, where prompts differ much.
    """

    decides: ClassVar[str] = "route"
    needs_prefix_index: ClassVar[bool] = False

    load: Annotated[str, Choice(*LOADS)] = "requests"

    def __post_init__(self) -> None:
        if self.load not in LOADS:
            raise ValueError(f"load is {self.load!r}, accepted: {', '.join(LOADS)}")

    def decide(self, view: RouteView) -> RoutePlan:
        return RoutePlan(instance=min(in_turn(view), key=LOADS[self.load]).id, reason="least loaded")
