"""The verbs of the command as plain functions, for notebooks: names and paths in, values out.

Everything heavy is imported where it is used, so that simulating needs no torch and replaying no SimPy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.formats import read_trace
from xllm_lab.policies.api import Choice, Knob
from xllm_lab.policies.catalog import policies
from xllm_lab.policies.of_instance import BESIDE, refuse_other_decisions
from xllm_lab.profiles import is_profile, read_profile
from xllm_lab.profiles.imported import Imported, is_import, read_import, write_import
from xllm_lab.progress import bar, tell, watched
from xllm_lab.runs import Run, read_run
from xllm_lab.settings import DEFAULT, changed
from xllm_lab.tiering_of import refuse_link_without_copies
from xllm_lab.workload import Workload

if TYPE_CHECKING:
    from xllm_lab.engine.cluster.fleet import EngineFleet
    from xllm_lab.engine.engine import Engine, EngineOptions
    from xllm_lab.fleet_config import FleetConfig
    from xllm_lab.page_time import PageTime
    from xllm_lab.sim.calibrate import Calibration
    from xllm_lab.sim.compare import Row
    from xllm_lab.sim.machine import Machine
    from xllm_lab.sim.parity import Parity
    from xllm_lab.sim.validate.measured import MeasuredValidation
    from xllm_lab.sim.validate.published import PublishedValidation
    from xllm_lab.tuning.drift import Drift
    from xllm_lab.tuning.export import Export
    from xllm_lab.tuning.intervals import Foresight, Recommendation
    from xllm_lab.tuning.lint.linter import Lint
    from xllm_lab.tuning.lint.rules import Rule
    from xllm_lab.tuning.lint.settings import Situation
    from xllm_lab.tuning.promote import Promotion, Refusal, Terms
    from xllm_lab.tuning.study import Study
    from xllm_lab.tuning.verify import Verification

PathLike = Path | str


def configure(policy: str | None = None, settings: Mapping[str, Any] | None = None, **beside: str | None) -> Candidate:
    """A configuration from names of policies and any knobs, the instance's and the policies' together.

    Args:
        policy: the batch policy; None is decode-first.
        settings: by the knob's name; where several have one of that name, "draft.depth".
        beside: policies of the other decisions, by decision: `shapes="xllm-buckets"`. They do nothing unless named.

    Raises:
        ConfigError: an unknown decision, policy or knob, or a value that is not accepted.
    """
    return changed(DEFAULT, _names(policy, beside), settings or {})


def _names(policy: str | None, beside: Mapping[str, str | None]) -> dict[str, str | None]:
    refuse_other_decisions(beside, BESIDE)
    return {"batch": policy, **beside}


def replay(
    trace: Workload | PathLike,
    *,
    out: PathLike,
    policy: str | None = None,
    settings: Mapping[str, Any] | None = None,
    engine: Engine | EngineOptions | EngineFleet | None = None,
    calibration: Calibration | PathLike | None = None,
    fleet: FleetConfig | PathLike | None = None,
    registry: str = "embedded",
    listen: str = "127.0.0.1",
    progress: bool = True,
    **beside: str | None,
) -> Run:
    """Serve a trace on the engine; see `Engine.replay`, and `EngineFleet.replay` for a fleet of engine processes.

    Args:
        engine: an open engine, or the options to open one with; of a fleet, one with as many processes.
        fleet: a fleet, or the cluster file of one; None is a single engine.
        registry: where the fleet's instances enter themselves: "embedded", or "etcd://HOST:PORT/PREFIX".
        listen: the address on which the fleet's processes listen.
        calibration: of steps and drafts, for policies that need times; without it those of steps are measured first.
        beside: policies beside the batch policy, see `configure`.
    """
    workload = _workload(trace)
    chosen = configure(policy, settings, **beside)
    # Of options, which are for this run; an open engine may serve others, too.
    refuse_link_without_copies(getattr(engine, "host_link_bytes_per_s", None), chosen.policies)
    fitted = None if calibration is None else _calibration(calibration)
    known: dict[str, Any] = {
        "out": Path(out),
        "step_time": None if fitted is None else fitted.step_time_with_host(),
        "draft_time": None if fitted is None else fitted.draft_time,
    }
    if fleet is not None:
        whole = _fleet(fleet)
        with _opened_fleet(engine, whole.num_instances, registry=registry, listen=listen) as all_of_them:
            records = watched(len(workload.requests), "replay", show=progress)
            with records.bar:
                return all_of_them.replay(workload, whole, chosen.instance, chosen.policies, recorder=records, **known)
    with _opened(engine, chosen) as host:
        records = watched(len(workload.requests), "replay", show=progress)  # last, so that no bar precedes a refusal
        with records.bar:
            return host.replay(workload, chosen.instance, chosen.policies, recorder=records, **known)


def calibrate(
    runs: Iterable[Run | PathLike],
    *,
    out: PathLike | None = None,
    vocab_size: int | None = None,
) -> Calibration:
    """Fit step times to engine runs, or to folders that `import_profile` wrote, and write them to `out` if given.

    Args:
        vocab_size: of the model of imported profiles.
    """
    from xllm_lab.sim.calibrate import calibrate as fit
    from xllm_lab.sim.calibrate import write_calibration
    from xllm_lab.sim.calibrate_imported import calibrate_imported

    given = list(runs)
    paths = [Path(run) for run in given if not isinstance(run, Run)]
    for path in paths:
        if not is_import(path) and is_profile(path):
            raise ConfigError(f"{path}: is a profile; accepted: engine runs, or folders that `xllm-lab import` wrote")
    imports = [path for path in paths if is_import(path)]
    if imports and len(imports) < len(given):
        raise ConfigError(f"{imports[0]}: is an import and others are runs; accepted: runs alone, or imports alone")
    for path in imports:
        for basis, num in sorted(read_import(path).num_by_basis.items()):
            tell(f"xllm-lab: {path}: {num} steps: {basis}")
    fitted = calibrate_imported(imports, vocab_size=vocab_size) if imports else fit([_run(run) for run in given])
    if out is not None:
        write_calibration(fitted, Path(out))
    return fitted


def simulate(
    trace: Workload | Run | PathLike,
    machine: Machine | Calibration | PathLike,
    *,
    out: PathLike,
    policy: str | None = None,
    settings: Mapping[str, Any] | None = None,
    fleet: FleetConfig | PathLike | None = None,
    acceptance: Sequence[float] | None = None,
    page_time: PageTime | None = None,
    host_link_bytes_per_s: float | None = None,
    store: str | None = None,
    expert_trace: str | None = None,
    fast_forward: bool = True,
    keep_steps: bool = True,
    progress: bool = False,
    **beside: str | None,
) -> Run:
    """Serve a trace in simulated time. Given a run, whatever is not overridden is taken from it.

    Args:
        machine: what prices steps; a calibration, or the file of one, is the machine it was fitted to.
        fleet: a fleet, or the cluster file of one; None is a single instance.
        acceptance: probability by position that a draft is kept if all before it were, by whatever method; without it
            what the machine's calibration learnt.
        page_time: what mapping pages of virtual KV takes; without it as calibrated.
        host_link_bytes_per_s: at which KV is copied to the host and back, each way; without it as calibrated.
        store: of KV blocks below the host, see `sim.machine.with_store`; of a run that had one, "sim:" without it.
        expert_trace: loads of experts divided among devices, see `sim.expert_trace.with_expert_trace`.
        fast_forward: skip steps that repeat themselves; the records are the same without.
        keep_steps: without them a run of a million requests is smaller, and says nothing of its steps.
        beside: policies beside the batch policy, see `configure`.
    """
    from xllm_lab.fleet_config import fleet_config
    from xllm_lab.sim.expert_trace import with_expert_trace
    from xllm_lab.sim.machine import (
        Machine,
        fitted_machine,
        with_acceptance,
        with_host_link,
        with_page_time,
        with_store,
        with_store_of,
    )
    from xllm_lab.sim.simulator import simulate as run_simulator

    own = _configuration(trace) if isinstance(trace, Run) else DEFAULT
    chosen = changed(own, _names(policy, beside), settings or {})
    workload = trace.workload if isinstance(trace, Run) else _workload(trace)
    priced = machine if isinstance(machine, Machine) else fitted_machine(_calibration(machine))
    if acceptance is not None:
        priced = with_acceptance(priced, acceptance)
    if page_time is not None:
        if chosen.instance.kv_layout != "virtual":
            told = f"times of mapping pages are given, and kv_layout {chosen.instance.kv_layout!r} maps none"
            raise ConfigError(f"{told}; accepted: with kv_layout 'virtual'")
        priced = with_page_time(priced, page_time)
    refuse_link_without_copies(host_link_bytes_per_s, chosen.policies)
    if host_link_bytes_per_s is not None:
        priced = with_host_link(priced, host_link_bytes_per_s)
    if store is not None:
        priced = with_store(priced, store, chosen.policies)
    elif isinstance(trace, Run):
        priced = with_store_of(priced, trace, chosen.policies)
    if expert_trace is not None:
        priced = with_expert_trace(priced, expert_trace)
    if isinstance(trace, Run) and fleet is None and trace.manifest.fleet is not None:
        fleet = fleet_config(trace.manifest.fleet)
    ended = bar(len(workload.requests), "simulate", show=progress)
    with ended:
        return run_simulator(
            workload,
            chosen.instance,
            chosen.policies,
            priced,
            out=Path(out),
            fleet=None if fleet is None else _fleet(fleet),
            fast_forward=fast_forward,
            keep_steps=keep_steps,
            progress=ended.update,
        )


def compare(simulated: Run | PathLike, engine: Iterable[Run | PathLike]) -> list[Row]:
    """Each metric's error, beside the engine's own run-to-run spread."""
    from xllm_lab.sim.compare import compare as compare_runs

    return compare_runs(_run(simulated), [_run(run) for run in engine])


def parity(
    run: Run | PathLike, *, policy: str | None = None, settings: Mapping[str, Any] | None = None, **beside: str | None
) -> Parity:
    """Whether the simulator decides as the engine did; with other policies, where it would part ways.

    Raises:
        ConfigError: as `configure`, or for another instance: what was recorded happened on this one.
    """
    from xllm_lab.sim.parity import parity as check

    opened = _run(run)
    own = _configuration(opened)
    other = changed(own, _names(policy, beside), settings or {})
    if other.instance != own.instance:
        raise ConfigError(f"{opened.path}: was recorded on its own instance; accepted: knobs of policies")
    return check(opened, policies=other.policies)


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

    default = replace(configure(policy, settings, **beside), fleet=None if fleet is None else _fleet(fleet))
    space, workloads = Space(default, also), [_workload(trace) for trace in traces]
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
                *(workloads, _calibration(calibration), space),
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
            *(workloads[0], _calibration(calibration), space),
            budget=budget,
            recorded=None if recorded is None else _run(recorded),
            engine=engine,
            on_trial=lambda level, trial: (drawn.set_postfix_str(level), drawn.update()),
            **known,
        )


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
    workload = _workload(trace)
    tiers, fitted = tiers_of(opened.spec), read_calibration(opened.path / "calibration.json")
    machine = tiers.machine(fitted, opened.best.candidate.policies)
    fleet = opened.default.candidate.fleet
    host: Engine | EngineFleet
    with contextlib.ExitStack() as closed:
        if fleet is None:
            host = closed.enter_context(_opened(engine))
        else:
            host = closed.enter_context(_opened_fleet(engine, fleet.num_instances, registry=registry, listen=listen))
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


def export(verification: Verification | PathLike, *, to: str, version: str | None = None) -> Export:
    """What production reads, for the winner of a verification: the default unless the tuned one measured better.

    Args:
        to: a name of `tuning.export.targets()`.
        version: of the target; None is the latest that is known.
    """
    from xllm_lab.tuning.export import export as translate
    from xllm_lab.tuning.verify import Verification, read_verification

    done = verification if isinstance(verification, Verification) else read_verification(Path(verification))
    return translate(done.winner, to, kv_bytes_per_token=done.model["kv_bytes_per_token"], version=version)


def report(
    out: PathLike,
    *,
    engine: Iterable[Run | PathLike],
    simulated: Run | PathLike | None = None,
    calibration: Calibration | PathLike | None = None,
    study: Study | PathLike | None = None,
    verification: PathLike | None = None,
) -> Path:
    """One self-contained HTML page about any of these."""
    from xllm_lab.report import write_report
    from xllm_lab.tuning.study import Study, read_study

    return write_report(
        Path(out),
        engine=[_run(run) for run in engine],
        simulated=None if simulated is None else _run(simulated),
        calibration=None if calibration is None else _calibration(calibration),
        study=study if study is None or isinstance(study, Study) else read_study(Path(study)),
        verification=None if verification is None else Path(verification),
    )


def timeline(run: Run | PathLike, *, out: PathLike | None = None) -> Path:
    """Write a run's timeline for https://ui.perfetto.dev, beside its folder unless `out` says where."""
    from xllm_lab.timeline_file import write_timeline

    opened = _run(run)
    beside = opened.path.with_name(f"{opened.path.resolve().name}.pftrace.gz")
    return write_timeline(opened, beside if out is None else Path(out))


def catalogue() -> dict[str, dict[str, dict[str, Any]]]:
    """By what they decide: every policy with its first docstring line, and its knobs with default and range."""
    from xllm_lab.policies.catalog import decisions, knobs

    def told(cls: type[Any], name: str, note: Knob | Choice) -> str:
        default = getattr(cls(), name)
        if isinstance(note, Choice):
            return f"{default}; one of {', '.join(map(str, note.values))}"
        return f"{default}; {note.low:g} to {note.high:g}{', log scale' if note.log else ''}"

    return {
        decides: {
            name: {
                "what": (cls.__doc__ or "").strip().splitlines()[0],
                "knobs": {knob: told(cls, knob, note) for knob, note in knobs(cls).items()},
            }
            for name, cls in policies(decides).items()
        }
        for decides in decisions()
    }


def _configuration(run: Run) -> Candidate:
    return Candidate(instance=run.manifest.instance_config(), policies=run.manifest.instance_policies())


def _workload(trace: Workload | PathLike) -> Workload:
    return trace if isinstance(trace, Workload) else read_trace(Path(trace))


def _run(run: Run | PathLike) -> Run:
    return run if isinstance(run, Run) else read_run(Path(run))


def _calibration(calibration: Calibration | PathLike) -> Calibration:
    from xllm_lab.sim.calibrate import read_calibration

    return read_calibration(Path(calibration)) if isinstance(calibration, Path | str) else calibration


def validate_npu() -> PublishedValidation:
    """The roofline model beside published measurements on Ascend NPUs, its error as it is."""
    from xllm_lab.sim.validate_npu import validate_npu as validate

    return validate()


def validate_measured(
    folder: PathLike, *, model_config: PathLike | None = None, workload: PathLike | None = None
) -> MeasuredValidation:
    """What vLLM did on a measured machine beside what the simulator says, from the machine's operator profile alone.

    `workload` is what was replayed there, for the tokens of its prompts.
    """
    from xllm_lab.sim.validate.measured import validate_measured as validate

    return validate(
        Path(folder),
        model_config=None if model_config is None else Path(model_config),
        workload_file=None if workload is None else Path(workload),
    )


def profile_engine(
    *,
    out: PathLike,
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 1,
    timer: str = "wall",
    progress: bool = True,
    **grid: int,
) -> dict[str, dict[int, float]]:
    """Measure the engine's operators on the device at hand, for `simulate` on a machine `--profile`d so.

    Args:
        out: the profile bundle, a new folder.
        grid: fields of `engine.machine_profile.Grid`.
    """
    from xllm_lab.engine.engine import Engine, EngineOptions
    from xllm_lab.engine.machine_profile import Grid, num_shapes, write_machine_profile

    wanted = Grid(**grid)
    engine = Engine(EngineOptions(model=model, device=device, dtype=dtype, threads=threads, timer=timer))
    with bar(num_shapes(wanted), "profile", show=progress) as measured:
        return write_machine_profile(engine, Path(out), wanted, progress=measured.update)


def follow() -> bool:
    """Serve rank 0 of a tensor-parallel engine to its end, if torchrun started this process as another rank.

    Returns:
        False, at once, in any other process.

    Raises:
        RankError: rank 0, or another, is gone.
    """
    from xllm_lab.engine.rank_place import place_in_environment

    place = place_in_environment()
    if place is None or place.rank == 0:
        return False
    from xllm_lab.engine.follow import follow as serve_rank_0

    serve_rank_0(place)
    return True


def _fleet(fleet: FleetConfig | PathLike) -> FleetConfig:
    from xllm_lab.fleet_file import read_fleet

    return read_fleet(Path(fleet)) if isinstance(fleet, (Path, str)) else fleet


@contextlib.contextmanager
def _opened_fleet(
    engine: Engine | EngineOptions | EngineFleet | None, num_instances: int, *, registry: str, listen: str
) -> Iterator[EngineFleet]:
    """A fleet, which says where it listens and is closed in the end if it was opened here."""
    from xllm_lab.engine.cluster.fleet import EngineFleet
    from xllm_lab.engine.engine import Engine, EngineOptions

    if isinstance(engine, Engine):
        raise ConfigError("a fleet on an engine that is open already; accepted: engine options, or an open fleet")
    if isinstance(engine, EngineFleet):
        yield engine
        return
    with EngineFleet(engine or EngineOptions(), num_instances, registry=registry, host=listen) as opened:
        opened.tell_where()
        yield opened


@contextlib.contextmanager
def _opened(
    engine: Engine | EngineOptions | EngineFleet | None, candidate: Candidate | None = None
) -> Iterator[Engine]:
    """An engine, closed in the end if it was opened here: for that candidate."""
    from xllm_lab.engine.cluster.fleet import EngineFleet
    from xllm_lab.engine.engine import Engine

    if isinstance(engine, EngineFleet):
        raise ConfigError("an open fleet and no fleet to serve as; accepted: with `fleet`")
    if isinstance(engine, Engine):
        yield engine
        return
    with Engine(engine if engine is None or candidate is None else engine.serving(candidate.policies)) as opened:
        yield opened


def import_profile(source: str, path: PathLike, *, out: PathLike, kv_block_tokens: int | None = None) -> Imported:
    """Write a new folder of what a profiler recorded, see `profiles.imported`: steps, a trace, operators, collectives.

    Args:
        source: a name of `profiles.sources()`.
        path: the profiler's folder or file.
        kv_block_tokens: tokens of a KV block of the profiled server, for batches that name no lengths.

    Raises:
        ProfileError: an unknown source, or a file or row that cannot be read.
        ConfigError: nothing in it can be used.
        RunError: the folder exists or cannot be written.
    """
    return write_import(read_profile(path, source=source), Path(out), kv_block_tokens=kv_block_tokens)


def validate_mtp() -> PublishedValidation:
    """xLLM's published table of multi-token prediction: three rows fitted, the others predicted by the simulator."""
    from xllm_lab.sim.validate.mtp import validate_mtp as validate

    return validate()


def lint(config: PathLike, situation: Situation | None = None, *, fix: bool = False) -> Lint:
    """What is wrong with a configuration of xLLM or vLLM-Ascend, see `tuning.lint`.

    Args:
        situation: version, platform, model and device, as far as they are known.
        fix: repair what can be repaired; the result's text is in `config.text`, and the file stays as it is.

    Raises:
        ConfigError: no configuration can be read there.
    """
    from xllm_lab.tuning.lint.linter import lint as look
    from xllm_lab.tuning.lint.linter import repair
    from xllm_lab.tuning.lint.reading import read_configuration

    found = look(read_configuration(config), situation)
    return repair(found) if fix else found


def lint_rules() -> tuple[Rule, ...]:
    """Every rule of `lint`."""
    from xllm_lab.tuning.lint.rules import every_rule

    return every_rule()


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
    runs = [_run(run) for run in known]
    return Foresight(fitted, tiers, known_error(fitted, runs, tiers) if runs else None)


def promote(
    verification: PathLike, *, to: str, out: PathLike, version: str | None = None, terms: Terms | None = None
) -> tuple[Promotion | None, list[Refusal]]:
    """Hand the candidate of a verification to production, or say why not; see `tuning.promote.promote`.

    Args:
        to: a name of `tuning.export.targets()`.
    """
    from xllm_lab.tuning.promote import promote as pass_gate

    return pass_gate(Path(verification), to=to, out=Path(out), version=version, terms=terms)


def drift(trace: Workload | PathLike, *, promoted: Promotion | PathLike) -> Drift:
    """Whether a live trace left what a configuration was promoted for, and what that costs; see `tuning.drift`."""
    from xllm_lab.tuning.drift import drift as look
    from xllm_lab.tuning.promote import Promotion, read_promotion

    found = promoted if isinstance(promoted, Promotion) else read_promotion(Path(promoted))
    return look(_workload(trace), found)
