"""What adaptive draft policies expect of drafts, how deep that pays, and when they try what they think does not.

Drafts 1 to j of a request are all kept with the chance a_j. Counts say so, shrunk to what is known before:

    a_j = (kept_j + k a_(j-1) c_j) / (drafted_j + k),   at most a_(j-1)

with the counts of the request's last drafts and `k = prior_count` drafts more that go as they do in the whole instance:
there, a draft behind kept ones is kept with the chance c_j, by the same formula from all counts and `FIRST_GUESS`.
Where nothing is known yet drafts are expected to be kept, so that somebody finds out.

A policy that has stopped to draft learns nothing more. So every request now and then drafts one token more than pays.
When is told by its length alone: the multiples of the golden ratio modulo 1 are spread evenly whatever the stride
(three-distance theorem), so that a share `rate` of all lengths has its turn, in gaps that are nearly equal, and a
request that grows by several tokens a step does not miss them. There is no memory, and no chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from xllm_lab.policies.draft import METHODS, DecodingView, DraftView, Tally

# A guess on the high side: of one that is too high nothing is left after a few drafts, one too low is never found out.
FIRST_GUESS = 0.8
# It weighs like so many drafts.
FIRST_GUESS_COUNT = 8.0
_GOLDEN = 0.6180339887498949


class Bet(NamedTuple):
    """Drafts worth their cost, maybe none.

    Attributes:
        chances: that all drafts up to each are kept, as deep as may be asked.
        rate: tokens per cost that the request then makes.
    """

    method: str
    depth: int
    chances: Sequence[float]
    rate: float


def expected(tally: Tally, continuation: Sequence[float], prior_count: float) -> list[float]:
    """The chances a_1, a_2, ..., as many as there are of `continuation`: c_1, c_2, ..."""
    drafted, accepted = tally
    known = len(drafted)
    chances: list[float] = []
    chance = 1.0
    for position, factor in enumerate(continuation):
        here = chance * factor
        if position < known:
            here = (accepted[position] + prior_count * here) / (drafted[position] + prior_count)
        chance = min(chance, here)
        chances.append(chance)
    return chances


def continuation(tally: Tally, depth: int) -> list[float]:
    """The chances that a draft behind kept ones is kept, by position, of the instance's counts."""
    chances = expected(tally, [FIRST_GUESS] * depth, FIRST_GUESS_COUNT)
    return [here / before if before else 0.0 for before, here in zip([1.0, *chances], chances, strict=False)]


def chosen(method: str, view: DraftView) -> list[str]:
    """The methods to choose from: those of "auto" are all that the host has."""
    return [m for m in METHODS if m in view.methods and method in ("auto", m)]


class Outlook:
    """What each request may expect of each method in the step."""

    def __init__(self, view: DraftView, methods: Sequence[str], depth: int, prior_count: float) -> None:
        self._methods, self._prior_count = methods, prior_count
        self._continuations = [continuation(view.tally(m), depth) for m in methods]

    def only(self, request: DecodingView) -> list[float]:
        """The chances of its drafts where there is nothing to choose."""
        (method,), (factors,) = self._methods, self._continuations
        return expected(request.tally(method), factors, self._prior_count)

    def best(self, request: DecodingView, share: float, costs: Sequence[Sequence[float]]) -> Bet:
        """The method and depth with most tokens per cost; of equals the first.

        Args:
            share: what the request's part of the step costs without drafts.
            costs: for each method, what 1, 2, ... drafts add.
        """
        found: Bet | None = None
        for method, factors, added in zip(self._methods, self._continuations, costs, strict=True):
            chances = expected(request.tally(method), factors, self._prior_count)
            depth, rate = most_paying(chances, share, added)
            if found is None or rate > found.rate:
                found = Bet(method, depth, chances, rate)
        assert found is not None, "there is a method to choose"
        return found


def most_paying(chances: Sequence[float], share: float, added: Sequence[float]) -> tuple[int, float]:
    """The depth with most tokens per cost, and those."""
    depth, best, tokens = 0, 1.0 / share, 1.0
    for position, (chance, cost) in enumerate(zip(chances, added, strict=True), start=1):
        tokens += chance
        rate = tokens / (share + cost)
        if rate > best:
            depth, best = position, rate
    return depth, best


def trial_rate(explore_frac: float, share: float, cost: float, tokens_back: float) -> float:
    """Of all steps, in how many to try a draft so that what that loses is `explore_frac` of the time.

    Args:
        share: time of the request's part of a step.
        cost: time that the draft takes.
        tokens_back: time that the tokens it may be expected to bring would take otherwise.
    """
    loss, allowed = cost - tokens_back, explore_frac * share
    if not allowed:
        return 0.0
    return 1.0 if loss <= allowed else allowed / loss


def trial(num_tokens: int, rate: float, num_choices: int) -> int | None:
    """Which of its choices a request of that length tries in this step, if it is its turn.

    Args:
        rate: of all steps in which it is, at most 1.
    """
    place = num_tokens * _GOLDEN % 1.0
    return int(place / rate * num_choices) if place < rate else None
