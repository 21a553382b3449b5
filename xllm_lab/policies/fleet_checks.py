"""What a routing, failover or roles plan must obey before a fleet acts on it; used by host and contract suite."""

from __future__ import annotations

from xllm_lab.policies.failover import ACTIONS, FailoverPlan, FailoverView
from xllm_lab.policies.roles import ROLES, TAKE_OVER, TAKE_PROMPTS, RolesPlan, RolesView
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


def roles_violations(view: RolesView, plan: RolesPlan) -> list[str]:
    """Every rule the plan breaks, one sentence each; none if each stage of a request has an instance."""
    roles = {i.id: i.role for i in by_id(view.instances)}
    known = ", ".join(map(str, roles))
    broken = [f"gives a role to instance {i!r}, there are {known}" for i in plan.roles if i not in roles]
    wrong = [(i, role) for i, role in plan.roles.items() if role not in ROLES]
    broken += [f"makes instance {i!r} a {role!r}, {', '.join(ROLES)} are possible" for i, role in wrong]
    if broken:
        return broken
    after = {*{**roles, **plan.roles}.values()}
    if not after & TAKE_PROMPTS:
        broken.append("leaves no instance that computes prompts")
    if not after & TAKE_OVER:
        broken.append("leaves no instance that takes over")
    return broken
