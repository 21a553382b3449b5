"""Which drafts of a step make most tokens per microsecond of it; see `adaptive_pruning`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from xllm_lab.policies.draft import DecodingView, DraftTimesView, DraftView
from xllm_lab.policies.draft.acceptance import Bet

# What a step is to bring most of per microsecond: tokens of all requests together; or the harmonic mean of each one's,
# which is the least mean time per token.
AIMS = ("tokens", "pace")


class _Candidate(NamedTuple):
    """A draft behind all before it. Sorted as they are taken: what is worth most first, the shallow before the deep.

    Attributes:
        loss: less than nothing, by what it is worth: the tokens it may be expected to bring, or the steps that the
            request then needs less for one.
        rank: of its request.
    """

    loss: float
    depth: int
    rank: int


def decode_us(view: DraftView, times: DraftTimesView) -> float:
    """Time of the step without drafts and prompts; never less than its decoding rows cost by themselves."""
    row_us = times.row_us(view.num_tokens, 0)
    num = len(view.decoding)
    return max(times.step_us - (view.num_tokens - num) * row_us, num * row_us, 1e-6)


class Pruning:
    """The drafts that requests might have, in a step.

    Args:
        requests, bets: by which method each would draft, and the chances of its drafts.

        aim: one of `AIMS`.

    Attributes:
        alone_us: see `decode_us`.
    """

    def __init__(
        self,
        view: DraftView,
        times: DraftTimesView,
        requests: Sequence[DecodingView],
        bets: Sequence[Bet],
        aim: str = "tokens",
    ) -> None:
        self._for_pace = aim == "pace"
        self._view, self._times, self.requests, self.bets = view, times, requests, bets
        self.alone_us = decode_us(view, times)
        self._kv_tokens = [r.num_computed_tokens for r in requests]
        self._most_drafts = sum(len(bet.chances) for bet in bets)
        self._cheapest_row_us = min(map(self._least_row_us, requests))

    def best(self, min_gain: float) -> tuple[list[int], float]:
        """Depths of all requests, for the best score, and that; a draft must raise it by `min_gain` on average."""
        candidates = self._candidates()
        best, taken, num_taken = len(self.requests) / self.alone_us, candidates, 0
        dearest: dict[int, float] = {}
        for c in candidates:
            dearest.setdefault(c.depth, -c.loss)
        for deepest, worth in sorted(dearest.items()):
            if not self._for_pace and worth <= best * self._cheapest_row_us:
                break  # a limit as before
            some = [c for c in candidates if c.depth <= deepest][: self._view.tokens_left]
            score, count = self._best_of(some, min_gain, best)
            if count:
                best, taken, num_taken = score, some, count
        depths = [0] * len(self.requests)
        for candidate in taken[:num_taken]:
            depths[candidate.rank] = candidate.depth
        return depths, best

    def drafting(self, depths: Sequence[int]) -> dict[str, tuple[int, int]]:
        """By method, how many requests draft, and how deep at most."""
        found: dict[str, tuple[int, int]] = {}
        for bet, depth in zip(self.bets, depths, strict=True):
            if depth:
                num, deepest = found.get(bet.method, (0, 0))
                found[bet.method] = (num + 1, max(deepest, depth))
        return found

    def one_more_us(self, method: str, drafting: Mapping[str, tuple[int, int]], depth: int) -> float:
        """How much longer drafting takes if a request's `depth`-th draft comes to those."""
        num, deepest = drafting.get(method, (0, 0))
        before_us = self._times.draft_us(method, num, deepest) if num else 0.0
        return self._times.draft_us(method, num + (depth == 1), max(deepest, depth)) - before_us

    def first_drafts_us(self) -> tuple[float, float]:
        """Time of one draft for everybody, and that of as many tokens without drafts as may be expected to be kept."""
        drafts_us = sum(self._times.draft_us(m, *some) for m, some in self.drafting([1] * len(self.bets)).items())
        tokens = sum(bet.chances[0] for bet in self.bets)
        return drafts_us + sum(map(self.row_us, self.requests)), tokens * self.alone_us / len(self.requests)

    def row_us(self, request: DecodingView) -> float:
        """Of its first draft in the step."""
        return self._times.row_us(self._view.num_tokens, request.num_computed_tokens)

    def _candidates(self) -> list[_Candidate]:
        """But for those so unlikely that the score falls with any of them: it is no less than that of no drafts."""
        candidates: list[_Candidate] = []
        least = len(self.requests) / self.alone_us
        for rank, (request, bet) in enumerate(zip(self.requests, self.bets, strict=True)):
            least_chance = 0.0 if self._for_pace else least * self._least_row_us(request)
            tokens = 1.0
            for depth, chance in enumerate(bet.chances[: request.most_drafts], start=1):
                if chance <= least_chance:
                    break
                worth = 1 / tokens - 1 / (tokens + chance) if self._for_pace else chance
                tokens += chance
                candidates.append(_Candidate(-worth, depth, rank))
        return sorted(candidates)

    def _least_row_us(self, request: DecodingView) -> float:
        """Of one of its drafts, however many others there are."""
        fewest, kv_tokens = self._view.num_tokens, request.num_computed_tokens
        most = fewest + self._most_drafts
        return min(self._times.row_us(fewest, kv_tokens), self._times.row_us(most, kv_tokens))

    def _best_of(self, candidates: Sequence[_Candidate], min_gain: float, least: float) -> tuple[float, int]:
        """The best score above `least` of the first so many candidates, and how many; if there is one."""
        row_us, draft_us = self._times.row_us, self._times.draft_us
        best, best_count, handicap = least, 0, 1.0
        num = len(self.requests)
        worth, us, num_tokens = 0.0, self.alone_us, self._view.num_tokens
        all_worth = -sum(c.loss for c in candidates)
        drafting: dict[str, tuple[int, int, float]] = {}
        for count, (loss, depth, rank) in enumerate(candidates, start=1):
            if not self._may_win(-loss, all_worth - worth, num - worth, us, best * handicap):
                break
            worth -= loss
            us += row_us(num_tokens + count - 1, self._kv_tokens[rank])
            method = self.bets[rank].method
            num_drafting, deepest, before_us = drafting.get(method, (0, 0, 0.0))
            if depth == 1 or depth > deepest:
                num_drafting, deepest = num_drafting + (depth == 1), max(deepest, depth)
                now_us = draft_us(method, num_drafting, deepest)
                drafting[method] = (num_drafting, deepest, now_us)
                us += now_us - before_us
            handicap *= 1 + min_gain
            tokens = num * num / (num - worth) if self._for_pace else num + worth
            score = tokens / us / handicap
            if score > best:
                best, best_count = score, count
        return best, best_count

    def _may_win(self, worth: float, rest: float, steps: float, us: float, least: float) -> bool:
        """Whether any number of further drafts, none worth more than the next one, may lead to a score above `least`.

        Args:
            worth: of the next one.
            rest: of all further ones.
            steps: that one token of each request takes, added up; only for pace.
            us: of the step so far.
        """
        row_us = self._cheapest_row_us
        if not self._for_pace or worth <= 0:
            return worth > least * row_us
        # steps * us falls below this. (steps - k * worth) * (us + k * row_us) is concave in k: it is least for one
        # more, or for so many that they are worth the rest.
        most = len(self.requests) ** 2 / least
        if (steps - worth) * (us + row_us) < most:
            return True
        return (steps - rest) * (us + rest / worth * row_us) < most
