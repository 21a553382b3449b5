"""Fill a study: Optuna proposes, processes simulate, one coordinator keeps the book; killed at any time, it resumes."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from xllm_lab.candidate import candidate
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.formats import own
from xllm_lab.runs import new_folder, read_json, write_json
from xllm_lab.sim.calibrate import Calibration, write_calibration
from xllm_lab.tiering_of import refuse_link_without_copies
from xllm_lab.tuning.journal import open_journal, sole_writer
from xllm_lab.tuning.objective import evaluate
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import Study, Trial, pick, write_study
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.tuning.workers import worker_pool
from xllm_lab.workload import Workload


def tune(
    workloads: Sequence[Workload],
    calibration: Calibration,
    space: Space,
    *,
    num_trials: int,
    seed: int,
    out: Path,
    min_slo_attainment_frac: float = 0.0,
    num_workers: int = 2,
    tiers: Tiers | None = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Study:
    """Search for the candidate with the most goodput; resumes an unfinished study of the same specification in `out`.

    Same inputs, seed and number of workers give the same trials; a resumed study goes on from where it was, with
    other draws.

    Args:
        num_trials: in all, the default configuration (the first trial) and those of an interrupted study included.
        num_workers: processes, and trials proposed before the results of any of them are known.
        min_slo_attainment_frac: candidates below it are infeasible.
        tiers: of each candidate, beside what was calibrated.
        on_trial: told of each trial as it ends, resumed ones included.

    Raises:
        ConfigError: `out` holds a study of something else, a number is out of range, steps are to run in graphs and
            none of those calibrated on did, or tiers are given that a policy would never use.
        RunError: `out` is finished already, is being searched by another process, or cannot be written.
    """
    for name, value, least in (("trials", num_trials, 1), ("workers", num_workers, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}, at least {least} is accepted")
    if not 0 <= min_slo_attainment_frac <= 1:
        raise ConfigError(f"min_slo_attainment_frac is {min_slo_attainment_frac}, from 0 to 1 is accepted")
    space = _priced(space, calibration, tiers := tiers or Tiers())
    spec = _open(out, workloads, calibration, space, tiers, seed=seed, min_slo_attainment_frac=min_slo_attainment_frac)
    journal = out / "trials.journal"
    # The last third asks which changes of the best candidate are needed at all, one knob at a time.
    num_to_simplify = num_trials // 3
    try:
        with sole_writer(journal), worker_pool(num_workers) as pool:
            study = open_journal(journal, seed, space)
            for trial in _finished(study):
                on_trial(trial)
            while (missing := num_trials - len(_finished(study))) > 0:
                count = min(num_workers, missing)
                if missing <= num_to_simplify and (params := _simpler(study, space)) is not None:
                    study.enqueue_trial(params)
                    count = 1
                for trial in _round(study, space, _job(out, spec), pool, count):
                    on_trial(trial)
            trials = _finished(study)
    except OSError as error:
        raise RunError(f"{journal}: cannot be written: {error.strerror or error}") from None
    except BrokenProcessPool:
        raise RunError(f"{out}: a worker process was killed; run `tune` again to resume, with fewer workers") from None
    return write_study(out, spec, trials)


def _priced(space: Space, calibration: Calibration, tiers: Tiers) -> Space:
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
    out: Path,
    workloads: Sequence[Workload],
    calibration: Calibration,
    space: Space,
    tiers: Tiers,
    *,
    seed: int,
    min_slo_attainment_frac: float,
) -> dict[str, Any]:
    """Make the study's folder, or check that the one there is the same study, unfinished. Returns its specification."""
    spec = {
        "space": space.describe(),
        "seed": seed,
        "min_slo_attainment_frac": min_slo_attainment_frac,
        "workloads": [w.source for w in workloads],
        "num_requests": [len(w.requests) for w in workloads],
        # Of what is served, not of the files it came from: a window or a promise makes another workload.
        "checksums": [hashlib.sha256(own.encode(w)).hexdigest() for w in workloads],
        "step_time": list(calibration.step_time_with_host().weights),
        "model": calibration.model,
        "acceptance": None if calibration.acceptance is None else asdict(calibration.acceptance),
        "draft_time": calibration.draft_time.weights,
        "copy_time": calibration.copy_time.weights,
        **asdict(tiers),
    }
    if (out / "study.json").exists():
        raise RunError(f"{out}: is a finished study; accepted: a new folder, or an unfinished study to resume")
    if (out / "spec.json").exists():
        there = read_json(out / "spec.json", "the specification of a study")
        same = json.loads(json.dumps(spec))  # tuples are lists on disk
        if differing := sorted(k for k in same if there.get(k) != same[k]):
            raise ConfigError(f"{out}: is a study of something else ({', '.join(differing)} differ)")
        return spec
    if out.exists():
        raise RunError(f"{out}: exists already and is no study; accepted: a new folder")
    with new_folder(out) as folder:
        write_calibration(calibration, folder / "calibration.json")
        for number, workload in enumerate(workloads):
            own.write(workload, folder / f"workload-{number}.jsonl")
        write_json(folder / "spec.json", spec)
    return spec


def _job(out: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """What every trial's specification has in common."""
    return {
        "workloads": [str(out / f"workload-{k}.jsonl") for k in range(len(spec["workloads"]))],
        "calibration": str(out / "calibration.json"),
        **{name: spec[name] for name in ("min_slo_attainment_frac", "host_link_bytes_per_s", "store", "expert_trace")},
    }


def _round(
    study: optuna.Study, space: Space, job: dict[str, Any], pool: ProcessPoolExecutor, count: int
) -> Iterator[Trial]:
    """Ask for a few trials, evaluate them side by side, tell in the order asked."""
    asked = [study.ask() for _ in range(count)]
    chosen = [space.suggest(trial) for trial in asked]
    specs = [{**job, "candidate": one.as_dict()} for one in chosen]
    # Workers start here, and inherit that ctrl-C is not theirs to answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        reports = pool.map(evaluate, specs)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for trial, one, report in zip(asked, chosen, reports, strict=True):
        for name, value in report["constraints"].items():
            trial.set_constraint(name, value)
        trial.set_user_attr("candidate", one.as_dict())
        trial.set_user_attr("report", report)
        study.tell(trial, report["goodput_per_s"])
        yield Trial(number=trial.number, candidate=one, report=report)


def _simpler(study: optuna.Study, space: Space) -> dict[str, Any] | None:
    """The best trial's parameters with one more knob at its default, not tried yet; None if all were."""
    best = pick(_finished(study))
    default = space.default_params()
    tried = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.WAITING))
    params = next(t.params for t in tried if t.number == best.number)
    seen = [{**t.system_attrs.get("fixed_params", {}), **t.params} for t in tried]
    for name, value in default.items():
        if params.get(name, value) != value and (simpler := {**params, name: value}) not in seen:
            return simpler
    return None


def _finished(study: optuna.Study) -> list[Trial]:
    return [
        Trial(number=t.number, candidate=candidate(t.user_attrs["candidate"]), report=t.user_attrs["report"])
        for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]
