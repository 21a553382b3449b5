"""A search, what it predicts, and what the engine says of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab.errors import ConfigError
from xllm_lab.formats import read_trace
from xllm_lab.progress import bar, watched
from xllm_lab.runs import Run
from xllm_lab.verbs.given import (
    PathLike,
    calibration_of,
    configure,
    fleet_of,
    run_of,
    workload_of,
)
from xllm_lab.verbs.opened import opened_engine, opened_fleet
from xllm_lab.workload import Workload

if TYPE_CHECKING:
    from xllm_lab.engine.cluster.fleet import EngineFleet
    from xllm_lab.engine.engine import Engine, EngineOptions
    from xllm_lab.fleet_config import FleetConfig
    from xllm_lab.sim.calibrate import Calibration
    from xllm_lab.tuning.intervals import Foresight, Recommendation
    from xllm_lab.tuning.study import Study
    from xllm_lab.tuning.verify import Verification


def tune(
    traces: Sequence[Workload | PathLike],
    calibration: Calibration | PathLike,
    *,
    out: PathLike,
    policy: str | None = None,
    settings: Mapping[str, Any] | None = None,
    also: Sequence[str] = (),
    trials: int = 100,
    seed: int = 0,
    min_slo_attainment_frac: float = 0.0,
    workers: int = 2,
    host_link_bytes_per_s: float | None = None,
    store: str | None = None,
    expert_trace: str | None = None,
    fleet: FleetConfig | PathLike | None = None,
    limits: Mapping[str, float] | None = None,
    second_axis: str | None = None,
    storage: str | None = None,
    executor: str = "processes",
    evaluations: PathLike | None = None,
    engine_budget: int | None = None,
    recorded: Run | PathLike | None = None,
    engine: EngineOptions | None = None,
    engine_requests: int = 64,
    slice_requests: int = 500,
    progress: bool = True,
    **beside: str | None,
) -> Study:
    """Search policy and instance knobs in the simulator for the most goodput, starting from `policy` and `settings`.

    Args:
        also: further policies to choose from, of any decision.
        host_link_bytes_per_s: at which KV is copied to the host and back, each way; without it as calibrated.
        store: of KV blocks below the host, see `sim.machine.with_store`; knobs that need one are searched, too.
        expert_trace: loads of experts divided among devices, see `sim.expert_trace.with_expert_trace`.
        fleet: a fleet, or the cluster file of one, whose policies' knobs are searched, too; None is a single instance.
        limits, second_axis: see `tuning.objective.Objective`.
        storage, executor, evaluations: see `tuning.search.tune`.
        engine_budget: search through all levels, see `tuning.rising`, one trace; None is the simulator alone.
        recorded, engine, engine_requests, slice_requests: of such a search.
        beside: policies beside the batch policy, see `configure`; their knobs are searched, too.
    """
    from xllm_lab.tuning.objective import Objective
    from xllm_lab.tuning.rising import Budget, rise
    from xllm_lab.tuning.search import tune as search
    from xllm_lab.tuning.space import Space
    from xllm_lab.tuning.tiers import Tiers

    default = replace(configure(policy, settings, **beside), fleet=None if fleet is None else fleet_of(fleet))
    space, workloads = Space(default, also), [workload_of(trace) for trace in traces]
    known: dict[str, Any] = {
        "seed": seed,
        "out": Path(out),
        "objective": Objective(
            min_slo_attainment_frac=min_slo_attainment_frac, limits=dict(limits or {}), second_axis=second_axis
        ),
        "num_workers": workers,
        "workers": executor,
        "storage": storage,
        "evaluations": None if evaluations is None else Path(evaluations),
        "tiers": Tiers(host_link_bytes_per_s=host_link_bytes_per_s, store=store, expert_trace=expert_trace),
    }
    if engine_budget is None:
        with bar(trials, "tune", show=progress) as drawn:
            return search(
                *(workloads, calibration_of(calibration), space),
                num_trials=trials,
                on_trial=lambda trial: drawn.update(),
                **known,
            )
    if len(workloads) != 1:
        raise ConfigError(f"{len(workloads)} traces, and an engine budget; accepted: one trace")
    budget = Budget(
        num_trials=trials, num_engine=engine_budget, engine_requests=engine_requests, slice_requests=slice_requests
    )
    with bar(trials + budget.num_passed_on + 1 + engine_budget, "tune", show=progress) as drawn:
        return rise(
            *(workloads[0], calibration_of(calibration), space),
            budget=budget,
            recorded=None if recorded is None else run_of(recorded),
            engine=engine,
            on_trial=lambda level, trial: (drawn.set_postfix_str(level), drawn.update()),
            **known,
        )


def recommend(
    study: Study | PathLike, *, known: Iterable[Run | PathLike] = (), arrivals: int = 5
) -> dict[str, Recommendation]:
    """What a study's best candidate is predicted to do, on each of its workloads by source, beside the default.

    Args:
        known: engine runs that say how wrong the simulator is.
        arrivals: over so many of them, see `arrivals.rotated`.

    Raises:
        ConfigError: fewer than two arrivals.
    """
    from xllm_lab.arrivals import rotated
    from xllm_lab.tuning.study import Study, read_study

    opened = study if isinstance(study, Study) else read_study(Path(study))
    foresight = _foresight(opened, known)
    found = {}
    for number, source in enumerate(opened.spec["workloads"]):
        workload = read_trace(opened.path / f"workload-{number}.jsonl")
        found[f"{number}: {source}"] = foresight.recommend(
            opened.default.candidate, opened.best.candidate, [rotated(workload, seed) for seed in range(arrivals)]
        )
    return found


def _foresight(study: Study, known: Iterable[Run | PathLike]) -> Foresight:
    from xllm_lab.sim.calibrate import read_calibration
    from xllm_lab.tuning.intervals import Foresight, known_error
    from xllm_lab.tuning.tiers import tiers_of

    fitted, tiers = read_calibration(study.path / "calibration.json"), tiers_of(study.spec)
    runs = [run_of(run) for run in known]
    return Foresight(fitted, tiers, known_error(fitted, runs, tiers) if runs else None)


def verify(
    study: Study | PathLike,
    trace: Workload | PathLike,
    *,
    out: PathLike,
    repeats: int = 3,
    engine: Engine | EngineOptions | EngineFleet | None = None,
    registry: str = "embedded",
    listen: str = "127.0.0.1",
    known: Iterable[Run | PathLike] = (),
    progress: bool = True,
) -> Verification:
    """Measure a study's best candidate against its default on the engine, in turn, on a held-out trace.

    Args:
        known: engine runs that say how wrong the simulator is, for the predicted intervals.
        engine: an open engine, or the options to open one with; of a study of a fleet, one with as many processes.
        registry, listen: of a fleet, as in `replay`.

    Raises:
        ConfigError: the engine has not the link or the store that the study is of; and as `tuning.verify.verify`.
    """
    from xllm_lab.sim.calibrate import read_calibration
    from xllm_lab.tuning.study import Study, read_study
    from xllm_lab.tuning.tiers import tiers_of
    from xllm_lab.tuning.verify import verify as measure

    opened = study if isinstance(study, Study) else read_study(Path(study))
    workload = workload_of(trace)
    tiers, fitted = tiers_of(opened.spec), read_calibration(opened.path / "calibration.json")
    machine = tiers.machine(fitted, opened.best.candidate.policies)
    fleet = opened.default.candidate.fleet
    host: Engine | EngineFleet
    with contextlib.ExitStack() as closed:
        if fleet is None:
            host = closed.enter_context(opened_engine(engine))
        else:
            host = closed.enter_context(opened_fleet(engine, fleet.num_instances, registry=registry, listen=listen))
        tiers.refuse_without(host.options)
        foresight = _foresight(opened, known)
        records = watched((2 * repeats + 2) * len(workload.requests), "verify", show=progress)
        with records.bar:
            return measure(
                host,
                workload,
                default=opened.default.candidate,
                tuned=opened.best.candidate,
                out=Path(out),
                repeats=repeats,
                step_time=machine.step_time,
                draft_time=machine.draft_time,
                copy_time=machine.copy_time or None,
                foresight=foresight,
                alternatives=[trial.candidate for trial in opened.runners_up()],
                make_records=lambda: type(records)(bar=records.bar),
            )
