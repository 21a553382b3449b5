"""What vLLM's front end does with a data-parallel group: the instance with the least 4 * waiting + running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob
from xllm_lab.policies.routing import InstanceView, RoutePlan, RouteView, by_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """The least `waiting_weight` * waiting + running, and of equals the first.

    What was sent since the last heartbeat waits, as far as the front end knows (`DPLBAsyncMPClient.
    get_core_engine_for_request` of vLLM 0.19, with one front end). Its heartbeats are 100 ms apart.

    Attributes:
        waiting_weight: of a request that waits, against one that runs.
    """

    decides: ClassVar[str] = "route"
    needs_prefix_index: ClassVar[bool] = False

    waiting_weight: Annotated[int, Knob(1, 64, log=True)] = 4

    def __post_init__(self) -> None:
        if self.waiting_weight < 1:
            raise ValueError(f"waiting_weight is {self.waiting_weight}, at least 1 is accepted")

    def decide(self, view: RouteView) -> RoutePlan:
        first = min(by_id(view.instances), key=self._score)
        return RoutePlan(instance=first.id, reason="least waiting and running")

    def _score(self, instance: InstanceView) -> int:
        return self.waiting_weight * (instance.num_waiting + instance.num_sent_since) + instance.num_running
