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
        self._most_attention, self._most_kv_read = self._highest[:2]
        (std_00, std_01), (_, std_11) = (row[:2] for row in spread.weights_std[:2])
        self._constants = (*self._weights[:2], std_00, std_01, std_11, spread.bias_frac, spread.beyond_frac)
        # Row by row from the diagonal on: what is left of it is 0.
        self._std_of_shapes = [row[max(2, k) :] for k, row in enumerate(spread.weights_std)]
        self._shape = lru_cache(_NUM_SHAPES)(self._shape_of)

    def step(self, batch: Batch) -> Price:
        prefills, decodes, kv, _, logits, graph_tokens = batch
        if graph_tokens is not None and not prefills:
            decodes = logits = graph_tokens  # what pads is a sequence of one token
        tokens = decodes
        attention, kv_read = kv + 0.5 * decodes, decodes + kv
        for new, computed in prefills:
            tokens += new
            attention += new * (computed + 0.5 * new)
            kv_read += computed + new
        is_replayed = graph_tokens is not None
        shape = self._shape(graph_tokens or tokens, decodes + len(prefills), logits, is_replayed)
        if attention > self._most_attention or kv_read > self._most_kv_read:
            excess_us, is_extrapolated = self._excess_us(shape.excess_us, attention, kv_read, max), True
        else:
            excess_us, is_extrapolated = shape.excess_us, shape.is_extrapolated
        us, std_us = self._price(shape, attention, kv_read, excess_us, math.sqrt)
        return Price(us, is_extrapolated, std_us)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        is_replayed = batch.graph_tokens is not None
        decodes = batch.graph_tokens or batch.num_decodes
        kv_read = decodes + batch.decode_kv_tokens + batch.num_decodes * np.arange(num_steps)
        attention = kv_read - 0.5 * decodes
        shape = self._shape(decodes, decodes, decodes if is_replayed else batch.num_logits, is_replayed)
        # Contexts only grow: where the last step is within the range, all are.
        if attention[-1] > self._most_attention or kv_read[-1] > self._most_kv_read:
            excess_us = self._excess_us(shape.excess_us, attention, kv_read, np.maximum)
            flags = (attention > self._most_attention) | (kv_read > self._most_kv_read) | shape.is_extrapolated
        else:
            excess_us, flags = shape.excess_us, np.full(num_steps, shape.is_extrapolated)
        us, std_us = self._price(shape, attention, kv_read, excess_us, np.sqrt)
        return Prices(us, flags, std_us)

    def _price(
        self, shape: _Shape, attention: Any, kv_read: Any, excess_us: Any, sqrt: Callable[[Any], Any]
    ) -> tuple[Any, Any]:
        """(us, std_us) of one step, or of many in arrays of shape [steps]: the same operations."""
        attention_us, kv_read_us, std_00, std_01, std_11, bias, beyond = self._constants
        us, row_0, row_1, variance, _, _ = shape
        us = us + attention_us * attention + kv_read_us * kv_read
        row_0 = row_0 + std_00 * attention + std_01 * kv_read
        row_1 = row_1 + std_11 * kv_read
        shared_us, beyond_us = bias * us, beyond * excess_us
        variance = variance + row_0 * row_0 + row_1 * row_1 + shared_us * shared_us + beyond_us * beyond_us
        return us, sqrt(variance)

    def _excess_us(self, excess_us: float, attention: Any, kv_read: Any, maximum: Callable[[Any, float], Any]) -> Any:
        """Cost beyond the range: of the shape, and what contexts add; within it they add 0 exactly."""
        attention_us, kv_read_us = self._weights[:2]
        added = excess_us + attention_us * maximum(attention - self._most_attention, 0.0)
        return added + kv_read_us * maximum(kv_read - self._most_kv_read, 0.0)

    def _shape_of(self, tokens: int, sequences: int, logits: int, is_replayed: bool) -> _Shape:
        small = (float(min(tokens, m)) for m in SMALL_BATCHES)
        factors = [1.0 - is_replayed, 0.0 + is_replayed, *small, float(tokens), float(sequences), float(logits)]
        most = self._highest[2:]
        is_extrapolated = any(map(gt, factors, most))
        rows = [sum(map(mul, row, factors[-len(row) :])) for row in self._std_of_shapes]
        return _Shape(
            us=sum(map(mul, self._weights[2:], factors)),
            row_0=rows[0],
            row_1=rows[1],
            variance=sum(map(mul, rows[2:], rows[2:])),
            excess_us=self._excess_of_shape_us(factors) if is_extrapolated else 0.0,
            is_extrapolated=is_extrapolated,
        )

    def _excess_of_shape_us(self, factors: Sequence[float]) -> float:
        terms = zip(self._weights[2:], factors, self._highest[2:], strict=True)
        return sum(weight * (factor - most) for weight, factor, most in terms if factor > most)
