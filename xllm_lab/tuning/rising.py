"""Search at rising fidelity: what is cheap and wrong prunes, what is dear and right judges.

    facts     F0  counts of the trace                                  seconds, no error
    screen    F1  the step model in closed form, enumerated            cuts what misses a promise by half
    slice     F2  the simulator on a slice, at several seeds           proposes, gives up early what is worse
    trace     F2  the simulator on the whole trace, at several seeds   ranks those that differ most among the best
    engine    F3  the engine on a part that nobody saw                 measures, in batches

After each batch the step model is corrected by the engine's own steps, and those not measured yet are ranked anew. A
folder has a study for each level, linked by the level before; `story.json` tells how it went.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab import provenance
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.runs import Run, new_file, read_json, write_json
from xllm_lab.sim.acceptance_fit import fit_acceptance
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.transforms import part
from xllm_lab.tuning.arrival_seeds import noise_frac, reseeded
from xllm_lab.tuning.engine_level import EngineLevel
from xllm_lab.tuning.enumeration import spread
from xllm_lab.tuning.objective import Objective
from xllm_lab.tuning.search import EVALUATIONS, priced, tune
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.step_screen import StepScreen, screen
from xllm_lab.tuning.study import EQUAL_FRAC, Study, Trial, pick, read_study, write_study
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.tuning.trace_facts import DraftFacts, draft_facts, facts_as_dict, kv_fit, prompt_keys, reuse_curve
from xllm_lab.tuning.workers import Executor
from xllm_lab.workload import Workload

if TYPE_CHECKING:
    from xllm_lab.engine.engine import EngineOptions

FACTS, SCREEN, SLICE, TRACE, ENGINE = "f0-facts", "f1-screen", "f2-slice", "f2-trace", "f3-engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much of each level.

    Attributes:
        num_trials: in the simulator, on the slice.
        slice_requests: of the slice.
        slice_seeds: arrivals that a trial on the slice is simulated with; fewer if it is given up.
        trace_seeds: likewise on the whole trace, of those that are passed on.
        num_passed_on: from the slice to the trace.
        num_engine: runs of the engine, the default's included; 0 stops before.
        engine_requests: of a run: the trace's last ones, which no level below sees.
        prune_p: see `search.tune`.
    """

    num_trials: int = 200
    slice_requests: int = 500
    slice_seeds: int = 6
    trace_seeds: int = 3
    num_passed_on: int = 8
    num_engine: int = 5
    engine_requests: int = 64
    prune_p: float | None = 0.1

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 0 if name == "num_engine" else 1
            value = getattr(self, name)
            if name != "prune_p" and value < least:
                raise ConfigError(f"{name} is {value}, at least {least} is accepted")


@dataclass(slots=True)
class Story:
    """What each level found, kept after each."""

    path: Path
    levels: dict[str, Any] = field(default_factory=dict)

    def tell(self, level: str, found: dict[str, Any]) -> None:
        """Of a level that is over."""
        self.levels[level] = found
        with new_file(self.path) as file:
            write_json(file, self.levels)


def rise(
    workload: Workload,
    calibration: Calibration,
    space: Space,
    *,
    out: Path,
    seed: int = 0,
    budget: Budget | None = None,
    objective: Objective | None = None,
    tiers: Tiers | None = None,
    recorded: Run | None = None,
    engine: EngineOptions | None = None,
    num_workers: int = 2,
    workers: str | Executor = "processes",
    storage: str | None = None,
    evaluations: Path | None = None,
    on_trial: Callable[[str, Trial], object] = lambda level, trial: None,
) -> Study:
    """Search through all levels; resumes what was interrupted, level by level.

    Args:
        recorded: an engine run whose outputs say what drafts by lookup would have become; without it only methods
            that the calibration knows are searched.
        engine: what F3 opens; needed unless `budget.num_engine` is 0.

    Returns:
        The last level's study, as `tune` would: its trials are the engine's, the default first.

    Raises:
        ConfigError, RunError: as `tune`; too few requests to keep some from the simulator.
    """
    budget, objective, tiers = budget or Budget(), objective or Objective(), tiers or Tiers()
    if budget.num_engine and engine is None:
        raise ConfigError(f"an engine budget of {budget.num_engine} and no engine; accepted: engine options, or 0")
    if budget.num_engine and engine is not None:
        tiers.refuse_without(engine)
        if space.default.fleet is not None:
            raise ConfigError("a fleet, and an engine budget; accepted: a single instance, or an engine budget of 0")
    if (out / "study.json").exists():
        raise RunError(f"{out}: is a finished study; accepted: a new folder, or an unfinished study to resume")
    known = _split(workload, budget)
    drafts = None if recorded is None else draft_facts(recorded)
    calibration = _with_lookups(calibration, drafts)
    space = priced(space, calibration, tiers)
    story = Story(out / "story.json")
    _same_as_before(out, workload, space, calibration, seed=seed, budget=budget)
    shared: dict[str, Any] = {
        "seed": seed,
        "objective": objective,
        "num_workers": num_workers,
        "tiers": tiers,
        "evaluations": out.parent / EVALUATIONS if evaluations is None else evaluations,
        "storage": storage,
        "workers": workers,
    }

    curve = reuse_curve(
        prompt_keys(
            known, block_size=space.default.instance.block_size, vocab_size=int(calibration.model["vocab_size"])
        ),
        block_size=space.default.instance.block_size,
        num_tokens=sum(r.prompt.num_tokens for r in known.requests),
    )
    story.tell(FACTS, facts_as_dict(curve, kv_fit(known, space.default.instance), drafts))

    model = StepScreen(
        *(known, calibration, curve),
        tiers=tiers,
        tokens_per_step=_best_tokens_per_step(calibration),
        always=space.default,
    )
    screened = screen(space, model, num_start=budget.num_passed_on, seed=seed)
    story.tell(SCREEN, screened.as_dict())

    sliced = part(known, 0, min(budget.slice_requests, len(known.requests)))
    on_slice = _level(
        out / SLICE,
        lambda path: tune(
            [reseeded(sliced, k) for k in range(budget.slice_seeds)],
            *(calibration, space),
            num_trials=budget.num_trials,
            out=path,
            start=screened.start,
            screen=model,
            prune_p=budget.prune_p,
            on_trial=lambda trial: _tell(on_trial, SLICE, trial),
            **shared,
        ),
    )
    noise = noise_frac(on_slice.default.report["by_workload_per_s"])
    passed = _passed_on(on_slice.trials, budget.num_passed_on, max(EQUAL_FRAC, noise))
    story.tell(SLICE, {**_told(on_slice, noise), "passed_on": [t.number for t in passed]})

    on_trace = _level(
        out / TRACE,
        lambda path: tune(
            [reseeded(known, k) for k in range(budget.trace_seeds)],
            *(calibration, space),
            num_trials=1 + len(passed),
            out=path,
            start=[t.params for t in passed],
            noise_frac=noise,
            on_trial=lambda trial: _tell(on_trial, TRACE, trial),
            **shared,
        ),
    )
    noise = max(noise, noise_frac(on_trace.default.report["by_workload_per_s"]))
    story.tell(TRACE, _told(on_trace, noise))
    if not budget.num_engine:
        return _finished(out, on_trace, on_trace.trials, noise, calibration_of=on_trace)

    assert engine is not None, "refused above"
    level = EngineLevel(
        out=out / ENGINE,
        below=on_trace,
        held_out=part(workload, len(known.requests), len(workload.requests)),
        calibration=calibration,
        space=space,
        engine=engine,
        machine={**provenance.hardware()},
        budget=budget.num_engine,
        noise_frac=noise,
        **{name: shared[name] for name in ("seed", "objective", "tiers", "evaluations", "storage", "num_workers")},
        workers=workers,
    )
    measured = level.run(lambda trial: _tell(on_trial, ENGINE, trial))
    story.tell(ENGINE, level.story(measured))
    return _finished(out, on_trace, measured, noise, calibration_of=on_trace)


def _split(workload: Workload, budget: Budget) -> Workload:
    """What the simulator may know: all but the last requests, if they are for the engine."""
    kept = len(workload.requests) - (budget.engine_requests if budget.num_engine else 0)
    if kept < 2:
        raise ConfigError(
            f"{workload.source}: {len(workload.requests)} requests, {budget.engine_requests} of them for the engine; "
            "accepted: at least 2 more"
        )
    return part(workload, 0, kept)


def _with_lookups(calibration: Calibration, drafts: DraftFacts | None) -> Calibration:
    """Acceptance of methods that recorded outputs tell of, where the calibration has measured none."""
    if drafts is None:
        return calibration
    replayed = fit_acceptance(drafts.verifications)
    if replayed is None:
        return calibration
    measured = {} if calibration.acceptance is None else dict(calibration.acceptance.by_method)
    by_method = {**replayed.by_method, **measured}
    return replace(calibration, acceptance=replace(calibration.acceptance or replayed, by_method=by_method))


def _best_tokens_per_step(calibration: Calibration) -> float:
    """Of the luckiest request: no bound is lower."""
    if calibration.acceptance is None:
        return 1.0
    return 1.0 + max(len(p.overall.kept.mean) for p in calibration.acceptance.by_method.values())


def _passed_on(trials: Sequence[Trial], count: int, equal_frac: float) -> list[Trial]:
    """The winner, and those that differ most among the best quarter; of none that keep every promise, the best ones."""
    others = [t for t in trials[1:] if t.report["failure"] is None and t.report.get("is_whole", True)]
    ranked = sorted(others, key=lambda t: (not t.is_feasible, -t.value_per_s, t.number))
    best = pick(trials, equal_frac)
    first = [best] if best.number else []
    good = [t for t in ranked if t.number != best.number][: max(count, math.ceil(len(ranked) / 4))]
    every = [*first, *good]
    return [every[k] for k in spread([t.candidate for t in every], count)]


def _tell(on_trial: Callable[[str, Trial], object], level: str, trial: Trial) -> None:
    on_trial(level, trial)


def _level(path: Path, search: Callable[[Path], Study]) -> Study:
    """Of a level that is over, what it found; else it is begun, or goes on."""
    return read_study(path) if (path / "study.json").exists() else search(path)


def _told(study: Study, noise: float) -> dict[str, Any]:
    equal_frac = max(EQUAL_FRAC, noise)
    best, default = pick(study.trials, equal_frac), study.default
    gain = best.value_per_s / default.value_per_s - 1 if default.value_per_s else None
    categories = [t.report["category"] for t in study.trials if t.report["category"]]
    return {
        "num_trials": len(study.trials),
        "num_given_up": sum(not t.report.get("is_whole", True) for t in study.trials),
        "num_by_category": {name: categories.count(name) for name in sorted(set(categories))},
        "noise_frac": noise,
        "default_per_s": default.value_per_s,
        "best": best.number,
        "best_per_s": best.value_per_s,
        "gain_frac": gain,
        "is_above_noise": gain is not None and gain > equal_frac,
    }


def _same_as_before(
    out: Path, workload: Workload, space: Space, calibration: Calibration, *, seed: int, budget: Budget
) -> None:
    """ConfigError if the folder is of another search."""
    given = {"seed": seed, "budget": asdict(budget), "space": space.describe(), "source": workload.source}
    given["num_requests"] = len(workload.requests)
    given["step_time"] = list(calibration.step_time.weights)
    place = out / "rising.json"
    if place.exists():
        there = read_json(place, "the specification of a search")
        if differing := sorted(name for name, value in _plain(given).items() if there.get(name) != value):
            raise ConfigError(f"{out}: is a search for something else ({', '.join(differing)} differ)")
        return
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: exists already and is no search; accepted: a new folder")
    with new_file(place) as file:
        write_json(file, given)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    import json

    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


def _finished(out: Path, last: Study, trials: Sequence[Trial], noise: float, *, calibration_of: Study) -> Study:
    """The folder as `tune` leaves one, so that whoever reads studies reads this one."""
    spec = {**last.spec, "noise_frac": noise}
    for name in ("calibration.json", *(f"workload-{k}.jsonl" for k in range(len(last.spec["workloads"])))):
        with new_file(out / name) as file:
            file.write_bytes((calibration_of.path / name).read_bytes())
    with new_file(out / "spec.json") as file:
        write_json(file, spec)
    return write_study(out, spec, [replace(t, number=k) for k, t in enumerate(trials)])
