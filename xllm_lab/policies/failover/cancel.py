"""A request ends with its instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.failover import FailoverPlan, FailoverView


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Whatever was on a failed instance is cancelled, as xllm-service does; the client may send it again."""

    decides: ClassVar[str] = "failover"

    def decide(self, view: FailoverView) -> FailoverPlan:
        return FailoverPlan(action="cancel", reason="lost with its instance")
