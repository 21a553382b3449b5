"""What becomes of a request whose instance failed: the interface, and one file a policy beside it.

Its KV is lost. Sent to another instance, it starts again from its prompt and the tokens it has produced; the client
keeps those it was already given. A policy is a frozen, keyword-only dataclass whose annotated fields are its knobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from xllm_lab.policies.api import RequestId

Action = Literal["requeue", "cancel"]
ACTIONS: tuple[Action, ...] = ("requeue", "cancel")


class FailedRequest(Protocol):
    """What a router knows of a request that was on an instance as it failed."""

    @property
    def id(self) -> RequestId: ...
    @property
    def arrival_us(self) -> int: ...
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
    @property
    def num_output_tokens(self) -> int:
        """Tokens it has produced so far."""
        ...

    @property
    def num_failovers(self) -> int:
        """How often it was requeued before."""
        ...


class FailoverView(Protocol):
    """A fleet at the moment in which it learns that the request's instance failed."""

    @property
    def now_us(self) -> int: ...
    @property
    def request(self) -> FailedRequest: ...
    @property
    def num_up_instances(self) -> int:
        """Instances that could take it; with none, a requeued request waits for the first that comes back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverPlan:
    """`requeue`: routed again, now. `cancel`: it ends, unfinished. And why, in one phrase for the decision log."""

    action: Action
    reason: str


class FailoverPolicy(Protocol):
    """Whether a request outlives its instance."""

    decides: ClassVar[str]  # "failover"

    def decide(self, view: FailoverView) -> FailoverPlan:
        """A legal plan (see `fleet_checks.failover_violations`). Pure."""
        ...
