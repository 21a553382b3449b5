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


class Drafted(NamedTuple):
    """What one step drafted by one method, and how long that took."""

    method: str
    num_requests: int
    depth: int
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


def fit_draft_time(drafted: Iterable[Drafted]) -> DraftTime:
    """Non-negative least squares by method."""
    from scipy.optimize import nnls

    rows: dict[str, list[Drafted]] = {}
    for step in drafted:
        rows.setdefault(step.method, []).append(step)
    weights: dict[str, Weights] = {}
    for method, steps in sorted(rows.items()):
        factors = np.asarray([[1, s.num_requests, s.depth, s.num_requests * s.depth] for s in steps], dtype=np.float64)
        scale = factors.max(axis=0)
        found, _ = nnls(factors / scale, np.asarray([s.us for s in steps], dtype=np.float64))
        weights[method] = Weights(*(found / scale).tolist())
    return DraftTime(weights)
