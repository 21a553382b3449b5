"""A cost model learnt from the step records of an engine, which knows where it was calibrated."""

from __future__ import annotations

from typing import Any

import numpy as np

from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.cost import Batch, Price, Prices
from xllm_lab.step_time import SMALL_BATCHES


class FittedCost:
    """Fitted weights times the step's features."""

    def __init__(self, calibration: Calibration) -> None:
        self._weights = calibration.step_time.weights
        self._highest = calibration.highest

    def step(self, batch: Batch) -> Price:
        row = _features(batch)
        us = self._weights[0] * row[0]
        is_extrapolated = False
        for k in range(1, len(row)):
            us = us + self._weights[k] * row[k]
        for value, highest in zip(row, self._highest, strict=True):
            is_extrapolated |= value > highest
        return Price(us, is_extrapolated)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        # The context is an array, everything else a number: each feature is then one or the other.
        grown = batch._replace(
            decode_kv_tokens=batch.decode_kv_tokens + batch.num_decodes * np.arange(num_steps)  # type: ignore[arg-type]
        )
        us, is_extrapolated = self.step(grown)
        every = np.ones(num_steps)
        return Prices(us * every, np.logical_and(is_extrapolated, every > 0))


def _features(batch: Batch) -> list[Any]:
    """The factors of `step_time.TERMS`; sums of integers and halves, hence exact in any order."""
    kv: Any = batch.decode_kv_tokens
    tokens = kv_read = batch.num_decodes
    kv_read = kv_read + kv
    attention = kv + 0.5 * batch.num_decodes
    for new, computed in batch.prefills:
        tokens += new
        kv_read = kv_read + computed + new
        attention = attention + new * (computed + 0.5 * new)
    small = (float(min(tokens, m)) for m in SMALL_BATCHES)
    return [1.0, *small, tokens, batch.num_seqs, batch.num_logits, attention, kv_read]
