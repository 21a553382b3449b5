"""How long drafting takes, as a sum of terms; fitted with non-negative weights to what an engine measured.

draft_us = call_us                          somebody drafts at all
         + request_us * requests            looking up, or computing what the draft has not seen of each
         + depth_us   * depth               one pass of a draft model for each further token
         + token_us   * requests * depth
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from xllm_lab.errors import ConfigError


class Weights(NamedTuple):
    """Microseconds per unit of each term."""

    call_us: float = 0.0
    request_us: float = 0.0
    depth_us: float = 0.0
    token_us: float = 0.0


class DraftLoad(NamedTuple):
    """What a step drafts by one method: for so many requests, up to so many tokens."""

    method: str
    num_requests: int
    depth: int


class Drafted(NamedTuple):
    """What one step drafted, by all methods together, and how long that took."""

    loads: tuple[DraftLoad, ...]
    us: float


@dataclass(frozen=True, slots=True)
class DraftTime:
    """Weights by method; drafting by any other is free."""

    weights: Mapping[str, Weights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for method, weights in self.weights.items():
            if len(weights) != len(Weights._fields) or any(w < 0 or not np.isfinite(w) for w in weights):
                accepted = f"{len(Weights._fields)} numbers of at least 0"
                raise ConfigError(f"draft-time weights of {method!r} are {weights}, accepted: {accepted}")

    def us(self, method: str, num_requests: int, depth: int) -> float:
        """Of drafting up to `depth` tokens for each of so many requests."""
        if method not in self.weights:
            return 0.0
        call_us, request_us, depth_us, token_us = self.weights[method]
        return call_us + request_us * num_requests + (depth_us + token_us * num_requests) * depth


def draft_loads(asks: Iterable[tuple[str, int]]) -> tuple[DraftLoad, ...]:
    """Of a step's asks, each a method and a depth; in order of method."""
    loads: dict[str, tuple[int, int]] = {}
    for method, asked in asks:
        num, depth = loads.get(method, (0, 0))
        loads[method] = (num + 1, max(depth, asked))
    return tuple([DraftLoad(method, num, depth) for method, (num, depth) in sorted(loads.items())])


def fit_draft_time(drafted: Iterable[Drafted]) -> DraftTime:
    """Non-negative least squares, all methods at once: a step that mixes them tells of their sum."""
    from scipy.optimize import nnls

    steps = list(drafted)
    methods = sorted({load.method for step in steps for load in step.loads})
    if not methods:
        return DraftTime()
    width = len(Weights._fields)
    factors = np.zeros((len(steps), width * len(methods)))
    for row, step in zip(factors, steps, strict=True):
        for method, num, depth in step.loads:
            first = methods.index(method) * width
            row[first : first + width] = 1, num, depth, num * depth
    scale = factors.max(axis=0)
    found, _ = nnls(factors / scale, np.asarray([step.us for step in steps], dtype=np.float64))
    weights = (found / scale).reshape(-1, width).tolist()
    return DraftTime({method: Weights(*of_method) for method, of_method in zip(methods, weights, strict=True)})
