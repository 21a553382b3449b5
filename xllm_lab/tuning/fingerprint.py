"""What a workload is like, and how far that varies by itself: how fast, how irregular, how long, how alike.

A workload is cut into slices of as many requests each. A feature's mean over slices is what the workload is like; what
slices differ by is the noise that a later trace must exceed before it is called another workload.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from xllm_lab.errors import ConfigError
from xllm_lab.workload import Prompt, Request, Workload, stream

NUM_SLICES = 16
LEAST_SLICES = 4
LEAST_IN_SLICE = 4
# All features together are taken for drifted by chance once in a hundred traces.
FALSE_ALARM_FRAC = 0.01
# Of a feature that never varied: a change smaller than this is none.
_LEAST_CHANGE_FRAC = 0.01
_NUM_DRAWS = 1_000
# Of prompts that are given as tokens: they are alike in blocks of so many.
_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Of a workload.

    Attributes:
        slice_requests: in each slice.
        slices: by feature, its value in each slice, in order of arrival.
    """

    slice_requests: int
    slices: dict[str, tuple[float, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `fingerprint_from` turns it back."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One feature, then and now.

    Attributes:
        was, now: means over slices.
        threshold: what `now` may differ by, by chance.
    """

    feature: str
    was: float
    now: float
    threshold: float

    @property
    def is_drift(self) -> bool:
        return abs(self.now - self.was) > self.threshold


def fingerprint(workload: Workload) -> Fingerprint:
    """Of at least sixteen requests; ConfigError for fewer."""
    count = len(workload.requests)
    if count < LEAST_SLICES * LEAST_IN_SLICE:
        least = LEAST_SLICES * LEAST_IN_SLICE
        raise ConfigError(f"{workload.source}: {count} requests have no fingerprint; accepted: at least {least}")
    return _sliced(workload, max(LEAST_IN_SLICE, count // NUM_SLICES))


def fingerprint_from(value: Mapping[str, Any]) -> Fingerprint:
    """Inverse of `Fingerprint.as_dict`. KeyError, TypeError or ValueError for anything else."""
    return Fingerprint(
        slice_requests=value["slice_requests"] + 0,
        slices={name: tuple(float(v) for v in values) for name, values in value["slices"].items()},
    )


def changes(then: Fingerprint, live: Workload) -> tuple[Change, ...]:
    """Each feature of a live trace beside that of the workload then.

    The threshold is Student's t of the standard error that means of so many slices have, by bootstrap over the slices
    of then; Bonferroni's, as there are several features.

    Raises:
        ConfigError: the trace has not enough requests for two slices.
    """
    if len(live.requests) < 2 * then.slice_requests:
        raise ConfigError(
            f"{live.source}: {len(live.requests)} requests; accepted: at least {2 * then.slice_requests}, two slices"
        )
    now = _sliced(live, then.slice_requests)
    generator = stream(0, "fingerprint")
    level = 1 - FALSE_ALARM_FRAC / len(then.slices) / 2
    found = []
    for name, values in then.slices.items():
        others = now.slices.get(name)
        if others is None:  # clients of a closed loop have no rate
            continue
        slices, num_then, num_now = np.asarray(values), len(values), len(others)
        drawn = generator.choice(slices, (_NUM_DRAWS, num_then)).mean(axis=1)
        drawn_now = generator.choice(slices, (_NUM_DRAWS, num_now)).mean(axis=1)
        error = float(np.std(drawn - drawn_now)) * math.sqrt(num_then / (num_then - 1))
        was = float(slices.mean())
        threshold = max(float(stdtrit(num_then - 1, level)) * error, _LEAST_CHANGE_FRAC * abs(was))
        found.append(Change(feature=name, was=was, now=float(np.mean(others)), threshold=threshold))
    return tuple(found)


def _sliced(workload: Workload, length: int) -> Fingerprint:
    requests = workload.requests
    parts = [requests[k : k + length] for k in range(0, len(requests) - length + 1, length)]
    is_open = workload.closed_loop is None
    slices = {name: tuple(of(part) for part in parts) for name, of in FEATURES.items() if is_open or name not in _OPEN}
    return Fingerprint(slice_requests=length, slices=slices)


def _gaps_s(part: Sequence[Request]) -> Any:
    return np.diff([r.arrival_us for r in part]) / 1e6


def _log_rate(part: Sequence[Request]) -> float:
    """Its logarithm: slices with few arrivals a second and with many are as far from the mean."""
    return -math.log(max(1e-6, float(_gaps_s(part).mean())))


def _irregularity(part: Sequence[Request]) -> float:
    """Coefficient of variation of gaps: 1 of Poisson's, more of bursts."""
    gaps = _gaps_s(part)
    return float(gaps.std() / gaps.mean()) if gaps.mean() else 0.0


def _quantile(tokens: Callable[[Request], int], level: int) -> Callable[[Sequence[Request]], float]:
    return lambda part: float(np.percentile([tokens(r) for r in part], level))


def _prompt(request: Request) -> int:
    return request.prompt.num_tokens


def _output(request: Request) -> int:
    return request.output_tokens


def _shared_frac(part: Sequence[Request]) -> float:
    """Of prompt tokens, those with which an earlier prompt of the slice begins, too."""
    return sum(shared for shared, _ in _alike(part)) / sum(r.prompt.num_tokens for r in part)


def _continued_frac(part: Sequence[Request]) -> float:
    """Of requests, those whose prompt begins with an earlier, shorter one of the slice: the next turn of a session."""
    return sum(goes_on for _, goes_on in _alike(part)) / len(part)


def _alike(part: Sequence[Request]) -> Iterator[tuple[int, bool]]:
    """For each request: tokens shared with an earlier one, and whether a shorter one's full blocks all are."""
    nodes: dict[tuple[int, Hashable], int] = {}
    ends: dict[int, int] = {}  # length of the shortest prompt whose full blocks end here
    for request in part:
        node, shared, is_known, goes_on, length = 0, 0, True, False, request.prompt.num_tokens
        for block, num_tokens in _blocks(request.prompt):
            is_known = is_known and (node, block) in nodes
            node = nodes.setdefault((node, block), len(nodes) + 1)
            shared += num_tokens * is_known
            goes_on = goes_on or (is_known and ends.get(node, length) < length)
        if node:
            ends[node] = min(length, ends.get(node, length))
        yield shared, goes_on


def _blocks(prompt: Prompt) -> Iterator[tuple[Hashable, int]]:
    """Full blocks, with their tokens; a prompt of which only the length is known has none."""
    if prompt.token_ids is not None:
        for k in range(0, prompt.num_tokens - _BLOCK_TOKENS + 1, _BLOCK_TOKENS):
            yield prompt.token_ids[k : k + _BLOCK_TOKENS], _BLOCK_TOKENS
        return
    for block_hash in prompt.block_hashes[: prompt.num_tokens // prompt.hash_block_tokens]:
        yield block_hash, prompt.hash_block_tokens


_OPEN = ("log_rate", "irregularity")
FEATURES: dict[str, Callable[[Sequence[Request]], float]] = {
    "log_rate": _log_rate,
    "irregularity": _irregularity,
    "prompt_tokens.p50": _quantile(_prompt, 50),
    "prompt_tokens.p90": _quantile(_prompt, 90),
    "output_tokens.p50": _quantile(_output, 50),
    "output_tokens.p90": _quantile(_output, 90),
    "shared_prompt_frac": _shared_frac,
    "continued_frac": _continued_frac,
}
