"""Records as a few hundred points: what a figure can show, however long the run was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xllm_lab.records import Records, StepRecord

Floats = npt.NDArray[np.float64]

# A figure is about 500 pixels wide, so more points than this cannot be told apart.
NUM_SLICES = 400
NUM_CDF_POINTS = 400


class StepTokens(NamedTuple):
    """Tokens of one step: of prompts (recomputation after a preemption included), and decoded ones."""

    prompt: int
    decode: int


def step_tokens(step: StepRecord, prompt_tokens: dict[int, int]) -> StepTokens:
    """A chunk decodes if it is one token of a request whose prompt, `prompt_tokens[id]` long, is in KV already."""
    decode = sum(
        new == 1 and computed >= prompt_tokens[request_id]
        for request_id, new, computed in zip(step.ids, step.num_tokens, step.num_computed_tokens, strict=True)
    )
    return StepTokens(sum(step.num_tokens) - decode, decode)


class Timeline:
    """Means over equal slices of a run's time, from 0 to the end of its last step.

    Attributes:
        end_s: end of the last step, seconds since the run's start.
        middle_s: middle of each slice, seconds since the run's start.
    """

    def __init__(self, steps: Sequence[StepRecord]) -> None:
        start = np.asarray([s.start_us for s in steps], dtype=np.float64)
        end = np.asarray([s.end_us for s in steps], dtype=np.float64)
        self._edges = np.linspace(0.0, end[-1], NUM_SLICES + 1)
        self._bounds = np.column_stack((start, end)).ravel()
        self._step_us = end - start
        self._busy_us = self._integral(np.ones(len(steps)))
        self.end_s = float(end[-1]) / 1e6
        self.middle_s: Floats = (self._edges[:-1] + self._edges[1:]) / 2e6

    def mean(self, values: Sequence[float]) -> Floats:
        """Of a value per step, weighted by how long each step was under way in the slice; NaN where none was."""
        total = self._integral(np.asarray(values, dtype=np.float64))
        is_idle = self._busy_us < 1e-6
        return np.where(is_idle, np.nan, total / np.where(is_idle, 1.0, self._busy_us))

    def _integral(self, values: Floats) -> Floats:
        after = np.cumsum(values * self._step_us)
        before = after - values * self._step_us
        # Linear between a step's two ends, flat between steps: interpolation is the exact integral.
        return np.diff(np.interp(self._edges, self._bounds, np.column_stack((before, after)).ravel()))


def cumulative(values: Sequence[float]) -> tuple[Floats, Floats]:
    """The empirical distribution: sorted values, and the fraction of all values at most that large."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    at = np.arange(len(ordered))
    if len(ordered) > NUM_CDF_POINTS:
        at = np.unique(np.linspace(0, len(ordered) - 1, NUM_CDF_POINTS).round().astype(np.int64))
    return ordered[at], (at + 1) / len(ordered)


def preemptions(records: Records) -> tuple[list[float], list[int]]:
    """When requests lost their KV, seconds since the run's start, and how many each time."""
    steps = [s for s in records.steps if s.preempted]
    return [s.start_us / 1e6 for s in steps], [len(s.preempted) for s in steps]
