"""xLLM's reserve of mapped pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, refuse_below
from xllm_lab.policies.pages import FOR_EVER, PagePlan, PagesView, reclaimed


@dataclass(frozen=True, slots=True, kw_only=True)
class XllmPool:
    """At least so many pages mapped ahead of those who decode, and at most so many kept of requests that ended.

    As `PageAllocator` does (`MIN_RESERVED_PAGES` 8, `MAX_RESERVED_PAGES` 32 in
    xllm/core/framework/xtensor/page_allocator.h at 3906f5a). There a reserved page is anybody's; here a page lies in
    the range of one request, so the reserve is of the pages that are entered next. Far ahead, which block that will be
    is a guess; a wrong one is mapped anew, beside the step before it is needed.

    Attributes:
        min_reserved_pages: mapped ahead, as far as so many requests decode.
        max_reserved_pages: kept in slots that nobody has.
    """

    decides: ClassVar[str] = "pages"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {}

    min_reserved_pages: Annotated[int, Knob(0, 64)] = 8
    max_reserved_pages: Annotated[int, Knob(0, 1024)] = 32

    def __post_init__(self) -> None:
        refuse_below(0, min_reserved_pages=self.min_reserved_pages, max_reserved_pages=self.max_reserved_pages)

    def decide(self, view: PagesView) -> PagePlan:
        ahead = min(self.min_reserved_pages, view.num_entering(view.block_size))
        # The page entered in the next step is looked at again shortly before; nothing else changes by itself.
        steps = view.steps_to_entering
        return PagePlan(
            num_ahead=ahead,
            reclaim=reclaimed(view.free_slots, self.max_reserved_pages),
            holds_for=FOR_EVER if steps is None or not ahead else max(0, steps - 2),
            reason="reserve",
        )
