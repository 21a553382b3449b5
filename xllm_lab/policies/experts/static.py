"""Experts stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.experts import ExpertsPlan, ExpertsView


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """Neighbouring experts on each device, once each, whatever comes: what the others are measured against."""

    decides: ClassVar[str] = "experts"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {"enable_eplb": False}
    num_redundant_experts: ClassVar[int] = 0
    interval_us: ClassVar[int | None] = None

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        return ExpertsPlan(slots={}, reason="static")


STATIC = Static()
