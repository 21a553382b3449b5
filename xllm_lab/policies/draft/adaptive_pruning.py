"""xLLM's adaptive speculation: drafts are cut where they would slow the whole batch down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Flag, Knob, refuse_below
from xllm_lab.policies.draft import (
    Depth,
    DraftPlan,
    DraftView,
    MethodOrAuto,
    Room,
    drafting_key,
    refuse_unknown,
)
from xllm_lab.policies.draft.acceptance import Bet, Outlook, chosen, trial
from xllm_lab.policies.draft.pruning import Pruning, decode_us


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptivePruning:
    """The drafts that together make most tokens per microsecond of the step: drafting, decoding and verification.

        score = (requests + sum of the chances that each draft is kept) / (draft_us + step_us + rows_us)

    xLLM's controller (adaptive_speculative_controller.cpp at 3906f5a) takes drafts by falling chance, each if it raises
    the score by `adaptive_speculative_min_gain`. Here, too, but
    - chances come from counts (see `acceptance`): the policy is asked before there are drafts, whose probabilities
      xLLM reads. So drafting is a cost that can be saved, where in xLLM it is spent already;
    - a first draft that has to pay for all drafting, or for a row that the next ones have for less, may not end it:
      every number of drafts is scored, for every limit of depth, and no drafts at all. Its score is so never below that
      of a fixed depth;
    - steps may compute prompts, too, in xLLM never beside drafts; the score leaves their time out, or a token would
      seem cheap wherever a prompt makes the step long.

    Attributes:
        num_speculative_tokens: no request drafts more.
        adaptive_speculative_min_gain: a draft must raise the score by this fraction.
        explore_frac: part of the time that may go into drafts that do not seem to pay.
        prior_count: what holds for the instance weighs like so many drafts of the request.
    """

    decides: ClassVar[str] = "draft"
    needs_step_time: ClassVar[bool] = True
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {
        "enable_adaptive_speculative_decode": True,
        "enable_profile_step_time": True,
    }

    method: MethodOrAuto = "auto"
    num_speculative_tokens: Depth = 8
    adaptive_speculative_min_gain: Annotated[float, Knob(0.0, 0.1), Flag("adaptive_speculative_min_gain")] = 0.0
    explore_frac: Annotated[float, Knob(0.001, 0.03, log=True)] = 0.01
    prior_count: Annotated[float, Knob(0.5, 16, log=True)] = 2.0

    def __post_init__(self) -> None:
        refuse_unknown(self.method, "auto")
        refuse_below(1, num_speculative_tokens=self.num_speculative_tokens)
        refuse_below(
            0, adaptive_speculative_min_gain=self.adaptive_speculative_min_gain, explore_frac=self.explore_frac
        )
        refuse_below(0.001, prior_count=self.prior_count)

    def decide(self, view: DraftView) -> DraftPlan:
        times = view.times
        assert times is not None, "the scheduler refuses this policy without step times"
        room = Room(view)
        methods = chosen(self.method, view)
        if not methods:
            return room.plan("the host drafts otherwise")
        if not view.decoding:
            return room.plan("nobody decodes")
        deepest, num = self.num_speculative_tokens, len(view.decoding)
        requests = sorted(view.decoding, key=drafting_key)
        share_us = decode_us(view, times) / num
        rows_us = [times.row_us(view.num_tokens, r.num_computed_tokens) for r in requests]
        drafts_us = [[times.draft_us(m, num, depth) / num for depth in range(1, deepest + 1)] for m in methods]
        outlook = Outlook(view, methods, deepest, self.prior_count)
        bets: list[Bet] = []
        for request, row_us in zip(requests, rows_us, strict=True):
            costs = [[us + row_us * depth for depth, us in enumerate(of_method, 1)] for of_method in drafts_us]
            bets.append(outlook.best(request, share_us, costs))
        depths = Pruning(view, times, requests, bets).depths(self.adaptive_speculative_min_gain)
        for request, bet, row_us, depth in zip(requests, bets, rows_us, depths, strict=True):
            cost_us = max(row_us + times.draft_us(bet.method, 1, 1), 1e-6)
            tried = trial(request.num_tokens, self.explore_frac * share_us / cost_us, len(methods))
            if tried is not None:
                room.grant(request, bet.method if depth else methods[tried], min(depth + 1, deepest))
            elif depth:
                room.grant(request, bet.method, depth)
        return room.plan("the best score" if room.tokens_left < view.tokens_left else "drafts do not pay")
