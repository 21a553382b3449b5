"""Learn step times from engine runs, and how far to trust them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xllm_lab.errors import ConfigError, RunError
from xllm_lab.records import StepRecord
from xllm_lab.runs import Run, new_file, read_json, write_json
from xllm_lab.step_time import TERMS, Chunk, StepTime, features, fit

NUM_FOLDS = 5
# So that a fit without one of the folds still has the two steps a term that `fit` wants.
MIN_STEPS = -(-2 * len(TERMS) * NUM_FOLDS // (NUM_FOLDS - 1))
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Error of predicted step times on steps the fit did not see (contiguous folds).

    Attributes:
        mape_frac: mean of |predicted - measured| / measured.
        p90_frac: its 90th percentile.
        bias_frac: (sum of predicted - sum of measured) / sum of measured.
    """

    mape_frac: float
    p90_frac: float
    bias_frac: float
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A fitted machine: what `calibrate` writes and the simulator reads.

    Attributes:
        step_time: the weights.
        highest: largest value of each term's factor in the calibrated steps; beyond it the model extrapolates.
        residual: held-out error of step times.
        model: the served model, as in the runs' manifests.
        hardware: where it was measured.
        runs: names of the runs.
    """

    step_time: StepTime
    highest: tuple[float, ...]
    residual: Residual
    model: dict[str, Any]
    hardware: dict[str, Any]
    runs: tuple[str, ...]


def calibrate(runs: Sequence[Run]) -> Calibration:
    """Fit step times to the steps of engine runs of one model on one machine.

    Raises:
        ConfigError: a run is not an engine's, models differ, or there are too few steps.
    """
    if not runs:
        raise ConfigError("no runs to calibrate on; accepted: at least one engine run")
    for run in runs:
        if run.manifest.host != "engine":
            raise ConfigError(f"{run.path}: is a {run.manifest.host} run; accepted: engine runs")
        if run.manifest.model != runs[0].manifest.model:
            raise ConfigError(f"{run.path}: model differs from that of {runs[0].path}; accepted: runs of one model")
    steps = [step for run in runs for step in run.records.steps]
    if len(steps) < MIN_STEPS:
        raise ConfigError(f"the runs have {len(steps)} steps, at least {MIN_STEPS} are accepted")
    rows = np.asarray([step_features(s) for s in steps], dtype=np.float64)
    times = np.asarray([s.step_us for s in steps], dtype=np.float64)
    return Calibration(
        step_time=fit(rows.tolist(), times.tolist()),
        highest=tuple(float(h) for h in rows.max(axis=0)),
        residual=_held_out_residual(rows, times),
        model=runs[0].manifest.model,
        hardware=runs[0].manifest.hardware,
        runs=tuple(run.path.name for run in runs),
    )


def step_features(step: StepRecord) -> list[float]:
    """The factors of `step_time.TERMS` of a recorded step."""
    return features(map(Chunk, step.num_tokens, step.num_computed_tokens), step.num_logits)


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration file. RunError if it cannot be written."""
    weights = dict(zip(TERMS, calibration.step_time.weights, strict=True))
    with new_file(path) as file:
        write_json(file, {**asdict(calibration), "step_time": weights, "format": FORMAT})


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file. RunError names what is wrong with it."""
    accepted = "a calibration, as `calibrate` writes it"
    value = read_json(path, accepted)
    try:
        if value["format"] != FORMAT:
            raise ValueError(f"format is {value['format']}, {FORMAT} is accepted")
        value["model"]["vocab_size"] + 0  # what the simulator will look up
        return Calibration(
            step_time=StepTime(tuple(float(value["step_time"][term]) for term in TERMS)),
            highest=tuple(float(value["highest"][k]) for k in range(len(TERMS))),
            residual=Residual(**{name: value["residual"][name] + 0 for name in Residual.__slots__}),
            model=value["model"],
            hardware=value["hardware"],
            runs=tuple(value["runs"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RunError(f"{path}: {error!r}; accepted: {accepted}") from None


def _held_out_residual(rows: npt.NDArray[np.float64], times: npt.NDArray[np.float64]) -> Residual:
    # Neighbouring steps resemble one another, so folds are contiguous: a shuffled split would flatter the fit.
    fold = np.arange(len(times)) * NUM_FOLDS // len(times)
    predicted = np.empty_like(times)
    for k in range(NUM_FOLDS):
        weights = np.asarray(fit(rows[fold != k].tolist(), times[fold != k].tolist()).weights)
        predicted[fold == k] = rows[fold == k] @ weights
    error = np.abs(predicted - times) / times
    return Residual(
        mape_frac=float(error.mean()),
        p90_frac=float(np.percentile(error, 90)),
        bias_frac=float((predicted.sum() - times.sum()) / times.sum()),
        num_steps=len(times),
    )
