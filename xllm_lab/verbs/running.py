"""Runs: on the engine, and in the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab.errors import ConfigError
from xllm_lab.progress import bar, watched
from xllm_lab.runs import Run
from xllm_lab.settings import DEFAULT, changed
from xllm_lab.tiering_of import refuse_link_without_copies
from xllm_lab.verbs.given import (
    PathLike,
    by_decision,
    calibration_of,
    configuration_of,
    configure,
    fleet_of,
    workload_of,
)
from xllm_lab.verbs.opened import opened_engine, opened_fleet
from xllm_lab.workload import Workload

if TYPE_CHECKING:
    from xllm_lab.engine.cluster.fleet import EngineFleet
    from xllm_lab.engine.engine import Engine, EngineOptions
    from xllm_lab.fleet_config import FleetConfig
    from xllm_lab.page_time import PageTime
    from xllm_lab.sim.calibrate import Calibration
    from xllm_lab.sim.machine import Machine


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
    workload = workload_of(trace)
    chosen = configure(policy, settings, **beside)
    # Of options, which are for this run; an open engine may serve others, too.
    refuse_link_without_copies(getattr(engine, "host_link_bytes_per_s", None), chosen.policies)
    fitted = None if calibration is None else calibration_of(calibration)
    known: dict[str, Any] = {
        "out": Path(out),
        "step_time": None if fitted is None else fitted.step_time_with_host(),
        "draft_time": None if fitted is None else fitted.draft_time,
    }
    if fleet is not None:
        whole = fleet_of(fleet)
        with opened_fleet(engine, whole.num_instances, registry=registry, listen=listen) as all_of_them:
            records = watched(len(workload.requests), "replay", show=progress)
            with records.bar:
                return all_of_them.replay(workload, whole, chosen.instance, chosen.policies, recorder=records, **known)
    with opened_engine(engine, chosen) as host:
        records = watched(len(workload.requests), "replay", show=progress)  # last, so that no bar precedes a refusal
        with records.bar:
            return host.replay(workload, chosen.instance, chosen.policies, recorder=records, **known)


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

    own = configuration_of(trace) if isinstance(trace, Run) else DEFAULT
    chosen = changed(own, by_decision(policy, beside), settings or {})
    workload = trace.workload if isinstance(trace, Run) else workload_of(trace)
    priced = machine if isinstance(machine, Machine) else fitted_machine(calibration_of(machine))
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
            fleet=None if fleet is None else fleet_of(fleet),
            fast_forward=fast_forward,
            keep_steps=keep_steps,
            progress=ended.update,
        )


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
