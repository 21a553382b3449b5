"""A study: Optuna proposes, processes simulate, one coordinator keeps the book; killed at any time, it resumes.

A study is a folder: spec.json (what is searched, on what), trials.journal (Optuna's storage), and study.json, which
is written last: without it the study is unfinished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from xllm_lab.candidate import Candidate, candidate, num_changes
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.formats import own
from xllm_lab.runs import new_file, new_folder, read_json, write_json
from xllm_lab.sim.calibrate import Calibration, write_calibration
from xllm_lab.tuning.objective import evaluate
from xllm_lab.tuning.space import Space
from xllm_lab.workload import Workload

STUDY_NAME = "xllm-lab"
# Among candidates this close to the best one, the one with the fewest changes wins.
EQUAL_FRAC = 0.01
# With more startup trials TPE learns what the workload is like; fewer are wasted where knobs do nothing.
NUM_STARTUP_TRIALS = 16
_AGAIN = "in place of"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated candidate.

    Attributes:
        report: what `objective.evaluate` returned.
    """

    number: int
    candidate: Candidate
    report: dict[str, Any]

    @property
    def goodput_per_s(self) -> float:
        return float(self.report["goodput_per_s"])

    @property
    def is_feasible(self) -> bool:
        return all(value <= 0 for value in self.report["constraints"].values())


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
        """The fewest changes among the feasible trials within 1 % of the best goodput; the default if none runs."""
        feasible = [t for t in self.trials if t.is_feasible]
        if not feasible:
            return self.default
        enough = max(t.goodput_per_s for t in feasible) * (1 - EQUAL_FRAC)
        close = [t for t in feasible if t.goodput_per_s >= enough]
        return min(close, key=lambda t: (num_changes(t.candidate, self.default.candidate), -t.goodput_per_s, t.number))

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


def ttft_p90_us(trial: Trial) -> float | None:
    """Largest P90 TTFT over the trial's workloads."""
    values = [s["ttft_us"]["p90"] for s in trial.report["summaries"] if s["ttft_us"] is not None]
    return max(values, default=None)


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
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Study:
    """Search for the candidate with the most goodput; resumes an unfinished study of the same specification in `out`.

    Same inputs, seed and number of workers give the same trials; a resumed study goes on from where it was, with
    other draws.

    Args:
        num_trials: in all, the default configuration (the first trial) and those of an interrupted study included.
        num_workers: processes, and trials proposed before the results of any of them are known.
        min_slo_attainment_frac: candidates below it are infeasible.
        on_trial: told of each trial as it ends, resumed ones included.

    Raises:
        ConfigError: `out` holds a study of something else, or a number is out of range.
        RunError: `out` is finished already, is being searched by another process, or cannot be written.
    """
    for name, value, least in (("trials", num_trials, 1), ("workers", num_workers, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}, at least {least} is accepted")
    if not 0 <= min_slo_attainment_frac <= 1:
        raise ConfigError(f"min_slo_attainment_frac is {min_slo_attainment_frac}, from 0 to 1 is accepted")
    spec = _open(out, workloads, calibration, space, seed=seed, min_slo_attainment_frac=min_slo_attainment_frac)
    journal = out / "trials.journal"
    try:
        with _sole_writer(journal), _pool(num_workers) as pool:
            study = _optuna_study(journal, seed, space)
            for trial in _finished(study):
                on_trial(trial)
            while (missing := num_trials - len(_finished(study))) > 0:
                for trial in _round(study, space, _job(out, spec), pool, min(num_workers, missing)):
                    on_trial(trial)
            trials = _finished(study)
    except OSError as error:
        raise RunError(f"{journal}: cannot be written: {error.strerror or error}") from None
    except BrokenProcessPool:
        raise RunError(f"{out}: a worker process was killed; run `tune` again to resume, with fewer workers") from None
    with new_file(out / "study.json") as file:
        write_json(file, {"trials": [_as_dict(t) for t in trials]})
    return Study(path=out, spec=spec, trials=tuple(trials))


def read_study(path: Path) -> Study:
    """Open a finished study. RunError names what is missing or unreadable."""
    accepted = "a finished study, as `tune` writes it (run `tune` on an unfinished one again to resume it)"
    spec = read_json(path / "spec.json", accepted)
    value = read_json(path / "study.json", accepted)
    try:
        trials = [
            Trial(number=t["number"], candidate=candidate(t["candidate"]), report=t["report"]) for t in value["trials"]
        ]
        if not trials:
            raise ConfigError("there are no trials")
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise RunError(f"{path / 'study.json'}: {error!r}; accepted: {accepted}") from None
    return Study(path=path, spec=spec, trials=tuple(trials))


def _open(
    out: Path,
    workloads: Sequence[Workload],
    calibration: Calibration,
    space: Space,
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
        "step_time": list(calibration.step_time.weights),
        "model": calibration.model,
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


@contextmanager
def _sole_writer(journal: Path) -> Iterator[None]:
    """Makes the journal writable by this process alone, and whole: a coordinator may have died while it wrote.

    The lock is the kernel's, so it dies with its owner. Optuna's own, a file, outlives a killed one by 30 seconds.
    """
    with journal.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{journal.parent}: is being searched by another process; accepted: one at a time") from None
        Path(f"{journal}.lock").unlink(missing_ok=True)
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)  # a torn last line would swallow the next one
        yield


def _optuna_study(journal: Path, seed: int, space: Space) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(study_name=STUDY_NAME, storage=storage, direction="maximize", load_if_exists=True)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{journal}: cannot be read: {error!r}; accepted: the trials of an unfinished study") from None
    _ask_again(study)
    if not study.trials:
        study.enqueue_trial(space.default_params())
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + len(study.trials),
        n_startup_trials=NUM_STARTUP_TRIALS,
        # Optuna 5's defaults (multivariate, constant liar) stay near the first feasible point of tight constraints.
        multivariate=False,
        constant_liar=False,
    )
    return study


def _ask_again(study: optuna.Study) -> None:
    """Queue what a killed coordinator left running, once each, whichever line of this it is killed at itself."""
    for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(stale.number, state=TrialState.FAIL)
    asked_again = {t.user_attrs.get(_AGAIN) for t in study.get_trials(deepcopy=False)}
    for lost in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        if lost.number not in asked_again:
            # Of the default, which was queued too, not all parameters may have been drawn yet.
            params = {**lost.system_attrs.get("fixed_params", {}), **lost.params}
            study.enqueue_trial(params, user_attrs={_AGAIN: lost.number})


def _job(out: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """What every trial's specification has in common."""
    return {
        "workloads": [str(out / f"workload-{k}.jsonl") for k in range(len(spec["workloads"]))],
        "calibration": str(out / "calibration.json"),
        "min_slo_attainment_frac": spec["min_slo_attainment_frac"],
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


def _finished(study: optuna.Study) -> list[Trial]:
    return [
        Trial(number=t.number, candidate=candidate(t.user_attrs["candidate"]), report=t.user_attrs["report"])
        for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


@contextmanager
def _pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that are gone when the block ends, however it ends, and when this process is killed."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_die_with_the_coordinator)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _die_with_the_coordinator() -> None:
    """In a worker. Its queue would not tell: the worker itself holds the end that the coordinator writes to."""
    coordinator = multiprocessing.parent_process()
    assert coordinator is not None

    def watch() -> None:
        coordinator.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_dict(trial: Trial) -> dict[str, Any]:
    return {"number": trial.number, "candidate": trial.candidate.as_dict(), "report": trial.report}
