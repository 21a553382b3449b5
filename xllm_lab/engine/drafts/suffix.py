"""Suffix decoding: what mostly followed the last tokens, in the request itself or in the outputs of those that ended.

The method is that of Oliaro et al., "SuffixDecoding" (arXiv:2411.04975); scoring and parameters are xLLM's
(xllm/core/util/suffix_tree.cpp and suffix_decoding_cache.cpp at 3906f5a). The last m tokens, for every m at which they
occur, are followed token by token by what followed them most often; a draft's score is the sum of the probabilities
that it is right up to each of its tokens, which is how many are expected to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xllm_lab.drafting import Asked
from xllm_lab.engine.drafts.substrings import Match, SubstringCounts
from xllm_lab.errors import ConfigError
from xllm_lab.request_state import RequestState
from xllm_lab.workload import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixParams:
    """xLLM's flags without their `speculative_suffix_`, and with their defaults.

    Attributes:
        cache_max_depth: tokens of the longest run that is looked at, those matched and those drafted together.
        max_spec_factor, max_spec_offset: m matched tokens draft up to `m * max_spec_factor + max_spec_offset`.
        min_token_prob: a draft ends before a token that is right, with all before it, with less probability.
        max_cached_requests: ended requests whose outputs are kept, the oldest goes first; -1 keeps all, 0 none. A token
            takes half a kilobyte, and as much again in the request itself.

    Raises:
        ConfigError: a value is out of range.
    """

    cache_max_depth: int = 64
    max_spec_factor: float = 1.0
    max_spec_offset: float = 0.0
    min_token_prob: float = 0.1
    max_cached_requests: int = -1

    def __post_init__(self) -> None:
        for name, value, accepted, fits in (
            ("cache_max_depth", self.cache_max_depth, "at least 2", self.cache_max_depth >= 2),
            ("max_spec_factor", self.max_spec_factor, "at least 0", 0 <= self.max_spec_factor < float("inf")),
            ("max_spec_offset", self.max_spec_offset, "a finite number", abs(self.max_spec_offset) < float("inf")),
            ("min_token_prob", self.min_token_prob, "0 to 1", 0 <= self.min_token_prob <= 1),
            ("max_cached_requests", self.max_cached_requests, "at least -1", self.max_cached_requests >= -1),
        ):
            if not fits:
                raise ConfigError(f"suffix drafts: {name} is {value}, {accepted} is accepted")

    def most_tokens(self, matched: int, depth: int) -> int:
        """Drafts behind so many matched tokens, however long a run may be."""
        # xLLM adds the millionth too: 3 * 0.333334 is meant to be 1.
        return min(depth, max(0, int(matched * self.max_spec_factor + self.max_spec_offset + 1e-6)))


class Draft(NamedTuple):
    """Tokens, and how many of them are expected to be kept."""

    tokens: list[int]
    score: float


NO_DRAFT = Draft([], 0.0)


class SuffixProposer:
    """Drafts from a request's own prompt and output, or from outputs of requests that ended, whichever scores higher.

    Equal scores go to the request's own, and within either to the longer match, as in xLLM; equal counts go to the
    smaller token, where xLLM's order is that of its lists. Unlike xLLM, which counts the output of live requests among
    the others' too, we add it when the request ends.
    """

    methods = ("suffix",)

    def __init__(self, params: SuffixParams | None = None) -> None:
        self._params = SuffixParams() if params is None else params
        self._live: dict[RequestId, _Own] = {}
        self._ended = EndedOutputs(self._params.cache_max_depth, self._params.max_cached_requests)

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        """As `Proposer.propose`. The first call for a request reads its whole context, a later one the new tokens."""
        return [self._draft(one.state, one.depth).tokens for one in asked]

    def forget(self, request: RequestId) -> None:
        """Its output, as far as it was seen, is kept for others. If it comes again, that is taken back."""
        own = self._live.pop(request, None)
        if own is not None:
            self._ended.add(request, own.tokens[own.num_prompt_tokens :])

    def _draft(self, state: RequestState, depth: int) -> Draft:
        own = self._live.get(state.id)
        if own is None:
            self._ended.withdraw(state.id)
            own = self._live[state.id] = _Own(state.num_prompt_tokens, self._params.cache_max_depth)
        own.extend(state.token_ids(len(own.tokens), state.num_tokens).tolist())
        # At least one token of the longest run is a draft's; and xLLM never matches all that it looks at.
        longest = min(len(own.tokens), self._params.cache_max_depth) - 1
        best = self._best(own.counts, own.counts.matches_at_end(longest), depth, NO_DRAFT)
        context = own.tokens[len(own.tokens) - longest :]
        return self._best(self._ended.counts, self._ended.counts.matches(context), depth, best)

    def _best(self, counts: SubstringCounts, matches: Iterator[Match], depth: int, best: Draft) -> Draft:
        """The draft of the highest score; `best` if none has a higher one. Matches come the longest first."""
        for match in matches:
            # No token adds more than 1, and shorter matches draft no more tokens.
            if self._params.most_tokens(match.longest, depth) <= best.score:
                break
            found = counts.continuation(match.state, self._limit(match, depth), self._params.min_token_prob)
            score = sum(found.probabilities)
            if score > best.score:
                best = Draft(found.tokens, score)
        return best

    def _limit(self, match: Match, depth: int) -> int:
        """The most tokens that one of the match's lengths may draft: all have the same draft, and differ in this."""
        params = self._params
        limit = params.most_tokens(match.longest, depth)
        if match.longest + limit <= params.cache_max_depth:
            return limit
        # Even shorter ones have room for the limit, but may draft no more for it.
        least = max(match.shortest, params.cache_max_depth - limit)
        lengths = range(least, match.longest + 1)
        return max(min(params.most_tokens(m, depth), params.cache_max_depth - m) for m in lengths)


class _Own:
    """The tokens of one request, and their counts."""

    __slots__ = ("counts", "num_prompt_tokens", "tokens")

    def __init__(self, num_prompt_tokens: int, max_depth: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.tokens: list[int] = []
        self.counts = SubstringCounts(max_depth)

    def extend(self, tokens: list[int]) -> None:
        self.tokens += tokens
        for token in tokens:
            self.counts.append(token)


class EndedOutputs:
    """Counts over the outputs of the last `max_requests` requests that ended; -1 keeps all, 0 none."""

    def __init__(self, max_depth: int, max_requests: int) -> None:
        self.counts = SubstringCounts(max_depth)
        self._max_depth, self._max_requests = max_depth, max_requests
        self._outputs: dict[RequestId, list[int]] = {}  # the oldest first
        self._num_tokens = self._num_removed_tokens = 0

    def add(self, request: RequestId, output: list[int]) -> None:
        assert request not in self._outputs, f"request {request} ends twice"
        if not output or not self._max_requests:
            return
        if len(self._outputs) == self._max_requests:
            self.withdraw(next(iter(self._outputs)))
        self._outputs[request] = output
        self._num_tokens += len(output)
        self.counts.add(output)

    def withdraw(self, request: RequestId) -> None:
        """Take a request's output out again, if it is there."""
        output = self._outputs.pop(request, None)
        if output is None:
            return
        self.counts.remove(output)
        self._num_tokens -= len(output)
        self._num_removed_tokens += len(output)
        if self._num_removed_tokens > self._num_tokens:
            self._rebuild()

    def _rebuild(self) -> None:
        """Drop the states that count nothing. Each token removed pays for less than one that is counted anew."""
        self.counts = SubstringCounts(self._max_depth)
        self._num_removed_tokens = 0
        for output in self._outputs.values():
            self.counts.add(output)
