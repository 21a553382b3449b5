"""Which instances of a fleet compute prompts, which go on from there, and which do both: the interface.

A role is the router's word for what it sends to an instance. All instances are alike, so a role changes at once and
costs nothing: what an instance has it finishes as it began, and the router sends it other requests from now on.

    mixed       serves a request to its end
    prefill     serves a request up to its first token, and hands it over
    decode      takes over requests that have their first token

A policy is asked at the beginning and then at each `FleetConfig.role_interval_us`. It sees instances as `routing` does,
by their last heartbeat, and of latencies what its router has heard of. It keeps nothing: what has changed and when, the
view says. A policy is a frozen, keyword-only dataclass whose annotated fields are its knobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from xllm_lab.policies.routing import InstanceId, InstanceView

Role = Literal["mixed", "prefill", "decode"]
ROLES: tuple[Role, ...] = ("mixed", "prefill", "decode")
# Whom a request may be sent to: while it lacks its first token, and when it has it.
TAKE_PROMPTS: frozenset[Role] = frozenset(("mixed", "prefill"))
TAKE_OVER: frozenset[Role] = frozenset(("mixed", "decode"))


class RoleInstance(InstanceView, Protocol):
    """One instance of the fleet, up or not. Nobody asks it for `num_matched_tokens`: there is no request in hand."""

    @property
    def role(self) -> Role: ...
    @property
    def since_us(self) -> int:
        """When it got its role; 0 if it has had it from the beginning."""
        ...

    @property
    def is_up(self) -> bool:
        """If it is not, its figures are those of when it was."""
        ...


class Heard(Protocol):
    """What a router has heard of latencies lately, with each handover and each end.

    Of a request that is not handed over it hears when that has ended. Promises that were not made are kept.
    """

    @property
    def since_us(self) -> int:
        """From when on: a window ago, or when roles changed last."""
        ...

    @property
    def num_first_tokens(self) -> int:
        """First tokens heard of since."""
        ...

    @property
    def num_in_time(self) -> int:
        """Of those, how many came within their requests' TTFT."""
        ...

    @property
    def num_overdue(self) -> int:
        """Requests now under way of whose first token nothing was heard, and whose TTFT is over."""
        ...

    @property
    def num_ends(self) -> int:
        """Requests heard of since that ended with all their tokens."""
        ...

    @property
    def num_steady(self) -> int:
        """Of those, how many kept their TPOT."""
        ...


class RolesView(Protocol):
    """A fleet at a moment in which roles may change."""

    @property
    def now_us(self) -> int: ...
    @property
    def instances(self) -> Sequence[RoleInstance]:
        """All of them, in no promised order: see `by_id`."""
        ...

    @property
    def heard(self) -> Heard: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RolesPlan:
    """New roles of the instances that change theirs, and why, in one phrase for the decision log."""

    roles: Mapping[InstanceId, Role]
    reason: str


class RolesPolicy(Protocol):
    """Who does what."""

    decides: ClassVar[str]  # "roles"

    def decide(self, view: RolesView) -> RolesPlan:
        """A legal plan (see `fleet_checks.roles_violations`). Pure."""
        ...


def changes(view: RolesView, roles: Mapping[InstanceId, Role], reason: str) -> RolesPlan:
    """A plan of those of `roles` that are new."""
    now = {i.id: i.role for i in view.instances}
    return RolesPlan(roles={i: role for i, role in roles.items() if now[i] != role}, reason=reason)


def first_split(view: RolesView, num_prefill: int) -> dict[InstanceId, Role]:
    """The first so many instances by id compute prompts, at least one and all but one; one alone does both."""
    ids = sorted(i.id for i in view.instances)
    if len(ids) == 1:
        return {ids[0]: "mixed"}
    num_prefill = min(max(num_prefill, 1), len(ids) - 1)
    return {i: "prefill" if rank < num_prefill else "decode" for rank, i in enumerate(ids)}
