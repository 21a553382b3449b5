"""No page but those in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.pages import FOR_EVER, PagePlan, PagesView, reclaimed


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDemand:
    """Pages are mapped when a step needs them, and unmapped when their request has ended.

    The least memory that is mapped, and the most mapping: what the others are measured against.
    """

    decides: ClassVar[str] = "pages"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {}

    def decide(self, view: PagesView) -> PagePlan:
        return PagePlan(reclaim=reclaimed(view.free_slots, 0), holds_for=FOR_EVER, reason="on demand")


ON_DEMAND = OnDemand()
