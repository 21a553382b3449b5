"""Each request as deep as its own drafts are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, refuse_below
from xllm_lab.policies.draft import Depth, DraftPlan, DraftView, MethodOrAuto, Room, drafting_key, refuse_unknown
from xllm_lab.policies.draft.acceptance import Outlook, chosen, trial, trial_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceDriven:
    """Each request has the depth, and the method, that make most tokens per cost; it needs no calibration.

    A step of n decoding requests costs `1 + row_cost_frac * (n - 1)`, of which each has its share, and a draft costs
    `row_cost_frac` more: prompts in the step are there anyway. So drafts pay less the more requests share a step.

    Attributes:
        num_speculative_tokens: no request drafts more.
        row_cost_frac: one more row's time, making its draft included, as a part of the time of a step of one row.
        explore_frac: part of the time that may go into drafts that do not seem to pay (see `acceptance`).
        prior_count: what holds for the instance weighs like so many drafts of the request.
    """

    decides: ClassVar[str] = "draft"

    method: MethodOrAuto = "auto"
    num_speculative_tokens: Depth = 8
    row_cost_frac: Annotated[float, Knob(0.005, 0.5, log=True)] = 0.1
    explore_frac: Annotated[float, Knob(0.001, 0.03, log=True)] = 0.005
    prior_count: Annotated[float, Knob(1, 64, log=True)] = 8.0

    def __post_init__(self) -> None:
        refuse_unknown(self.method, "auto")
        refuse_below(1, num_speculative_tokens=self.num_speculative_tokens)
        refuse_below(0, explore_frac=self.explore_frac)
        refuse_below(0.001, row_cost_frac=self.row_cost_frac, prior_count=self.prior_count)

    def decide(self, view: DraftView) -> DraftPlan:
        room = Room(view)
        methods = chosen(self.method, view)
        if not methods:
            return room.plan("the host drafts otherwise")
        if not view.decoding:
            return room.plan("nobody decodes")
        deepest = self.num_speculative_tokens
        share = (1 + self.row_cost_frac * (len(view.decoding) - 1)) / len(view.decoding)
        costs = [[self.row_cost_frac * depth for depth in range(1, deepest + 1)]] * len(methods)
        outlook = Outlook(view, methods, deepest, self.prior_count)
        for request in sorted(view.decoding, key=drafting_key):
            method, depth, chances, tokens_rate = outlook.best(request, share, costs)
            next_chance = chances[min(depth, deepest - 1)]
            rate = trial_rate(self.explore_frac, share, self.row_cost_frac, next_chance / tokens_rate)
            tried = trial(request.num_tokens, rate, len(methods))
            if tried is not None:
                room.grant(request, method if depth else methods[tried], min(depth + 1, deepest))
            elif depth:
                room.grant(request, method, depth)
        return room.plan("as drafts are kept" if room.tokens_left < view.tokens_left else "drafts do not pay")
