"""Fill a study: Optuna proposes, workers simulate, one coordinator keeps the book; killed at any time, it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xllm_lab.errors import ConfigError, RunError
from xllm_lab.formats import own
from xllm_lab.runs import new_folder, read_json, write_json
from xllm_lab.sim.calibrate import Calibration, write_calibration
from xllm_lab.tiering_of import refuse_link_without_copies
from xllm_lab.tuning.coordinator import fill
from xllm_lab.tuning.evaluations import Evaluations, address, checksum, inputs_of
from xllm_lab.tuning.journal import STUDY_NAME, open_study, sole_writer, told_of, without_password
from xllm_lab.tuning.judging import Judging, Screen, passes_all
from xllm_lab.tuning.objective import Objective, evaluate, simulation
from xllm_lab.tuning.sampling import sampler as make_sampler
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import EQUAL_FRAC, Study, Trial, pick, write_study
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.tuning.workers import Executor, executor
from xllm_lab.workload import Workload

EVALUATIONS = "evaluations"


def tune(
    workloads: Sequence[Workload],
    calibration: Calibration,
    space: Space,
    *,
    num_trials: int,
    seed: int,
    out: Path,
    objective: Objective | None = None,
    num_workers: int = 2,
    tiers: Tiers | None = None,
    evaluations: Path | None = None,
    storage: str | None = None,
    workers: str | Executor = "processes",
    sampler: str = "tpe",
    start: Sequence[dict[str, Any]] = (),
    screen: Screen = passes_all,
    prune_p: float | None = None,
    noise_frac: float = 0.0,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Study:
    """Search for the candidate with the most goodput; resumes an unfinished study of the same specification in `out`.

    Same inputs, seed and number of workers give the same trials, whether the study was interrupted or not.

    Args:
        num_trials: in all, the default configuration (the first trial) and those of an interrupted study included.
        num_workers: of the executor, and trials proposed before the results of any of them are known.
        tiers: of each candidate, beside what was calibrated.
        evaluations: folder of what was evaluated before, by any study; None is one beside `out`.
        storage: the URL of a database for the book, as Optuna takes it; None is a journal file in `out`.
        workers: the name of an executor, or an open one.
        start: parameters of trials to begin with, after the default.
        screen: why a candidate need not be simulated.
        prune_p: with several workloads, a candidate is given up when it is worse than the best one with an error
            probability below this; None evaluates all on all.
        noise_frac: differences of goodput that mean nothing.
        on_trial: told of each trial as it ends, resumed ones included.

    Raises:
        ConfigError: `out` holds a study of something else, a number is out of range, steps are to run in graphs and
            none of those calibrated on did, or tiers are given that a policy would never use.
        RunError: `out` is finished already, is being searched by another process, or cannot be written.
    """
    for name, value, least in (("trials", num_trials, 1), ("workers", num_workers, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}, at least {least} is accepted")
    objective, sampling = objective or Objective(), make_sampler(sampler, seed)
    space = priced(space, calibration, tiers := tiers or Tiers())
    spec = _open(
        *(out, workloads, calibration, space),
        {
            "seed": seed,
            "sampler": sampler,
            "storage": None if storage is None else without_password(storage),
            "start": list(start),
            "prune_p": prune_p,
            "noise_frac": noise_frac,
            **objective.as_dict(),
            **tiers.described(),
        },
    )
    paths = [out / f"workload-{k}.jsonl" for k in range(len(workloads))]
    fitted = out / "calibration.json"
    calibrated = checksum(fitted.read_bytes())
    with (
        told_of(out, storage),
        sole_writer(out, has_journal=storage is None),
        _executor(workers, num_workers) as open_,
    ):
        judging = Judging(
            objective=objective,
            evaluate=evaluate,
            templates=[simulation(checksum(path.read_bytes()), calibrated, tiers) for path in paths],
            inputs=inputs_of([*paths, fitted]),
            evaluations=Evaluations(out.parent / EVALUATIONS if evaluations is None else evaluations),
            executor=open_,
            screen=screen,
            prune_p=prune_p,
        )
        study = open_study(out, storage, spec["study_name"], directions=objective.directions)
        study.sampler = sampling
        proposing = Proposing(space, num_trials, num_workers, start, max(EQUAL_FRAC, noise_frac))
        trials = []
        for trial in fill(study, space, objective, num_trials=num_trials, propose=proposing, judge=judging):
            on_trial(trial)
            trials.append(trial)
    return write_study(out, spec, trials)


class Proposing:
    """The default first, then the given ones, then as many drawn as there are workers.

    The last third asks which changes of the best candidate are needed at all, one knob at a time.
    """

    def __init__(
        self, space: Space, num_trials: int, in_flight: int, start: Sequence[dict[str, Any]], equal_frac: float
    ) -> None:
        self._default, self._num_trials, self._in_flight = space.default_params(), num_trials, in_flight
        self._start, self._equal_frac = [self._default, *start], equal_frac

    def __call__(self, known: Sequence[Trial]) -> list[dict[str, Any]]:
        if len(known) >= self._num_trials:
            return []
        missing = self._num_trials - len(known)
        if known and missing <= self._num_trials // 3 and (params := self._simpler(known)) is not None:
            return [params]
        given = self._start[len(known) : len(known) + self._in_flight]
        return [*given, *({} for _ in range(self._in_flight - len(given)))]

    def _simpler(self, known: Sequence[Trial]) -> dict[str, Any] | None:
        """The best trial's parameters with one more knob at its default, not tried yet; None if all were."""
        params, seen = pick(known, self._equal_frac).params, [t.params for t in known]
        for name, value in self._default.items():
            if params.get(name, value) != value and (simpler := {**params, name: value}) not in seen:
                return simpler
        return None


def _executor(workers: str | Executor, num_workers: int) -> Any:
    return executor(workers, num_workers) if isinstance(workers, str) else nullcontext(workers)


def priced(space: Space, calibration: Calibration, tiers: Tiers) -> Space:
    """The space as far as the machine knows what things cost there; ConfigError if it does not know enough."""
    _refuse_unused_link(tiers, space)
    if calibration.acceptance is not None:
        space = space.where(methods=calibration.acceptance.methods)
    if calibration.page_time is None:
        space = space.where(layouts=("paged",))
    if tiers.store is not None:
        space = space.where(num_stores=1)
    for policies in space.alternatives():
        tiers.machine(calibration, policies).refuse_if_not_priced(policies, space.default.instance)
    return space


def _refuse_unused_link(tiers: Tiers, space: Space) -> None:
    """ConfigError for a link over which none of the policies copies anything."""
    refusal: ConfigError | None = None
    for policies in space.alternatives():
        try:
            return refuse_link_without_copies(tiers.host_link_bytes_per_s, policies)
        except ConfigError as error:
            refusal = error
    assert refusal is not None, "the default is one of them"
    raise refusal


def _open(
    out: Path, workloads: Sequence[Workload], calibration: Calibration, space: Space, given: dict[str, Any]
) -> dict[str, Any]:
    """Make the study's folder, or check that the one there is the same study, unfinished. Returns its specification."""
    spec = {
        "space": space.describe(),
        "workloads": [w.source for w in workloads],
        "num_requests": [len(w.requests) for w in workloads],
        # Of what is served, not of the files it came from: a window or a promise makes another workload.
        "checksums": [hashlib.sha256(own.encode(w)).hexdigest() for w in workloads],
        "step_time": list(calibration.step_time_with_host().weights),
        "model": calibration.model,
        "acceptance": None if calibration.acceptance is None else asdict(calibration.acceptance),
        "draft_time": calibration.draft_time.weights,
        "copy_time": calibration.copy_time.weights,
        **given,
    }
    # A database has studies of everybody.
    name = STUDY_NAME if spec["storage"] is None else f"{STUDY_NAME}-{out.name}-{address(spec)[:8]}"
    spec["study_name"] = name
    if (out / "study.json").exists():
        raise RunError(f"{out}: is a finished study; accepted: a new folder, or an unfinished study to resume")
    if (out / "spec.json").exists():
        there = read_json(out / "spec.json", "the specification of a study")
        same = json.loads(json.dumps(spec))  # tuples are lists on disk
        if differing := sorted(k for k in same if there.get(k) != same[k] and k != "study_name"):
            raise ConfigError(f"{out}: is a study of something else ({', '.join(differing)} differ)")
        return {**spec, "study_name": there["study_name"]}
    if out.exists():
        raise RunError(f"{out}: exists already and is no study; accepted: a new folder")
    with new_folder(out) as folder:
        write_calibration(calibration, folder / "calibration.json")
        for number, workload in enumerate(workloads):
            own.write(workload, folder / f"workload-{number}.jsonl")
        write_json(folder / "spec.json", spec)
    return spec
