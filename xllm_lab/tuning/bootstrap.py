"""Intervals of paired runs by drawing repeats with replacement, and in each stretches of requests with their pairs.

Neighbours share a queue, so single requests are not independent. Circular stretches of about the square root of all
hold most of what they share, and are many enough to vary: D. Politis and J. Romano, A circular block-resampling
procedure for stationary data, 1992.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from xllm_lab.metrics import is_served, meets_slo, summarize, tpot_us, ttft_us
from xllm_lab.records import Records, RequestRecord
from xllm_lab.request_columns import columns_of
from xllm_lab.workload import stream

NUM_DRAWS = 1_000
LEVELS = (50, 90, 99)
_95 = (2.5, 97.5)

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Candidate less default, with its 95 % interval."""

    expected: float
    low: float
    high: float


class PairedBootstrap:
    """Of repeats of the same requests.

    Args:
        default, tuned: one run a repeat, requests in order of id.
    """

    def __init__(self, default: Sequence[Records], tuned: Sequence[Records]) -> None:
        self._pairs = [(_Columns(one), _Columns(other)) for one, other in zip(default, tuned, strict=True)]
        self._generator = stream(0, "bootstrap")
        self._repeats = self._generator.integers(0, len(self._pairs), (NUM_DRAWS, len(self._pairs)))

    def gain(self) -> tuple[float, float] | None:
        """95 % interval of the gain of goodput, as a fraction of the default's; None if a default may have none."""
        rows = [_stretches(self._generator, len(one.good_tokens)) for one, _ in self._pairs]
        default, tuned = (
            self._means([pair[k].goodput_per_s(drawn) for pair, drawn in zip(self._pairs, rows, strict=True)])
            for k in range(2)
        )
        if not (default > 0).all():
            return None
        low, high = np.percentile(tuned / default - 1, _95)
        return float(low), float(high)

    def differences(self) -> dict[str, Difference]:
        """Of latencies' percentiles, microseconds, by metric; those of latencies that all runs have."""
        found = {}
        for name in ("ttft_us", "tpot_us"):
            both = [_of_both(one.latencies[name], other.latencies[name]) for one, other in self._pairs]
            if not all(len(one) for one, _ in both):
                continue
            rows = [_stretches(self._generator, len(one)) for one, _ in both]
            exact = np.asarray([_differences(one[None], other[None])[:, 0] for one, other in both]).mean(axis=0)
            drawn = [_differences(one[r], other[r]) for (one, other), r in zip(both, rows, strict=True)]
            for k, level in enumerate(LEVELS):
                low, high = np.percentile(self._means([of_run[k] for of_run in drawn]), _95)
                found[f"{name}.p{level}"] = Difference(expected=float(exact[k]), low=float(low), high=float(high))
        return found

    def _means(self, values: Sequence[Floats]) -> Floats:
        """Over the repeats of each draw; of values [repeats][draws]."""
        means: Floats = np.take_along_axis(np.asarray(values).T, self._repeats, axis=1).mean(axis=1)
        return means


class _Columns:
    """One run's requests in order of id; NaN for a latency that a request has not."""

    def __init__(self, run: Records) -> None:
        good = np.concatenate([meets_slo(columns) for columns in columns_of(run.requests)])
        self.good_tokens: Floats = good * np.asarray([r.output_tokens for r in run.requests], dtype=np.float64)
        self.latencies = {"ttft_us": _column(run.requests, ttft_us), "tpot_us": _column(run.requests, tpot_us)}
        self._span_s = summarize(run).makespan_s

    def goodput_per_s(self, rows: Ints) -> Floats:
        """Of each draw, as if its requests had come in the run's span."""
        tokens: Floats = self.good_tokens[rows].sum(axis=1)
        return tokens / self._span_s if self._span_s else np.zeros_like(tokens)


def _column(requests: Sequence[RequestRecord], latency: Callable[[RequestRecord], float | None]) -> Floats:
    values = ((latency(r) if is_served(r) else None) for r in requests)
    return np.asarray([np.nan if v is None else v for v in values], dtype=np.float64)


def _of_both(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    there = ~(np.isnan(one) | np.isnan(other))
    return one[there], other[there]


def _differences(one: Floats, other: Floats) -> Floats:
    """Of percentiles, shape [levels, draws]; of latencies [draws, requests]."""
    found: Floats = np.percentile(other, LEVELS, axis=1) - np.percentile(one, LEVELS, axis=1)
    return found


def _stretches(generator: Generator, count: int) -> Ints:
    """Rows of each draw, shape [draws, count]: as many as there are, in stretches that go on at the beginning."""
    length = max(1, round(math.sqrt(count)))
    starts = generator.integers(0, count, (NUM_DRAWS, -(-count // length)))
    rows: Ints = (starts[:, :, None] + np.arange(length)).reshape(NUM_DRAWS, -1)[:, :count] % count
    return rows
