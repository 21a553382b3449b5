"""Each decoding request's next page, shortly before it is entered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, refuse_below
from xllm_lab.policies.pages import FOR_EVER, PagePlan, PagesView, reclaimed


@dataclass(frozen=True, slots=True, kw_only=True)
class NextPage:
    """The page that a decoding request enters in the next step is mapped while this one computes.

    As xLLM's technical report describes (section 4.3, "asynchronous pre-mapping"); its pages of requests that ended
    ("reusable") are kept up to a bound, where the report has none.

    Attributes:
        lead_steps: how many steps before it is entered. Mapping that takes longer than a step needs more than 1; which
            block it will be is then a guess that the last step corrects.
        most_kept_pages: kept in slots that nobody has.
    """

    decides: ClassVar[str] = "pages"

    lead_steps: Annotated[int, Knob(1, 8)] = 1
    most_kept_pages: Annotated[int, Knob(0, 4096)] = 256

    def __post_init__(self) -> None:
        refuse_below(1, lead_steps=self.lead_steps)
        refuse_below(0, most_kept_pages=self.most_kept_pages)

    def decide(self, view: PagesView) -> PagePlan:
        return PagePlan(
            num_ahead=view.num_entering(self.lead_steps),
            reclaim=reclaimed(view.free_slots, self.most_kept_pages),
            holds_for=self._quiet_steps(view.steps_to_entering),
            reason="next pages",
        )

    def _quiet_steps(self, steps: int | None) -> int:
        """Until the step before a page is entered. With more lead, anybody may come within reach in any step."""
        if steps is None:
            return FOR_EVER
        return max(0, steps - 2) if self.lead_steps == 1 else 0
