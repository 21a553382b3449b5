"""Bad routing, failover and roles policies, kept on purpose: each breaks one law of the contract. See `sins`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from xllm_lab.policies.failover import FailoverPlan, FailoverView
from xllm_lab.policies.roles import Role, RolesPlan, RolesView, first_split
from xllm_lab.policies.routing import InstanceId, InstanceView, RoutePlan, RouteView, by_id, num_outstanding


def to(instance: InstanceView) -> RoutePlan:
    return RoutePlan(instance=instance.id, reason="so be it")


def either(cancels: bool) -> FailoverPlan:
    return FailoverPlan(action="cancel" if cancels else "requeue", reason="so be it")


@dataclass(frozen=True, slots=True, kw_only=True)
class _RouteSin:
    decides: ClassVar[str] = "route"


@dataclass(frozen=True, slots=True, kw_only=True)
class _FailoverSin:
    decides: ClassVar[str] = "failover"


@dataclass(frozen=True, slots=True, kw_only=True)
class _RolesSin:
    decides: ClassVar[str] = "roles"


@dataclass(frozen=True, slots=True, kw_only=True)
class CountsFromNought(_RouteSin):
    """Takes a place in the list for an id. Broken law: legal."""

    def decide(self, view: RouteView) -> RoutePlan:
        return RoutePlan(instance=InstanceId(view.num_routed % len(view.instances)), reason="its turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class DividesByQueues(_RouteSin):
    """Forgets that all queues may be empty. Broken law: legal."""

    def decide(self, view: RouteView) -> RoutePlan:
        longest = max(i.num_waiting for i in view.instances)
        return to(min(by_id(view.instances), key=lambda i: i.num_waiting / longest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembers(_RouteSin):
    """Counts for itself instead of reading `num_routed`. Broken law: repeatable."""

    sent: list[int] = field(default_factory=list)

    def decide(self, view: RouteView) -> RoutePlan:
        self.sent.append(view.now_us)
        return to(by_id(view.instances)[len(self.sent) % len(view.instances)])


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOfObjects(_RouteSin):
    """Takes whichever lies first in memory. Broken law: repeatable."""

    def decide(self, view: RouteView) -> RoutePlan:
        return to(min(set(view.instances), key=lambda i: i.num_waiting))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoTieBreak(_RouteSin):
    """The first of equals in the order of the view. Broken law: order-free."""

    def decide(self, view: RouteView) -> RoutePlan:
        return to(min(view.instances, key=num_outstanding))


@dataclass(frozen=True, slots=True, kw_only=True)
class IdsByRemainder(_RouteSin):
    """Reads a meaning into ids. Broken law: identity-free."""

    def decide(self, view: RouteView) -> RoutePlan:
        return to(min(view.instances, key=lambda i: (i.id % 4, i.id)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsByRemainder(_RouteSin):
    """Takes the request's id for a counter. Broken law: identity-free."""

    def decide(self, view: RouteView) -> RoutePlan:
        return to(by_id(view.instances)[view.request.id % len(view.instances)])


@dataclass(frozen=True, slots=True, kw_only=True)
class SortsTheView(_RouteSin):
    """Puts the router's list in order. Broken law: pure."""

    def decide(self, view: RouteView) -> RoutePlan:
        instances: Any = view.instances
        instances.sort(key=lambda i: i.id)
        return to(instances[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class CountsWhatItSends(_RouteSin):
    """Does the router's book-keeping. Broken law: pure."""

    def decide(self, view: RouteView) -> RoutePlan:
        chosen: Any = min(by_id(view.instances), key=num_outstanding)
        chosen.num_sent_since += 1
        return to(chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOfNames(_RouteSin):
    """Iterates in the order of hashed strings. Broken law: hash-free."""

    def decide(self, view: RouteView) -> RoutePlan:
        by_name = {f"instance {rank}": i for rank, i in enumerate(by_id(view.instances))}
        return to(by_name[next(iter(set(by_name)))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrugs(_FailoverSin):
    """Knows a third way. Broken law: legal."""

    def decide(self, view: FailoverView) -> FailoverPlan:
        action: Any = "requeue" if view.num_up_instances else "wait"
        return FailoverPlan(action=action, reason="so be it")


@dataclass(frozen=True, slots=True, kw_only=True)
class EverySecond(_FailoverSin):
    """Cancels every second request that it sees. Broken law: repeatable."""

    seen: list[int] = field(default_factory=list)

    def decide(self, view: FailoverView) -> FailoverPlan:
        self.seen.append(view.now_us)
        return either(cancels=len(self.seen) % 2 == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenIds(_FailoverSin):
    """Cancels requests of an even id. Broken law: identity-free."""

    def decide(self, view: FailoverView) -> FailoverPlan:
        return either(cancels=view.request.id % 4 == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CountsFailovers(_FailoverSin):
    """Does the router's book-keeping. Broken law: pure."""

    def decide(self, view: FailoverView) -> FailoverPlan:
        request: Any = view.request
        request.num_failovers += 1
        return either(cancels=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HashesNames(_FailoverSin):
    """Lets a hashed string decide. Broken law: hash-free."""

    def decide(self, view: FailoverView) -> FailoverPlan:
        return either(cancels=hash(f"{view.request.num_prompt_tokens} tokens") % 2 == 0)


def be(roles: dict[InstanceId, Role]) -> RolesPlan:
    return RolesPlan(roles=roles, reason="so be it")


@dataclass(frozen=True, slots=True, kw_only=True)
class SendsAllToOneSide(_RolesSin):
    """As long as first tokens are late, everybody computes prompts. Broken law: legal."""

    def decide(self, view: RolesView) -> RolesPlan:
        return be({i.id: "prefill" for i in view.instances if view.heard.num_overdue})


@dataclass(frozen=True, slots=True, kw_only=True)
class RemembersHalves(_RolesSin):
    """Swaps sides each time that it is asked. Broken law: repeatable."""

    seen: list[int] = field(default_factory=list)

    def decide(self, view: RolesView) -> RolesPlan:
        self.seen.append(view.now_us)
        return be(first_split(view, 1 + len(self.seen) % 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstListedPrefills(_RolesSin):
    """Takes the order of the view for one of the fleet. Broken law: order-free."""

    def decide(self, view: RolesView) -> RolesPlan:
        first, *others = view.instances
        return be({first.id: "prefill" if others else "mixed", **{i.id: "mixed" for i in others}})


@dataclass(frozen=True, slots=True, kw_only=True)
class OddIdsDoBoth(_RolesSin):
    """Reads a meaning into ids. Broken law: identity-free."""

    def decide(self, view: RolesView) -> RolesPlan:
        return be({i.id: "mixed" for i in view.instances if i.id % 4})


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesRoles(_RolesSin):
    """Does what it should only say. Broken law: pure."""

    def decide(self, view: RolesView) -> RolesPlan:
        for instance in view.instances:
            written: Any = instance
            written.since_us = view.now_us
        return be({})
