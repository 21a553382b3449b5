"""A study: what was tried and what it was worth. `search.py` makes one.

A study is a folder: spec.json (what is searched, on what), trials.journal (Optuna's storage, unless that is a
database), and study.json, which is written last: without it the study is unfinished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xllm_lab.candidate import Candidate, candidate, num_changes
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.runs import new_file, read_json, write_json

# Among candidates this close to the best one, the one with the fewest changes wins.
EQUAL_FRAC = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated candidate.

    Attributes:
        report: see `Objective.report`.
        params: what was drawn, as Optuna has it.
    """

    number: int
    candidate: Candidate
    report: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def goodput_per_s(self) -> float:
        return float(self.report["goodput_per_s"])

    @property
    def value_per_s(self) -> float:
        """What is sought to be large: goodput per device."""
        return float(self.report.get("goodput_per_device_per_s", self.goodput_per_s))

    @property
    def is_feasible(self) -> bool:
        """It runs, keeps every promise, and was evaluated on every workload."""
        is_whole: bool = self.report.get("is_whole", True)
        return is_whole and all(value <= 0 for value in self.report["constraints"].values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A finished study.

    Attributes:
        trials: in order of number; trial 0 is the default configuration.
    """

    path: Path
    spec: dict[str, Any]
    trials: tuple[Trial, ...]

    @property
    def default(self) -> Trial:
        return self.trials[0]

    @property
    def best(self) -> Trial:
        """See `pick`."""
        return pick(self.trials, self.equal_frac)

    @property
    def equal_frac(self) -> float:
        """Candidates this close to the best one are its equals: 1 %, or the noise that was measured if that is more."""
        return max(EQUAL_FRAC, float(self.spec.get("noise_frac") or 0.0))

    def runners_up(self, num: int = 5) -> list[Trial]:
        """The feasible trials of the most goodput beside the best one and the default, each candidate once."""
        taken, found = [self.default.candidate, self.best.candidate], list[Trial]()
        for trial in sorted((t for t in self.trials if t.is_feasible), key=lambda t: (-t.goodput_per_s, t.number)):
            if trial.candidate not in taken:
                taken.append(trial.candidate)
                found.append(trial)
        return found[:num]

    def pareto(self) -> list[Trial]:
        """Feasible trials that no other beats in both goodput and P90 TTFT, by goodput."""
        front: list[Trial] = []
        ranked = sorted(
            (t for t in self.trials if t.is_feasible and ttft_p90_us(t) is not None),
            key=lambda t: (-t.goodput_per_s, ttft_p90_us(t), t.number),
        )
        for trial in ranked:
            if not front or (ttft_p90_us(trial) or 0.0) < (ttft_p90_us(front[-1]) or 0.0):
                front.append(trial)
        return front


def pick(trials: Sequence[Trial], equal_frac: float = EQUAL_FRAC) -> Trial:
    """The fewest changes among the feasible trials as good as the best one; the default if none is feasible."""
    default = trials[0]
    feasible = [t for t in trials if t.is_feasible]
    if not feasible:
        return default
    enough = max(t.value_per_s for t in feasible) * (1 - equal_frac)
    close = [t for t in feasible if t.value_per_s >= enough]
    return min(close, key=lambda t: (num_changes(t.candidate, default.candidate), -t.value_per_s, t.number))


def ttft_p90_us(trial: Trial) -> float | None:
    """Largest P90 TTFT over the trial's workloads."""
    values = [s["ttft_us"]["p90"] for s in trial.report["summaries"] if s["ttft_us"] is not None]
    return max(values, default=None)


def read_study(path: Path) -> Study:
    """Open a finished study. RunError names what is missing or unreadable."""
    accepted = "a finished study, as `tune` writes it (run `tune` on an unfinished one again to resume it)"
    spec = read_json(path / "spec.json", accepted)
    value = read_json(path / "study.json", accepted)
    try:
        trials = [
            Trial(
                number=t["number"], candidate=candidate(t["candidate"]), report=t["report"], params=t.get("params", {})
            )
            for t in value["trials"]
        ]
        if not trials:
            raise ConfigError("there are no trials")
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise RunError(f"{path / 'study.json'}: {error!r}; accepted: {accepted}") from None
    return Study(path=path, spec=spec, trials=tuple(trials))


def write_study(path: Path, spec: dict[str, Any], trials: Sequence[Trial]) -> Study:
    """Close a study. RunError if it cannot be written."""
    with new_file(path / "study.json") as file:
        write_json(file, {"trials": [_as_dict(t) for t in trials]})
    return Study(path=path, spec=spec, trials=tuple(trials))


def _as_dict(trial: Trial) -> dict[str, Any]:
    told = {"number": trial.number, "candidate": trial.candidate.as_dict(), "report": trial.report}
    return {**told, "params": trial.params}
