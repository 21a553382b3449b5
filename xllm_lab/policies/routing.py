"""The interface of routing policies: which instance of a fleet takes a request.

A router knows its instances by their last heartbeat: every load figure of an `InstanceView` was true at `as_of_us`, not
now. What it sent since, it knows itself. Its only memory is how many requests it has routed, which the view says; a
policy keeps none. As in `api`, a policy is a frozen, keyword-only dataclass whose annotated fields are its knobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NewType, Protocol, TypeVar

from xllm_lab.policies.api import RequestId

InstanceId = NewType("InstanceId", int)
# What a request is sent for: all of it; its first token; or, as it has that, the others. See `roles`.
Stage = Literal["whole", "prefill", "decode"]
STAGES: tuple[Stage, ...] = ("whole", "prefill", "decode")


class ArrivedRequest(Protocol):
    """What a router knows of the request in hand. The output length is not known."""

    @property
    def id(self) -> RequestId: ...
    @property
    def arrival_us(self) -> int:
        """When it reached the fleet: before now if an instance that had it failed."""
        ...

    @property
    def priority(self) -> int:
        """1 is high, 2 normal, 3 low."""
        ...

    @property
    def ttft_slo_us(self) -> int | None: ...
    @property
    def tpot_slo_us(self) -> int | None: ...
    @property
    def num_prompt_tokens(self) -> int: ...


class InstanceView(Protocol):
    """One instance that is up, as it was at its last heartbeat."""

    @property
    def id(self) -> InstanceId: ...
    @property
    def as_of_us(self) -> int:
        """When the figures below were taken."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that hold KV."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that hold none yet, or none any more."""
        ...

    @property
    def num_outstanding_tokens(self) -> int:
        """Known tokens of those requests that are not in KV: one for a decoding request, more for a prompt."""
        ...

    @property
    def kv_used_frac(self) -> float:
        """KV blocks that running requests hold, of all; cached blocks that nobody uses are free."""
        ...

    @property
    def num_matched_tokens(self) -> int:
        """Prompt tokens of the request in hand cached there: whole blocks, from the first one on, without a gap.

        A host may look them up when asked; a policy that does not need them does not ask.
        """
        ...

    @property
    def max_seqs_per_batch(self) -> int: ...
    @property
    def num_sent_since(self) -> int:
        """Requests that the router sent there after `as_of_us`; the figures above do not count them."""
        ...

    @property
    def num_sent_tokens_since(self) -> int:
        """Prompt tokens of those."""
        ...


class RouteView(Protocol):
    """A fleet at the moment in which a request needs an instance."""

    @property
    def now_us(self) -> int: ...
    @property
    def request(self) -> ArrivedRequest: ...
    @property
    def stage(self) -> Stage:
        """What the request is sent for; instances whose role is another are not shown, unless no other is up."""
        ...

    @property
    def num_routed(self) -> int:
        """Requests that the router has sent to instances before this one for the same stage, requeued ones again."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens per block of the prefix index."""
        ...

    @property
    def instances(self) -> Sequence[InstanceView]:
        """Those that are up, at least one, in no promised order: see `by_id`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    """Where the request goes, and why, in one phrase for the decision log."""

    instance: InstanceId
    reason: str


class RoutePolicy(Protocol):
    """Which instance takes a request."""

    decides: ClassVar[str]  # "route"

    def decide(self, view: RouteView) -> RoutePlan:
        """A legal plan (see `fleet_checks.route_violations`). Pure."""
        ...


I = TypeVar("I", bound=InstanceView)  # noqa: E741


class ById(list[I]):
    """A list that its owner keeps sorted by id."""


def by_id(instances: Sequence[I]) -> Sequence[I]:
    """Sorted by id. Hosts keep their instances so, and then this costs nothing."""
    return instances if isinstance(instances, ById) else sorted(instances, key=lambda i: i.id)


def in_turn(view: RouteView) -> Sequence[InstanceView]:
    """The instances, beginning with the one whose turn it is: whoever takes the first among equals takes turns."""
    instances = by_id(view.instances)
    turn = view.num_routed % len(instances)
    return [*instances[turn:], *instances[:turn]]


def num_outstanding(instance: InstanceView) -> int:
    """Requests there, as far as the router can know: at the last heartbeat, and sent since."""
    return instance.num_running + instance.num_waiting + instance.num_sent_since
