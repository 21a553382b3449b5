"""The plain policy that the others are measured against: everyone in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.routing import RoutePlan, RouteView, by_id


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRobin:
    """Instances in turn, in order of id, whatever they are doing.

    xllm-service's RR, its default (instance_mgr.cpp:215-254 at c8033e0). There each instance list has a position of its
    own; here the turn is the number of requests routed, which is the same while no instance comes or goes.
    """

    decides: ClassVar[str] = "route"
    needs_prefix_index: ClassVar[bool] = False

    def decide(self, view: RouteView) -> RoutePlan:
        instances = by_id(view.instances)
        return RoutePlan(instance=instances[view.num_routed % len(instances)].id, reason="its turn")
