"""A cost model learnt from the step records of an engine, which knows where it was calibrated."""

from __future__ import annotations

from xllm_lab.scheduler import Step
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.step_time import Chunk, features


class FittedCost:
    """Fitted weights times the step's features.

    Attributes:
        num_steps: steps priced so far.
        num_extrapolated: those with a feature outside the calibrated range.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._weights = calibration.step_time.weights
        self._highest = calibration.highest
        self.num_steps = 0
        self.num_extrapolated = 0

    def step_us(self, step: Step) -> float:
        chunks = (Chunk(c.num_tokens, c.num_computed_tokens) for c in step.chunks)
        row = features(chunks, sum(c.samples for c in step.chunks))
        self.num_steps += 1
        self.num_extrapolated += any(f > h for f, h in zip(row, self._highest, strict=True))
        return sum(w * f for w, f in zip(self._weights, row, strict=True))

    @property
    def extrapolated_frac(self) -> float:
        return self.num_extrapolated / self.num_steps if self.num_steps else 0.0
