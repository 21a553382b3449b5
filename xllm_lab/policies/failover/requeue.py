"""A request outlives its instance, so often and so long as it is worth it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Choice, Knob, Needs
from xllm_lab.policies.failover import FailoverPlan, FailoverView


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue:
    """A request of a failed instance is routed again, and starts over.

    Attributes:
        max_failovers: it is cancelled when it loses an instance after so many fresh starts. A request that brings its
            instances down would otherwise visit them all.
        waits_for_repair: with no instance up, it waits for one; otherwise it is cancelled.
    """

    decides: ClassVar[str] = "failover"

    max_failovers: Annotated[int, Knob(0, 8), Needs("outages")] = 3
    waits_for_repair: Annotated[bool, Choice(False, True), Needs("outages")] = True

    def __post_init__(self) -> None:
        if self.max_failovers < 0:
            raise ValueError(f"max_failovers is {self.max_failovers}, at least 0 is accepted")

    def decide(self, view: FailoverView) -> FailoverPlan:
        if view.request.num_failovers >= self.max_failovers:
            return FailoverPlan(action="cancel", reason="started over too often")
        if not view.num_up_instances and not self.waits_for_repair:
            return FailoverPlan(action="cancel", reason="no instance is up")
        return FailoverPlan(action="requeue", reason="starts over elsewhere")
