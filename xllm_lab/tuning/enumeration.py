"""Candidates without a study: drawn evenly over a space, and chosen to differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import qmc

from xllm_lab.candidate import Candidate, num_changes
from xllm_lab.tuning.space import Space


class EvenDraws:
    """Parameters from one point of the unit cube; each name has a dimension of its own.

    Attributes:
        params: what was drawn.
    """

    def __init__(self, point: Sequence[float], dimensions: dict[str, int]) -> None:
        self._point, self._dimensions = point, dimensions
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._keep(name, choices[min(int(self._part(name) * len(choices)), len(choices) - 1)])

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        drawn = self._between(name, low - 0.5 if not log else low * 0.97, high + 0.5 if not log else high * 1.03, log)
        return int(self._keep(name, min(high, max(low, round(drawn)))))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._keep(name, min(high, max(low, self._between(name, low, high, log)))))

    def _between(self, name: str, low: float, high: float, log: bool) -> float:
        part = self._part(name)
        return float(low * (high / low) ** part) if log and low > 0 else low + (high - low) * part

    def _part(self, name: str) -> float:
        return float(self._point[self._dimensions.setdefault(name, len(self._dimensions)) % len(self._point)])

    def _keep(self, name: str, value: Any) -> Any:
        self.params[name] = value
        return value


def enumerated(space: Space, log2_count: int, seed: int) -> Iterator[tuple[dict[str, Any], Candidate]]:
    """2^log2_count points of a scrambled Sobol sequence, as parameters and candidates."""
    dimensions: dict[str, int] = {}
    width = len(space.describe()["knobs"]) + len(space.names)
    for point in np.asarray(qmc.Sobol(width, seed=seed).random_base2(log2_count)).tolist():
        draws = EvenDraws(point, dimensions)
        yield draws.params, space.suggest(draws)


def spread(candidates: Sequence[Candidate], count: int) -> list[int]:
    """Places of so many that differ most in their fields, the first one included; the earlier ones among equals."""
    chosen = [0] if candidates else []
    apart = [num_changes(one, candidates[0]) for one in candidates] if candidates else []
    while len(chosen) < min(count, len(candidates)):
        place = max(range(len(candidates)), key=lambda k: (apart[k], -k))
        if apart[place] == 0:
            break  # the rest are copies
        chosen.append(place)
        apart = [min(a, num_changes(one, candidates[place])) for a, one in zip(apart, candidates, strict=True)]
    return chosen
