"""Prompt lookup: what followed the request's last tokens when they came before is drafted again."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_lab.drafting import Asked
from xllm_lab.errors import ConfigError
from xllm_lab.workload import RequestId


class NgramProposer:
    """Looks the last `max_ngram` tokens of a request up in its own prompt and output, else fewer, down to `min_ngram`.

    They are vLLM's `prompt_lookup_max` and `prompt_lookup_min`. Of several earlier occurrences the latest counts, where
    vLLM takes the first, which needs 3 % more steps (`benchmarks/draft_proposers_xeon_2026-11-23.md`). A draft ends
    where the known tokens end.
    """

    methods = ("ngram",)

    def __init__(self, *, max_ngram: int = 3, min_ngram: int = 1) -> None:
        """
        Raises:
            ConfigError: not 1 <= min_ngram <= max_ngram.
        """
        if not 1 <= min_ngram <= max_ngram:
            raise ConfigError(
                f"ngram drafts: min_ngram is {min_ngram} and max_ngram {max_ngram}, "
                "1 <= min_ngram <= max_ngram is accepted"
            )
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._indices: dict[RequestId, _Index] = {}

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        """As `Proposer.propose`. The first call for a request reads its whole context, a later one the new tokens."""
        return [self._draft(one) for one in asked]

    def forget(self, request: RequestId) -> None:
        self._indices.pop(request, None)

    def _draft(self, asked: Asked) -> list[int]:
        index = self._indices.get(asked.state.id)
        if index is None:
            index = self._indices[asked.state.id] = _Index(self._sizes)
        index.extend(asked.state.token_ids(len(index.tokens), asked.state.num_tokens).tolist())
        return index.continuation(asked.depth)


class _Index:
    """The tokens of one request, and where each n-gram of them last ended."""

    __slots__ = ("_ends", "_num_indexed", "_sizes", "tokens")

    def __init__(self, sizes: range) -> None:
        self.tokens: list[int] = []
        self._sizes = sizes
        # By size: n-gram -> the number of tokens up to its end. Those that end with the last token are not there yet:
        # a lookup must not find itself.
        self._ends: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in sizes}
        self._num_indexed = 0

    def extend(self, tokens: list[int]) -> None:
        self.tokens += tokens
        known, last = self.tokens, len(self.tokens) - 1
        for size, ends in self._ends.items():
            for end in range(max(self._num_indexed + 1, size), last + 1):
                ends[tuple(known[end - size : end])] = end
        self._num_indexed = last

    def continuation(self, depth: int) -> list[int]:
        """At most `depth` tokens that followed the longest n-gram at the end that came before."""
        for size in self._sizes:
            end = self._ends[size].get(tuple(self.tokens[-size:]))
            if end is not None:
                return self.tokens[end : end + depth]
        return []
