"""No speculation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.draft import DraftPlan, DraftView


@dataclass(frozen=True, slots=True, kw_only=True)
class Off:
    """Nobody drafts."""

    decides: ClassVar[str] = "draft"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {}

    def decide(self, view: DraftView) -> DraftPlan:
        return DraftPlan(reason="off")


OFF = Off()
