"""A cost model learnt from measured steps, which knows where it was calibrated and how wrong it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import gt, mul
from typing import Any, NamedTuple

import numpy as np

from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.cost import Batch, Price, Prices
from xllm_lab.sim.spread import ORDER
from xllm_lab.step_time import SMALL_BATCHES

# A run has few shapes of decoding batches and many of prefills; these fit a few megabytes.
_NUM_SHAPES = 4096


class _Shape(NamedTuple):
    """What does not depend on contexts: the sums over all terms but `attention_us` and `kv_read_us`.

    Attributes:
        row_0, row_1: of `Spread.weights_std` times the factors; the only rows with a part that depends on contexts.
        variance: sum of squares of the other rows times the factors.
        excess_us: cost of what lies beyond the largest factors.
    """

    us: float
    row_0: float
    row_1: float
    variance: float
    excess_us: float
    is_extrapolated: bool


class FittedCost:
    """Fitted weights times the step's factors; the standard error is that of `Calibration.spread`."""

    def __init__(self, calibration: Calibration) -> None:
        spread = calibration.spread
        self._weights = [calibration.step_time.weights[k] for k in ORDER]
        self._highest = [calibration.highest[k] for k in ORDER]
        (std_00, std_01), (_, std_11) = (row[:2] for row in spread.weights_std[:2])
        errors = (std_00, std_01, std_11, spread.bias_frac, spread.beyond_frac)
        self._constants = (*self._weights[:2], *self._highest[:2], *errors)
        # Row by row from the diagonal on: what is left of it is 0.
        self._std_of_shapes = [row[max(2, k) :] for k, row in enumerate(spread.weights_std)]
        self._shape = lru_cache(_NUM_SHAPES)(self._shape_of)

    def step(self, batch: Batch) -> Price:
        prefills, decodes, kv, _, logits = batch
        tokens = decodes
        attention, kv_read = kv + 0.5 * decodes, decodes + kv
        for new, computed in prefills:
            tokens += new
            attention += new * (computed + 0.5 * new)
            kv_read += computed + new
        shape = self._shape(tokens, decodes + len(prefills), logits)
        return Price(*self._price(shape, attention, kv_read, max, math.sqrt))

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        decodes = batch.num_decodes
        kv = batch.decode_kv_tokens + decodes * np.arange(num_steps)
        shape = self._shape(decodes, decodes, batch.num_logits)
        return Prices(*self._price(shape, kv + 0.5 * decodes, decodes + kv, np.maximum, np.sqrt))

    def _price(
        self,
        shape: _Shape,
        attention: Any,
        kv_read: Any,
        maximum: Callable[[Any, float], Any],
        sqrt: Callable[[Any], Any],
    ) -> tuple[Any, Any, Any]:
        """(us, is_extrapolated, std_us) for two numbers, or for two arrays of shape [steps]: the same operations."""
        attention_us, kv_read_us, most_attention, most_kv_read, std_00, std_01, std_11, bias, beyond = self._constants
        shape_us, row_0, row_1, variance, excess_us, is_extrapolated = shape
        us = shape_us + attention_us * attention + kv_read_us * kv_read
        row_0 = row_0 + std_00 * attention + std_01 * kv_read
        row_1 = row_1 + std_11 * kv_read
        excess_us = excess_us + attention_us * maximum(attention - most_attention, 0.0)
        excess_us = excess_us + kv_read_us * maximum(kv_read - most_kv_read, 0.0)
        shared_us, beyond_us = bias * us, beyond * excess_us
        variance = variance + row_0 * row_0 + row_1 * row_1 + shared_us * shared_us + beyond_us * beyond_us
        is_beyond = (attention > most_attention) | (kv_read > most_kv_read) | is_extrapolated
        return us, is_beyond, sqrt(variance)

    def _shape_of(self, tokens: int, sequences: int, logits: int) -> _Shape:
        factors = [1.0, *(float(min(tokens, m)) for m in SMALL_BATCHES), float(tokens), float(sequences), float(logits)]
        most = self._highest[2:]
        is_extrapolated = any(map(gt, factors, most))
        rows = [sum(map(mul, row, factors[-len(row) :])) for row in self._std_of_shapes]
        return _Shape(
            us=sum(map(mul, self._weights[2:], factors)),
            row_0=rows[0],
            row_1=rows[1],
            variance=sum(map(mul, rows[2:], rows[2:])),
            excess_us=self._excess_us(factors) if is_extrapolated else 0.0,
            is_extrapolated=is_extrapolated,
        )

    def _excess_us(self, factors: Sequence[float]) -> float:
        terms = zip(self._weights[2:], factors, self._highest[2:], strict=True)
        return sum(weight * (factor - most) for weight, factor, most in terms if factor > most)
