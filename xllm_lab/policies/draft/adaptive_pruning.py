"""xLLM's adaptive speculation: drafts are cut where they would slow the whole batch down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Choice, Flag, Knob, refuse_below
from xllm_lab.policies.draft import (
    DecodingView,
    Depth,
    DraftPlan,
    DraftTimesView,
    DraftView,
    MethodOrAuto,
    Room,
    drafting_key,
    refuse_unknown,
)
from xllm_lab.policies.draft.acceptance import Bet, Outlook, chosen, trial, trial_rate
from xllm_lab.policies.draft.pruning import AIMS, Pruning, decode_us


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptivePruning:
    """The drafts that are worth most per microsecond of the step: drafting, decoding and verification.

        score of "tokens" = (requests + sum of the chances that each draft is kept) / (draft_us + step_us + rows_us)
        score of "pace" = requests / mean of (draft_us + step_us + rows_us) / (1 + sum of the request's chances)

    "tokens" is xLLM's. It may let all wait for deep drafts of those that are easy to guess, and the others miss their
    TPOT; "pace" makes the mean TPOT least, and is the same where all are as easy to guess.

    xLLM's controller (adaptive_speculative_controller.cpp at 3906f5a) takes drafts by falling chance, each if it raises
    the score by `adaptive_speculative_min_gain`. Here, too, but
    - chances come from counts (see `acceptance`): the policy is asked before there are drafts, whose probabilities
      xLLM reads. So drafting is a cost that can be saved, where in xLLM it is spent already;
    - a first draft that has to pay for all drafting, or for a row that the next ones have for less, may not end it:
      every number of drafts is scored, for every limit of depth, and no drafts at all. So the score is never below that
      of a fixed depth. For the same reason all try together where nobody drafts (`acceptance` says why to try);
    - steps may compute prompts, too, in xLLM never beside drafts; the score leaves their time out, or a token would
      seem cheap wherever a prompt makes the step long.

    Attributes:
        num_speculative_tokens: no request drafts more.
        aim: whose score.
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
    aim: Annotated[str, Choice(*AIMS)] = "pace"
    adaptive_speculative_min_gain: Annotated[float, Knob(0.0, 0.1), Flag("adaptive_speculative_min_gain")] = 0.0
    explore_frac: Annotated[float, Knob(0.001, 0.03, log=True)] = 0.005
    prior_count: Annotated[float, Knob(1, 64, log=True)] = 8.0

    def __post_init__(self) -> None:
        refuse_unknown(self.method, "auto")
        if self.aim not in AIMS:
            raise ValueError(f"aim is {self.aim!r}, accepted: {', '.join(AIMS)}")
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
        requests = sorted(view.decoding, key=drafting_key)
        pruning = Pruning(view, times, requests, self._bets(view, times, requests, methods), self.aim)
        depths, per_us = pruning.best(self.adaptive_speculative_min_gain)
        if any(depths):
            self._deepen(pruning, depths, per_us, room)
            return room.plan("the best score")
        cost_us, back_us = pruning.first_drafts_us()
        back_us -= self.adaptive_speculative_min_gain * pruning.alone_us * len(requests)
        rate = trial_rate(self.explore_frac, pruning.alone_us, cost_us, back_us)
        tried = trial(sum(r.num_tokens for r in requests), rate, len(methods))
        if tried is None:
            return room.plan("drafts do not pay")
        for request in requests:
            room.grant(request, methods[tried], 1)
        return room.plan("whether drafts pay")

    def _bets(
        self, view: DraftView, times: DraftTimesView, requests: Sequence[DecodingView], methods: Sequence[str]
    ) -> list[Bet]:
        """Of each request the method and depth that pay most if all others draft as deep by it."""
        num, depths = len(requests), range(1, self.num_speculative_tokens + 1)
        outlook = Outlook(view, methods, len(depths), self.prior_count)
        if len(methods) == 1:
            return [Bet(methods[0], 0, outlook.only(request), 0.0) for request in requests]
        share_us = decode_us(view, times) / num
        drafts_us = [[times.draft_us(m, num, depth) / num for depth in depths] for m in methods]
        bets: list[Bet] = []
        for request in requests:
            row_us = times.row_us(view.num_tokens, request.num_computed_tokens)
            costs_us = [[us + row_us * n for us, n in zip(of_method, depths, strict=True)] for of_method in drafts_us]
            bets.append(outlook.best(request, share_us, costs_us))
        return bets

    def _deepen(self, pruning: Pruning, depths: Sequence[int], per_us: float, room: Room) -> None:
        """Grant these depths, and to those whose turn it is one draft more."""
        share_us = pruning.alone_us / len(depths)
        drafting = pruning.drafting(depths)
        for request, bet, depth in zip(pruning.requests, pruning.bets, depths, strict=True):
            deeper = min(depth + 1, self.num_speculative_tokens)
            cost_us = pruning.row_us(request) + pruning.one_more_us(bet.method, drafting, deeper)
            back_us = bet.chances[deeper - 1] / per_us - self.adaptive_speculative_min_gain * pruning.alone_us
            rate = trial_rate(self.explore_frac, share_us, cost_us, back_us)
            if trial(request.num_tokens, rate, 1) is not None:
                room.grant(request, bet.method, deeper)
            elif depth:
                room.grant(request, bet.method, depth)
