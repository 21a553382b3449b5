"""What a trace says without any model: reuse of prefixes against cache size, what lookups would have drafted, and room.

All are counts. Prefixes are as if each request ended before the next came; drafts are replayed on recorded outputs, for
every longest n-gram and every depth at once: where a lookup points, and how far it agrees, depends on neither.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from xllm_lab.drafting import Asked
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import block_key
from xllm_lab.policies.api import ceil_div
from xllm_lab.runs import Run
from xllm_lab.sim.acceptance_fit import Verification
from xllm_lab.workload import RequestId, Workload, prompt_token_ids

MOST_NGRAM, MOST_DEPTH = 6, 15
SUFFIX_DEPTHS = (1, 2, 3, 4, 6, 8)
# What the engine looks up with (`engine.drafts.ngram`), and so what a simulated lookup is worth.
ENGINE_NGRAM = 3


@dataclass(frozen=True, slots=True)
class ReuseCurve:
    """Prompt tokens that a cache of so many blocks finds, least recently used blocks leaving first.

    Attributes:
        distances: stack distances at which a further block is found, ascending.
        found_tokens: tokens that are found by a cache of at least so many blocks, beside.
        num_tokens: of all prompts.
    """

    block_size: int
    distances: tuple[int, ...]
    found_tokens: tuple[int, ...]
    num_tokens: int

    def hit_frac(self, num_blocks: int) -> float:
        """Of all prompt tokens."""
        place = bisect_right(self.distances, num_blocks)
        return self.found_tokens[place - 1] / self.num_tokens if place else 0.0


class Stack:
    """Distinct keys since one was touched last, itself included, by a Fenwick tree over the times of last touches."""

    def __init__(self, num_touches: int) -> None:
        self._tree = [0] * (num_touches + 1)
        self._last: dict[Hashable, int] = {}
        self._now = 0

    def touch(self, key: Hashable) -> int | None:
        """The distance, None at the first time."""
        before = self._last.get(key)
        distance = None
        if before is not None:
            distance = self._sum(self._now) - self._sum(before - 1)
            self._add(before, -1)
        self._now += 1
        self._last[key] = self._now
        self._add(self._now, 1)
        return distance

    def _add(self, place: int, value: int) -> None:
        while place < len(self._tree):
            self._tree[place] += value
            place += place & -place

    def _sum(self, place: int) -> int:
        total = 0
        while place > 0:
            total += self._tree[place]
            place -= place & -place
        return total


def reuse_curve(prompts: Sequence[Sequence[Hashable]], *, block_size: int, num_tokens: int) -> ReuseCurve:
    """From keys of each prompt's blocks, in order of arrival; a block is found if all before it are, too."""
    stack, found = Stack(sum(map(len, prompts))), dict[int, int]()
    for keys in prompts:
        reach: int | None = 0
        for key in keys:
            distance = stack.touch(key)
            reach = None if reach is None or distance is None else max(reach, distance)
            if reach is not None:
                found[reach] = found.get(reach, 0) + block_size
    distances = tuple(sorted(found))
    sums, total = [], 0
    for distance in distances:
        total += found[distance]
        sums.append(total)
    return ReuseCurve(block_size, distances, tuple(sums), num_tokens)


def prompt_keys(workload: Workload, *, block_size: int, vocab_size: int) -> list[list[Hashable]]:
    """Keys of each prompt's blocks, as the prefix cache has them; the last token is always computed."""
    every: list[list[Hashable]] = []
    for request in workload.requests:
        tokens = prompt_token_ids(request, vocab_size=vocab_size, seed=workload.seed)
        key, keys = b"", list[Hashable]()
        for block in range((len(tokens) - 1) // block_size):
            key = block_key(key, tokens[block * block_size : (block + 1) * block_size])
            keys.append(key)
        every.append(keys)
    return every


class Lookup(NamedTuple):
    """At one known length: how many tokens a lookup has to offer, and how many of them come true."""

    offered: int
    agreeing: int


def lookups(prompt: Sequence[int], output: Sequence[int]) -> list[list[Lookup]]:
    """By longest n-gram less 1, and by output tokens known less 1: the latest earlier place of the longest n-gram."""
    tokens = [*prompt, *output]
    ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(MOST_NGRAM)]
    found: list[list[Lookup]] = [[] for _ in range(MOST_NGRAM)]
    for known in range(1, len(tokens)):
        if known > len(prompt):
            best = Lookup(0, 0)
            for n in range(1, MOST_NGRAM + 1):
                end = ends[n - 1].get(tuple(tokens[known - n : known])) if known >= n else None
                if end is not None:
                    best = Lookup(known - end, _agreeing(tokens, end, known))
                found[n - 1].append(best)
        for n in range(1, min(MOST_NGRAM, known) + 1):
            ends[n - 1][tuple(tokens[known - n : known])] = known
    return found


def walk(found: Sequence[Lookup], depth: int) -> Iterator[tuple[int, int]]:
    """(drafts, drafts kept) of each step of a request that always asks for so many."""
    place = 0
    while place < len(found):
        most = min(depth, len(found) - place - 1)  # the request's last token is nobody's draft
        drafted = min(most, found[place].offered)
        kept = min(drafted, found[place].agreeing)
        yield drafted, kept
        place += kept + 1


@dataclass(frozen=True, slots=True)
class DraftFacts:
    """What became of drafts by lookup, replayed: {n: {depth: tokens a step}}, and by suffix: {depth: tokens a step}."""

    ngram: Mapping[int, Mapping[int, float]]
    suffix: Mapping[int, float]
    verifications: tuple[Verification, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; verifications are for `acceptance_fit`."""
        return {
            "ngram_tokens_per_step": {n: dict(of) for n, of in self.ngram.items()},
            "suffix_tokens_per_step": dict(self.suffix),
        }


def draft_facts(run: Run) -> DraftFacts:
    """Of a recorded engine run, whose outputs are real."""
    kinds = {r.id: r.kind for r in run.workload.requests}
    vocab, seed = run.manifest.model["vocab_size"], run.workload.seed
    prompts = {r.id: prompt_token_ids(r, vocab_size=vocab, seed=seed).tolist() for r in run.workload.requests}
    ended = sorted((r for r in run.records.requests if len(r.output_token_ids)), key=lambda r: (r.finish_us or 0, r.id))
    texts = [(r.id, prompts[r.id], r.output_token_ids.tolist()) for r in ended]
    found = {request: lookups(prompt, output) for request, prompt, output in texts}
    table = {
        n: {k: _yield(s for f in found.values() for s in walk(f[n - 1], k)) for k in range(1, MOST_DEPTH + 1)}
        for n in range(1, MOST_NGRAM + 1)
    }
    verified = [
        Verification("ngram", kinds[request], (0, request), min(MOST_DEPTH, of_n - place), drafted, kept)
        for request, f in found.items()
        for of_n in (len(f[ENGINE_NGRAM - 1]) - 1,)
        for place, drafted, kept in _placed(walk(f[ENGINE_NGRAM - 1], MOST_DEPTH))
        if of_n > place
    ]
    by_suffix = {k: list(_suffix_steps(texts, kinds, k)) for k in SUFFIX_DEPTHS}
    suffix = {k: _yield((v.num_drafted, v.num_accepted) for v in steps) for k, steps in by_suffix.items()}
    return DraftFacts(table, suffix, (*verified, *by_suffix[SUFFIX_DEPTHS[-1]]))


def kv_fit(workload: Workload, config: InstanceConfig) -> dict[str, float]:
    """How many requests the KV pool holds at once."""
    lengths = sorted(r.prompt.num_tokens + r.output_tokens for r in workload.requests)
    blocks = [ceil_div(length, config.block_size) for length in lengths]
    mean = sum(blocks) / len(blocks)
    return {
        "pool_blocks": config.num_kv_blocks,
        "longest_request_blocks": blocks[-1],
        "mean_request_blocks": mean,
        "requests_at_once": config.num_kv_blocks / mean,
        "requests_too_long": sum(b > config.num_kv_blocks for b in blocks),
    }


def facts_as_dict(curve: ReuseCurve, fit: Mapping[str, float], drafts: DraftFacts | None) -> dict[str, Any]:
    """Plain data, the curve at powers of two."""
    sizes = [2**k for k in range(max(curve.distances, default=1).bit_length() + 1)]
    return {
        "prefix_hit_frac_by_blocks": {size: curve.hit_frac(size) for size in sizes},
        "tokens_per_block": curve.block_size,
        "kv_fit": dict(fit),
        "drafts": None if drafts is None else drafts.as_dict(),
        "model_error": "none: these are counts",
    }


def _agreeing(tokens: Sequence[int], end: int, known: int) -> int:
    """Tokens from `end` on that are those from `known` on; no more than anybody drafts."""
    most = min(MOST_DEPTH, known - end, len(tokens) - known)
    return next((k for k in range(most) if tokens[end + k] != tokens[known + k]), most)


def _yield(steps: Iterable[tuple[int, int]]) -> float:
    """Tokens a step in the mean; 1 without any."""
    kept = [k for _, k in steps]
    return 1 + sum(kept) / len(kept) if kept else 1.0


def _placed(steps: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    place = 0
    for drafted, kept in steps:
        yield place, drafted, kept
        place += kept + 1


@dataclass(slots=True)
class _Known:
    """Of a `RequestState`, what proposers look at."""

    id: int
    tokens: list[int]
    num_prompt_tokens: int
    num_tokens: int

    def token_ids(self, start: int, end: int) -> Any:
        import numpy as np

        return np.asarray(self.tokens[start:end], dtype=np.int32)


def _suffix_steps(
    texts: Sequence[tuple[RequestId, list[int], list[int]]], kinds: Mapping[RequestId, str], depth: int
) -> Iterator[Verification]:
    """One request after another, in the order in which they ended; the engine's own proposer drafts."""
    from xllm_lab.engine.drafts.suffix import SuffixProposer

    proposer = SuffixProposer()
    for request, prompt, output in texts:
        tokens, known = [*prompt, *output], len(prompt) + 1
        while known < len(tokens):
            state = _Known(request, tokens, len(prompt), known)
            most = min(depth, len(tokens) - known - 1)
            (draft,) = proposer.propose([Asked(cast(Any, state), "suffix", most, ())]) if most else ((),)
            kept = next((k for k, t in enumerate(draft) if t != tokens[known + k]), len(draft))
            if most:
                yield Verification("suffix", kinds[request], (0, request), most, len(draft), kept)
            known += kept + 1
        proposer.forget(request)
