"""The last level: the engine measures a few candidates in batches, and corrects what ranks those that are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab.candidate import num_changes
from xllm_lab.errors import ConfigError
from xllm_lab.formats import own
from xllm_lab.runs import new_folder, read_json, write_json
from xllm_lab.sim.calibrate import Calibration, write_calibration
from xllm_lab.tuning.coordinator import fill
from xllm_lab.tuning.correction import Correction, correction
from xllm_lab.tuning.engine_trials import engine_spec, evaluate_on_engine, in_groups, num_restarts
from xllm_lab.tuning.evaluations import Evaluations, address, checksum, inputs_of
from xllm_lab.tuning.journal import STUDY_NAME, open_study, sole_writer, told_of
from xllm_lab.tuning.judging import Judging
from xllm_lab.tuning.objective import Objective, evaluate, simulation
from xllm_lab.tuning.sampling import sampler
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import EQUAL_FRAC, Study, Trial, pick, read_study, write_study
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.tuning.workers import Executor, executor
from xllm_lab.workload import Workload

if TYPE_CHECKING:
    from xllm_lab.engine.engine import EngineOptions

FIRST_BATCH, BATCH = 3, 2
# With fewer runs a Gaussian process has nothing to learn from; what the simulator ranks highest is measured instead.
FEWEST_FOR_GP = 15
# So many have to stand in the order that was predicted for the rest to be believed.
NUM_AGREEING = 3


@dataclass(slots=True, kw_only=True)
class EngineLevel:
    """Of one search.

    Attributes:
        below: the simulator's study, whose trials are candidates, in its order of merit.
        held_out: what the engine serves.
        calibration: what the simulator believed; corrections are of it, never of one another.
        machine: where the engine runs, as a measurement's address has it.
        budget: runs, the default's included.
        noise_frac: differences of goodput that mean nothing.
    """

    out: Path
    below: Study
    held_out: Workload
    calibration: Calibration
    space: Space
    engine: EngineOptions
    machine: Mapping[str, Any]
    budget: int
    noise_frac: float
    seed: int
    objective: Objective
    tiers: Tiers
    evaluations: Path
    storage: str | None
    num_workers: int
    workers: str | Executor
    corrections: dict[int, Correction] = field(default_factory=dict)
    _judging: Judging | None = None
    _simulators: Executor | None = None

    def run(self, on_trial: Callable[[Trial], None]) -> list[Trial]:
        """Trials in order; trial 0 is the default."""
        if (self.out / "study.json").exists():
            return list(read_study(self.out).trials)
        spec = self._opened()
        held_out, fitted = self.out / "workload-0.jsonl", self.out / "calibration.json"
        with ExitStack() as held:
            held.enter_context(told_of(self.out, self.storage))
            held.enter_context(sole_writer(self.out, has_journal=self.storage is None))
            template = engine_spec(
                *(checksum(held_out.read_bytes()), checksum(fitted.read_bytes()), self.tiers, self.engine),
                machine=dict(self.machine),
            )
            self._judging = Judging(
                objective=self.objective,
                evaluate=evaluate_on_engine,
                templates=[template],
                inputs=inputs_of([held_out, fitted]),
                evaluations=Evaluations(self.evaluations),
                executor=held.enter_context(executor("processes", 1)),  # one engine, and nothing beside it
            )
            study = open_study(self.out, self.storage, spec["study_name"], directions=self.objective.directions)
            study.sampler = sampler("gp" if self.budget >= FEWEST_FOR_GP else "random", self.seed)
            trials = []
            for trial in fill(
                *(study, self.space, self.objective),
                num_trials=self.budget,
                propose=self._propose,
                judge=self._judging,
            ):
                on_trial(trial)
                trials.append(trial)
        return list(write_study(self.out, spec, trials).trials)

    def story(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """What was measured, in which order, and what it did to the model."""
        predicted = {_key(t): t.value_per_s for t in self.below.trials}
        equal_frac = max(EQUAL_FRAC, self.noise_frac)
        best, default = pick(trials, equal_frac), trials[0]
        gain = best.value_per_s / default.value_per_s - 1 if default.value_per_s else None
        return {
            "num_trials": len(trials),
            "num_restarts": num_restarts([t.candidate for t in trials]),
            "noise_frac": self.noise_frac,
            "trials": [
                {
                    "number": t.number,
                    "measured_per_s": t.value_per_s,
                    "predicted_per_s": predicted.get(_key(t)),
                    "is_feasible": t.is_feasible,
                    "num_changes": num_changes(t.candidate, default.candidate),
                    "category": t.report["category"],
                }
                for t in trials
            ],
            "corrections": {count: found.as_dict() for count, found in sorted(self.corrections.items())},
            "default_per_s": default.value_per_s,
            "best": best.number,
            "best_per_s": best.value_per_s,
            "gain_frac": gain,
            "is_above_noise": gain is not None and gain > equal_frac,
        }

    def _propose(self, known: Sequence[Trial]) -> list[dict[str, Any]]:
        """In an order in which a running engine is used again."""
        missing = self.budget - len(known)
        if missing <= 0:
            return []
        if not known:
            default, *others = self.below.trials
            first = [default, *_by_merit(others)[: min(FIRST_BATCH, self.budget) - 1]]
            return [self.space.default_params(), *(t.params for t in self._grouped(first[1:]))]
        ranked = self._ranked_anew(known)
        measured = {_key(t) for t in known}
        left = [t for t in ranked if _key(t) not in measured]
        if len(known) > NUM_AGREEING and self._agrees(ranked, known):
            return []
        if left:
            return [t.params for t in self._grouped(left[: min(BATCH, missing)])]
        return [{}] if self.budget >= FEWEST_FOR_GP else []

    def _grouped(self, trials: Sequence[Trial]) -> list[Trial]:
        return [trials[k] for k in in_groups([t.candidate for t in trials])]

    def _ranked_anew(self, known: Sequence[Trial]) -> list[Trial]:
        """Those of the level below, best first, on the step model as the engine corrected it."""
        found = self.corrections[len(known)] = correction(self._residuals(known))
        corrected = self.out / f"calibration-after-{len(known)}.json"
        write_calibration(found.corrected(self.calibration), corrected)
        served = [self.below.path / f"workload-{k}.jsonl" for k in range(len(self.below.spec["workloads"]))]
        calibrated = checksum(corrected.read_bytes())
        with ExitStack() as held:
            open_ = self.workers
            if isinstance(open_, str):
                open_ = held.enter_context(executor(open_, self.num_workers))
            judge = Judging(
                objective=self.objective,
                evaluate=evaluate,
                templates=[simulation(checksum(path.read_bytes()), calibrated, self.tiers) for path in served],
                inputs=inputs_of([*served, corrected]),
                evaluations=Evaluations(self.evaluations),
                executor=open_,
            )
            reports = judge([t.candidate for t in self.below.trials], [])
        return _by_merit(
            [
                Trial(number=t.number, candidate=t.candidate, report=report, params=t.params)
                for t, report in zip(self.below.trials, reports, strict=True)
            ]
        )

    def _residuals(self, known: Sequence[Trial]) -> list[dict[str, Any]]:
        assert self._judging is not None, "trials come from it"
        kept = [self._judging.known(t.candidate) for t in known]
        return [report["residuals"] for reports in kept for report in reports if "residuals" in report]

    def _agrees(self, ranked: Sequence[Trial], known: Sequence[Trial]) -> bool:
        """The engine's best are the simulator's, in its order but for differences that mean nothing."""
        values = {_key(t): t.value_per_s if t.is_feasible else 0.0 for t in known}
        top = [_key(t) for t in ranked[:NUM_AGREEING]]
        if not all(key in values for key in top):
            return False
        limit = 1 + max(EQUAL_FRAC, self.noise_frac)
        in_order = all(values[a] * limit >= values[b] for a, b in pairwise(top))
        return in_order and values[top[0]] * limit >= max(values.values())

    def _opened(self) -> dict[str, Any]:
        spec = {
            "parent": self.below.path.name,
            "parent_spec": address(self.below.spec),
            "space": self.space.describe(),
            "seed": self.seed,
            "budget": self.budget,
            "engine": asdict(self.engine),
            "machine": dict(self.machine),
            "noise_frac": self.noise_frac,
            "storage": self.below.spec["storage"],
            "workloads": [self.held_out.source],
            "model": self.calibration.model,
            **self.objective.as_dict(),
            **self.tiers.described(),
        }
        name = STUDY_NAME if self.storage is None else f"{STUDY_NAME}-{self.out.name}-{address(spec)[:8]}"
        if not (self.out / "spec.json").exists():
            with new_folder(self.out) as folder:
                write_calibration(self.calibration, folder / "calibration.json")
                own.write(self.held_out, folder / "workload-0.jsonl")
                write_json(folder / "spec.json", {**spec, "study_name": name})
        there = read_json(self.out / "spec.json", "the specification of a study")
        if there["parent_spec"] != spec["parent_spec"] or there["budget"] != spec["budget"]:
            raise ConfigError(f"{self.out}: is a study of something else; accepted: a new folder")
        return there


def _by_merit(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda t: (not t.is_feasible, -t.value_per_s, t.number))


def _key(trial: Trial) -> str:
    return address(trial.candidate.as_dict())
