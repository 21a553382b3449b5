"""What the engine's own steps say of the step model: two factors, bounded, and how often a bound was hit.

    measured step  ~  fixed * (terms of a step as such) + load * (terms that grow with what it computes)

The bounds are those that aiconfigurator keeps its own correction in: a factor beyond them is no correction but another
machine, and is reported as that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.cost.host import HostOverhead
from xllm_lab.step_samples import StepSample
from xllm_lab.step_time import SMALL_BATCHES, StepTime

LOWEST, HIGHEST = 0.5, 2.0
# Of `step_time.TERMS`: a launch, eager or replayed, and the weights that any batch reads.
NUM_FIXED = 2 + len(SMALL_BATCHES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """Sums over measured steps, weighted as in `step_time.fit`, so that those of many runs add up.

    Attributes:
        normal: of (fixed, load): fixed^2, fixed * load, load^2; target: fixed * measured, load * measured.
    """

    normal: tuple[float, float, float] = (0.0, 0.0, 0.0)
    target: tuple[float, float] = (0.0, 0.0)
    predicted_us: float = 0.0
    measured_us: float = 0.0
    num_steps: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Factors of the calibration's step times.

    Attributes:
        bounds_hit: of "fixed" and "load", which wanted to be beyond a bound, and where they stopped.
        error_frac: of the sum of step times, before and after.
    """

    fixed: float = 1.0
    load: float = 1.0
    bounds_hit: Mapping[str, float]
    error_frac: tuple[float, float] = (0.0, 0.0)

    def corrected(self, calibration: Calibration) -> Calibration:
        """The same machine with step times as they were measured since."""
        weights = calibration.step_time.weights
        scaled = [w * (self.fixed if k < NUM_FIXED else self.load) for k, w in enumerate(weights)]
        host = calibration.host
        return replace(
            calibration,
            step_time=StepTime(tuple(scaled)),
            host=HostOverhead(step_us=host.step_us * self.fixed, sequence_us=host.sequence_us * self.load),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "fixed": self.fixed,
            "load": self.load,
            "bounds": [LOWEST, HIGHEST],
            "bounds_hit": dict(self.bounds_hit),
            "error_frac_before": self.error_frac[0],
            "error_frac_after": self.error_frac[1],
        }


def residuals(steps: Iterable[StepSample], calibration: Calibration) -> Residuals:
    """Of a run on the machine that the calibration is of; the host's time is part of each step."""
    weights, host = np.asarray(calibration.step_time.weights), calibration.host
    rows, measured, parts = [], [], []
    for s in steps:
        rows.append(s.features())
        measured.append(s.step_us + (s.host_us or 0.0))
        parts.append((host.step_us, host.sequence_us * len(s.chunks)))
    if not rows:
        return Residuals()
    terms = np.asarray(rows, dtype=np.float64) * weights
    of_host = np.asarray(parts, dtype=np.float64)
    fixed = terms[:, :NUM_FIXED].sum(axis=1) + of_host[:, 0]
    load = terms[:, NUM_FIXED:].sum(axis=1) + of_host[:, 1]
    times = np.asarray(measured, dtype=np.float64)
    weight = 1 / np.maximum(fixed + load, 1.0)
    return Residuals(
        normal=tuple(float((weight * a * b).sum()) for a, b in ((fixed, fixed), (fixed, load), (load, load))),  # type: ignore[arg-type]
        target=(float((weight * fixed * times).sum()), float((weight * load * times).sum())),
        predicted_us=float((fixed + load).sum()),
        measured_us=float(times.sum()),
        num_steps=len(rows),
    )


def correction(runs: Sequence[Mapping[str, Any]]) -> Correction:
    """From `Residuals.as_dict` of each run. Without steps there is nothing to correct."""
    sums = [np.asarray([*r["normal"], *r["target"], r["predicted_us"], r["measured_us"]]) for r in runs]
    total = np.sum(sums, axis=0) if sums else np.zeros(7)
    ff, fl, ll, tf, tl, predicted, measured = (float(x) for x in total)
    if predicted <= 0:
        return Correction(bounds_hit={})
    # A ridge of one part in a million towards 1 decides what runs of one kind of batch cannot.
    ridge = 1e-6 * (ff + ll)
    matrix, target = np.asarray([[ff + ridge, fl], [fl, ll + ridge]]), np.asarray([tf + ridge, tl + ridge])
    root = np.linalg.cholesky(matrix).T
    free = np.linalg.solve(matrix, target)
    found = lsq_linear(root, np.linalg.solve(root.T, target), bounds=(LOWEST, HIGHEST)).x
    hit = {
        name: float(np.clip(wanted, LOWEST, HIGHEST))
        for name, wanted in zip(("fixed", "load"), free.tolist(), strict=True)
        if not LOWEST <= wanted <= HIGHEST
    }
    fixed, load = (hit.get(name, float(x)) for name, x in zip(("fixed", "load"), found, strict=True))
    return Correction(
        fixed=fixed, load=load, bounds_hit=hit, error_frac=(predicted / measured - 1, _error_after(total, fixed, load))
    )


def _error_after(total: Any, fixed: float, load: float) -> float:
    """Of the sum of times, with the factors: weights of 1 / predicted make `normal` sums of times."""
    ff, fl, ll, _, _, _, measured = (float(x) for x in total)
    # fixed + load of each step, times its weight, is 1: so these are the sums of the two parts.
    return (fixed * (ff + fl) + load * (fl + ll)) / measured - 1
