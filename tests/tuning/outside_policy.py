"""A policy of another package: what it annotates, a tuner searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import BatchPlan, BatchView, Choice, Knob, Packing, by_arrival, num_missing_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class AtMostSo:
    """Everybody in order of arrival, at most so many tokens each.

    Attributes:
        appetite: tokens a request may have in a step.
        patience_frac: means nothing.
        mood: means nothing either.
        name_of_the_author: nobody searches it.
    """

    decides: ClassVar[str] = "batch"

    appetite: Annotated[int, Knob(8, 512, log=True)] = 64
    patience_frac: Annotated[float, Knob(0.25, 0.75)] = 0.5
    mood: Annotated[str, Choice("calm", "eager")] = "calm"
    name_of_the_author: str = "nobody"

    def decide(self, view: BatchView) -> BatchPlan:
        packing = Packing(view)
        for request in (*by_arrival(view.running), *by_arrival(view.waiting)):
            packing.grant(request, min(self.appetite, packing.tokens_left, num_missing_tokens(request)))
        return packing.plan("as much as it likes")
