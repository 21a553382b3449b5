"""What a routing or failover plan must obey before a fleet acts on it; used by the host and by the contract suite."""

from __future__ import annotations

from xllm_lab.policies.failover import ACTIONS, FailoverPlan, FailoverView
from xllm_lab.policies.routing import RoutePlan, RouteView, by_id


def route_violations(view: RouteView, plan: RoutePlan) -> list[str]:
    """Every rule the plan breaks, one sentence each; none if it names an instance that is up."""
    if any(i.id == plan.instance for i in view.instances):
        return []
    up = ", ".join(str(i.id) for i in by_id(view.instances))
    return [f"sends request {view.request.id} to instance {plan.instance!r}, up are {up}"]


def failover_violations(view: FailoverView, plan: FailoverPlan) -> list[str]:
    """Every rule the plan breaks, one sentence each; none if it names an action."""
    if plan.action in ACTIONS:
        return []
    return [f"wants to {plan.action!r} request {view.request.id}, {' or '.join(ACTIONS)} is possible"]
