"""Which drafts of a step make most tokens per microsecond of it; see `adaptive_pruning`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from xllm_lab.policies.draft import DecodingView, DraftTimesView, DraftView
from xllm_lab.policies.draft.acceptance import Bet


class _Candidate(NamedTuple):
    """A draft behind all before it. Sorted as they are taken: the likely first, the shallow before the deep.

    Attributes:
        rank: of its request.
    """

    improbability: float
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
        bets: by which method each request would draft, and the chances of its drafts.
    """

    def __init__(
        self, view: DraftView, times: DraftTimesView, requests: Sequence[DecodingView], bets: Sequence[Bet]
    ) -> None:
        self._view, self._times, self._requests, self._bets = view, times, requests, bets
        self._alone_us = decode_us(view, times)

    def depths(self, min_gain: float) -> list[int]:
        """Of each request, for the best score; each draft must raise it by `min_gain`, on average."""
        candidates = self._candidates()
        best, depths = len(self._requests) / self._alone_us, [0] * len(self._requests)
        for deepest in range(1, max((c.depth for c in candidates), default=0) + 1):
            taken = [c for c in candidates if c.depth <= deepest][: self._view.tokens_left]
            score, num_taken = self._best(taken, min_gain)
            if score > best:
                best, depths = score, [0] * len(self._requests)
                for candidate in taken[:num_taken]:
                    depths[candidate.rank] = candidate.depth
        return depths

    def _candidates(self) -> list[_Candidate]:
        """But for those so unlikely that the score falls with any of them: it is no less than that of no drafts."""
        candidates: list[_Candidate] = []
        num = len(self._requests)
        fewest = self._view.num_tokens
        for rank, (request, bet) in enumerate(zip(self._requests, self._bets, strict=True)):
            kv_tokens = request.num_computed_tokens
            most = fewest + len(bet.chances) * num
            row_us = min(self._times.row_us(fewest, kv_tokens), self._times.row_us(most, kv_tokens))
            for depth, chance in enumerate(bet.chances[: request.most_drafts], start=1):
                if chance * self._alone_us <= num * row_us:
                    break
                candidates.append(_Candidate(-chance, depth, rank))
        return sorted(candidates)

    def _best(self, candidates: Sequence[_Candidate], min_gain: float) -> tuple[float, int]:
        """The best score of the first so many candidates, and how many."""
        best, best_count = 0.0, 0
        tokens, us = float(len(self._requests)), self._alone_us
        drafting: dict[str, tuple[int, int, float]] = {}
        for count, (improbability, depth, rank) in enumerate(candidates, start=1):
            tokens -= improbability
            us += self._times.row_us(self._view.num_tokens + count - 1, self._requests[rank].num_computed_tokens)
            method = self._bets[rank].method
            num, deepest, before_us = drafting.get(method, (0, 0, 0.0))
            num, deepest = num + (depth == 1), max(deepest, depth)
            draft_us = self._times.draft_us(method, num, deepest)
            drafting[method] = (num, deepest, draft_us)
            us += draft_us - before_us
            score = tokens / us / (1 + min_gain) ** count
            if score > best:
                best, best_count = score, count
        return best, best_count
