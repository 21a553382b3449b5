"""A machine whose step times are known: what a calibration learns from it can be held against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xllm_lab.sim.calibrate import Calibration, calibrate_on
from xllm_lab.step_samples import StepSample
from xllm_lab.step_time import TERMS, Chunk, features

Chunks = tuple[Chunk, ...]
WEIGHTS = {
    **{"eager_us": 3000.0, "small_batch_16_us": 100.0, "token_us": 20.0, "sequence_us": 50.0},
    **{"kv_read_us": 0.2, "attention_us": 0.01},
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`WEIGHTS`, and what makes single steps differ from them.

    Attributes:
        scatter_frac: of each step, independent of all others.
        drift_frac: of every stretch of `drift_steps`, shared by its steps.
        bend: per token in KV squared: a machine that is no sum of terms.
    """

    scatter_frac: float = 0.05
    drift_frac: float = 0.0
    drift_steps: int = 80
    bend: float = 0.0

    def mean_us(self, steps: Sequence[Chunks]) -> npt.NDArray[np.float64]:
        rows = np.asarray([features(chunks, len(chunks)) for chunks in steps])
        weights = np.asarray([WEIGHTS.get(term, 0.0) for term in TERMS])
        return np.asarray(rows @ weights + self.bend * rows[:, TERMS.index("kv_read_us")] ** 2)

    def step_us(self, rng: np.random.Generator, steps: Sequence[Chunks]) -> npt.NDArray[np.float64]:
        stretches = np.arange(len(steps)) // self.drift_steps
        drift = 1 + self.drift_frac * rng.standard_normal(stretches[-1] + 1)[stretches]
        scatter = 1 + self.scatter_frac * rng.standard_normal(len(steps))
        return np.asarray(self.mean_us(steps) * drift * scatter)

    def calibrated(self, rng: np.random.Generator, num_steps: int) -> Calibration:
        """On steps with contexts of up to a thousand tokens."""
        steps = mixed_steps(rng, num_steps)
        times = self.step_us(rng, steps).tolist()
        samples = [StepSample(chunks=c, num_logits=len(c), step_us=us) for c, us in zip(steps, times, strict=True)]
        return calibrate_on(samples, model={"vocab_size": 1000}, hardware={}, sources=("synthetic",))


def mixed_steps(rng: np.random.Generator, num_steps: int, *, context: float = 1.0) -> list[Chunks]:
    """Up to 32 decodes and often a chunk of a prompt, with contexts of up to `context` thousand tokens."""
    steps = []
    for _ in range(num_steps):
        contexts = rng.integers(1, int(1000 * context) + 1, rng.integers(0, 33))
        chunks = [Chunk(1, int(c)) for c in contexts]
        if not chunks or rng.random() < 0.3:
            chunks.append(Chunk(int(rng.integers(2, 513)), int(rng.integers(0, int(500 * context)))))
        steps.append(tuple(chunks))
    return steps
