"""Samplers whose draws can be had again: a killed coordinator, resumed, proposes what it would have proposed.

A draw is a function of the seed, the trial's number, the parameter's name, and the trials that are complete. Optuna's
samplers keep one random stream, which a resumed process would begin anew.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from xllm_lab.errors import ConfigError

# With more startup trials TPE learns what the workload is like; fewer are wasted where knobs do nothing.
NUM_STARTUP_TRIALS = 16
SAMPLERS = ("tpe", "gp", "random")


def sampler(name: str, seed: int) -> BaseSampler:
    """A repeatable one. ConfigError for an unknown name."""
    if name not in SAMPLERS:
        raise ConfigError(f"sampler is {name!r}, accepted: {', '.join(SAMPLERS)}")
    return Repeatable(seed, {"tpe": _tpe, "gp": _gp, "random": _random}[name])


def derived_seed(*parts: object) -> int:
    """32 bits that depend on all of these, in any process of any machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class Repeatable(BaseSampler):
    """Makes a sampler anew for each draw.

    Args:
        make: from a seed.
    """

    def __init__(self, seed: int, make: Callable[[int], BaseSampler]) -> None:
        self._seed, self._make = seed, make

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _of(self, trial: FrozenTrial, param_name: str = "") -> BaseSampler:
        return self._make(derived_seed(self._seed, trial.number, param_name))


def _tpe(seed: int) -> BaseSampler:
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=NUM_STARTUP_TRIALS,
        # Optuna 5's defaults (multivariate, constant liar) stay near the first feasible point of tight constraints.
        multivariate=False,
        constant_liar=False,
    )


def _gp(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)


def _random(seed: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)
