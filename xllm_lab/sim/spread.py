"""How wrong fitted step times may be: what scatters and averages out over a run, and what does not.

    time of a step = us * (1 + bias) + (error of the weights) * factors + (error beyond the range) + scatter

Scatter is independent from step to step. The others are shared by similar steps, so that a run's add up: a run twice as
long is no better known. Everything is learnt from steps that the fit did not see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from scipy.special import ndtri, stdtrit

from xllm_lab.sim.cost import Price
from xllm_lab.step_time import TERMS, StepTime, fit

Floats: TypeAlias = npt.NDArray[np.float64]

NUM_FOLDS = 5
_NUM_BLOCKS = 20
_LOWER_FRAC = 0.5
# The two factors that grow while a batch decodes come first: only two rows of `weights_std` then know of them.
_GROWING = ("attention_us", "kv_read_us")
ORDER = (*map(TERMS.index, _GROWING), *(k for k, term in enumerate(TERMS) if term not in _GROWING))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Error of fitted step times. All 0 says that nothing is known, not that they are exact.

    Attributes:
        scatter_us, scatter_frac: variance of a step of t us around its mean: scatter_us * t + (scatter_frac * t)^2.
        bias_frac: standard deviation of the relative error of a stretch of steps, beyond what scatter explains.
        beyond_frac: relative error of what a step costs beyond the largest factors seen: measured on the longer half
            of the steps by a fit to the shorter one. At most 1, and 1 where that half is too small to fit or reaches as
            far: what lies beyond may cost nothing, or double.
        weights_std: U, upper triangular, shape [terms][terms]; the weights' covariance is U^T U, terms in `ORDER`.
    """

    scatter_us: float = 0.0
    scatter_frac: float = 0.0
    bias_frac: float = 0.0
    beyond_frac: float = 0.0
    weights_std: tuple[tuple[float, ...], ...] = ((0.0,) * len(TERMS),) * len(TERMS)

    def step_std_us(self, price: Price) -> float:
        """Standard deviation of one step's measured time around its price."""
        return math.sqrt(price.std_us**2 + self.scatter_us * price.us + (self.scatter_frac * price.us) ** 2)


UNKNOWN = Spread()


def held_out(rows: Floats, times: Floats) -> Floats:
    """Predictions of each of `NUM_FOLDS` parts by a fit to the others, shape [steps].

    Neighbouring steps resemble one another, so the parts are contiguous: a shuffled split would flatter the fit.
    """
    fold = _parts(len(times), NUM_FOLDS)
    predicted = np.empty_like(times)
    for k in range(NUM_FOLDS):
        weights = np.asarray(fit(rows[fold != k].tolist(), times[fold != k].tolist()).weights)
        predicted[fold == k] = rows[fold == k] @ weights
    return predicted


def spread_of(rows: Floats, times: Floats, predicted: Floats) -> Spread:
    """Learn a spread from steps and their held-out predictions.

    Args:
        rows: factors, shape [steps, terms].
        times: measured, shape [steps], us.
        predicted: by fits that did not see the step, shape [steps], us.
    """
    predicted = np.maximum(predicted, 1.0)
    scatter_us, scatter_frac = _scatter(times - predicted, predicted)
    variance = np.maximum(scatter_us * predicted + (scatter_frac * predicted) ** 2, 1e-12 * predicted**2)
    return Spread(
        scatter_us=scatter_us,
        scatter_frac=scatter_frac,
        bias_frac=_bias(times, predicted, variance),
        beyond_frac=_beyond(rows, times, predicted, variance),
        weights_std=_weights_std(rows, times, predicted, variance),
    )


def _parts(count: int, num_parts: int) -> npt.NDArray[np.int64]:
    return np.arange(count, dtype=np.int64) * num_parts // count


def _scatter(error: Floats, predicted: Floats) -> tuple[float, float]:
    # Differences of neighbours' errors hold twice the scatter, and nothing of what the two share.
    relative = error / predicted
    squared = np.diff(relative) ** 2 / 2
    level = np.sqrt(predicted[1:] * predicted[:-1])
    weights, _ = nnls(np.column_stack((1 / level, np.ones_like(level))), squared)
    return float(weights[0]), math.sqrt(weights[1])


def _bias(times: Floats, predicted: Floats, variance: Floats) -> float:
    fold = _parts(len(times), NUM_FOLDS)
    total = np.bincount(fold, predicted)
    bias = np.bincount(fold, times - predicted) / total
    by_chance = np.bincount(fold, variance) / total**2
    return math.sqrt(max(0.0, float((bias**2 - by_chance).mean())))


def _beyond(rows: Floats, times: Floats, predicted: Floats, variance: Floats) -> float:
    is_low = predicted <= np.quantile(predicted, _LOWER_FRAC)
    if is_low.all() or is_low.sum() < 2 * len(TERMS):
        return 1.0
    weights = np.asarray(fit(rows[is_low].tolist(), times[is_low].tolist()).weights)
    high = rows[~is_low]
    excess = np.maximum(high - rows[is_low].max(axis=0), 0.0) @ weights
    is_beyond = excess > 0
    if not is_beyond.any():
        return 1.0
    error = (times[~is_low] - high @ weights)[is_beyond]
    beyond = (error**2 - variance[~is_low][is_beyond]).sum() / (excess[is_beyond] ** 2).sum()
    return math.sqrt(min(1.0, max(0.0, float(beyond))))


def _weights_std(rows: Floats, times: Floats, predicted: Floats, variance: Floats) -> tuple[tuple[float, ...], ...]:
    """Covariance of weights from weighted least squares, with a prior where the steps tell nothing.

    The prior: a term, at the largest factor seen, costs about a mean step. A direction in which no step varied keeps
    it, where a pseudo-inverse would call it known.
    """
    highest = np.maximum(rows.max(axis=0), 1.0)
    scaled = (rows / highest)[:, ORDER]
    whitened = (times - predicted) / np.sqrt(variance)
    block = _parts(len(times), min(_NUM_BLOCKS, len(times)))
    # Errors that neighbours share are told once, however many steps repeat them.
    repeats = max(1.0, float((np.bincount(block, whitened) ** 2 / np.bincount(block)).mean()))
    prior = np.eye(len(TERMS)) / times.mean()
    # Steps that are alike in all but one way tell of that to twelve digits and of the rest nothing: their products
    # would be no matrix of full rank any more. Backwards, as the factor of an inverse is wanted.
    known = np.vstack((scaled / np.sqrt(variance * repeats)[:, None], prior))[:, ::-1]
    triangle: Floats = np.asarray(np.linalg.qr(known, mode="r"))
    triangle *= np.where(np.diag(triangle) < 0, -1.0, 1.0)[:, None]
    backwards = solve_triangular(triangle, np.eye(len(TERMS)), trans="T")
    factor = backwards[::-1, ::-1] / highest[list(ORDER)]
    return tuple(tuple(float(u) for u in row) for row in factor)


class RunSpread:
    """How well the total of a run's step times is known. Latencies of requests that queue are known less.

    Attributes:
        us: predicted total.
    """

    def __init__(self, step_time: StepTime, highest: Sequence[float], spread: Spread) -> None:
        self._weights = np.asarray(step_time.weights)
        self._highest = np.asarray(highest)
        self._spread = spread
        self._factors = np.zeros(len(TERMS))
        self._excess = np.zeros(len(TERMS))
        self._squares_us2 = 0.0
        self.us = 0.0

    def add(self, rows: Floats) -> None:
        """Some of the run's steps: factors, shape [steps, terms], as `step_time.feature_rows` has them."""
        us = rows @ self._weights
        self.us += float(us.sum())
        self._squares_us2 += float(us @ us)
        self._factors += rows.sum(axis=0)
        self._excess += np.maximum(rows - self._highest, 0.0).sum(axis=0)

    @property
    def std_frac(self) -> float:
        """Standard deviation of the measured total around the predicted one, relative to it; 0 of no steps."""
        return math.hypot(self._spread.bias_frac, self._other_us() / self.us) if self.us else 0.0

    def half_width_frac(self, confidence: float = 0.95) -> float:
        """Half of the interval around the predicted total that holds the measured one with this `confidence`.

        Relative to the predicted total; 0 of no steps. Student's t for the bias, which is learnt from a few folds.
        """
        if not self.us:
            return 0.0
        level = 0.5 + 0.5 * confidence
        bias = float(stdtrit(NUM_FOLDS, level)) * self._spread.bias_frac
        return math.hypot(bias, float(ndtri(level)) * self._other_us() / self.us)

    def _other_us(self) -> float:
        """All but the bias."""
        spread = self._spread
        weights = np.linalg.norm(np.asarray(spread.weights_std) @ self._factors[list(ORDER)])
        beyond = spread.beyond_frac * float(self._excess @ self._weights)
        scatter = math.sqrt(spread.scatter_us * self.us + spread.scatter_frac**2 * self._squares_us2)
        return math.hypot(float(weights), beyond, scatter)
