"""Pages policies that sin, and one that does anything legal."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.pages import PagePlan, PagesView, SlotId


@dataclass(frozen=True, slots=True, kw_only=True)
class WildPages:
    """Anything that is legal, drawn from what it sees."""

    decides: ClassVar[str] = "pages"
    seed: int = 0

    def decide(self, view: PagesView) -> PagePlan:
        slots = sorted(view.free_slots, key=lambda s: s.id)
        rng = random.Random(f"{self.seed} {slots} {view.num_mapped_pages} {view.num_used_pages}")
        reclaim = {s.id: rng.randrange(s.num_pages) for s in slots if rng.random() < 0.3}
        ahead = rng.randint(0, view.num_entering(view.block_size))
        return PagePlan(num_ahead=ahead, reclaim=reclaim, reason="wild")


@dataclass(frozen=True, slots=True, kw_only=True)
class TooFarAhead:
    decides: ClassVar[str] = "pages"

    def decide(self, view: PagesView) -> PagePlan:
        return PagePlan(num_ahead=view.num_entering(view.block_size) + 1, reason="greed")


@dataclass(frozen=True, slots=True, kw_only=True)
class TakesFromTheLiving:
    decides: ClassVar[str] = "pages"

    def decide(self, view: PagesView) -> PagePlan:
        return PagePlan(reclaim={SlotId(99): 0}, reason="greed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReclaimsNothing:
    decides: ClassVar[str] = "pages"

    def decide(self, view: PagesView) -> PagePlan:
        return PagePlan(reclaim={s.id: s.num_pages for s in view.free_slots}, reason="busy")
