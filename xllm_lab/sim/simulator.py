"""Serve a workload in simulated time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from xllm_lab.columns import step_feature_rows
from xllm_lab.copy_time import CopyTime
from xllm_lab.draft_time import DraftTime
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.formats import own
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.of_instance import Policies
from xllm_lab.rebalancing import describe_experts
from xllm_lab.records import Recorder, Records
from xllm_lab.run_writer import STEPS_FILE, RunWriter
from xllm_lab.runs import Manifest, Run, describe, new_folder, write_json
from xllm_lab.scheduler_of import scheduler_of
from xllm_lab.serving import WorkloadFeed, serve
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.collector import seldom_collecting
from xllm_lab.sim.copies import SimulatedCopies
from xllm_lab.sim.fleet import Fleet
from xllm_lab.sim.group import GroupTiming, fleet_of_group, refuse_group
from xllm_lab.sim.instance import Instance, Timing
from xllm_lab.sim.machine import Machine
from xllm_lab.step_shape import Shapes
from xllm_lab.step_time import StepTime
from xllm_lab.workload import Request, TokenIds, Workload, prompt_token_ids

# More than this fraction of steps outside the calibrated range earns a warning.
EXTRAPOLATED_FRAC_WARNING = 0.05
_NO_TOKENS = np.empty(0, dtype=np.int32)


def run_simulation(
    workload: Workload,
    config: InstanceConfig,
    policies: Policies,
    timing: Timing,
    *,
    vocab_size: int,
    step_time: StepTime | None = None,
    draft_time: DraftTime | None = None,
    copy_time: CopyTime | None = None,
    fleet: FleetConfig | None = None,
    group: GroupTiming | None = None,
) -> Records:
    """Records of one instance that serves `workload`, or of a fleet of them, in memory.

    Args:
        group: of a fleet whose instances step together.

    Raises:
        as `serve_alone`.
    """
    records = Records()
    known: dict[str, Any] = {
        "recorder": records,
        "vocab_size": vocab_size,
        "step_time": step_time,
        "draft_time": draft_time,
        "copy_time": copy_time,
    }
    if fleet is None:
        serve_alone(workload, config, policies, timing, **known)
    else:
        Fleet(workload, fleet, config, policies, timing, group=group, **known).run()
    return records.sort()


def serve_alone(
    workload: Workload,
    config: InstanceConfig,
    policies: Policies,
    timing: Timing,
    *,
    recorder: Recorder,
    vocab_size: int,
    step_time: StepTime | None = None,
    draft_time: DraftTime | None = None,
    copy_time: CopyTime | None = None,
) -> Shapes | None:
    """One instance serves `workload`, without a router.

    Returns:
        The shapes policy at work, which has counted; None if every step was eager.

    Raises:
        ConfigError: a policy needs step times and has none, or drafts, and nothing says what becomes of them.
        PolicyError: the policy planned something illegal, or starves a request.
    """

    def prompt_ids(request: Request) -> TokenIds:
        if not config.enable_prefix_cache:
            return _NO_TOKENS  # only block keys ever read them
        return prompt_token_ids(request, vocab_size=vocab_size, seed=workload.seed)

    env = simpy.Environment(initial_time=0)
    copies = SimulatedCopies(env, timing.links(config.block_size), has_store=timing.has_store)
    scheduler = scheduler_of(
        *(config, policies, recorder),
        proposer=timing.proposer,
        copier=copies,
        mover=timing.mover(),
        step_time=step_time,
        draft_time=draft_time,
        copy_time=copy_time,
    )
    feed = WorkloadFeed(workload)
    Instance(env, serve(scheduler, feed, prompt_ids), timing, feed, copies=copies)
    with seldom_collecting():
        env.run()
    if scheduler.experts is not None:
        scheduler.experts.finish()
    return scheduler.shapes


def simulate(
    workload: Workload,
    config: InstanceConfig,
    policies: Policies,
    machine: Machine,
    *,
    out: Path,
    fleet: FleetConfig | None = None,
    fast_forward: bool = True,
    keep_steps: bool = True,
    progress: Callable[[], object] = lambda: None,
) -> Run:
    """Simulate, and write a run folder whose manifest says how step times were had and which fraction extrapolates.

    Records go to disk while the run goes on.

    Args:
        fleet: equal instances behind a router; without it, one instance and no router, or one group of them.
        fast_forward: skip steps that repeat themselves; the records are the same without, and take longer.
        keep_steps: without them, steps.parquet has no rows.
        progress: called once for every request that ended.

    Raises:
        RequestTooLargeError: a request could never run on this configuration.
        ConfigError: the machine cannot hold the instance, or does not know what its steps cost; and as
            `run_simulation`, which PolicyError is too.
        RunError: the folder exists, or cannot be written.
    """
    machine.refuse_if_too_large(config)
    machine.refuse_if_not_priced(policies, config)
    for request in workload.requests:
        config.refuse_if_too_large(request)
    timing, group = machine.predicts(config, fast_forward=fast_forward), machine.steps_together(config)
    if group is not None:
        fleet = fleet or fleet_of_group(group.size)
        refuse_group(group.size, fleet, policies, config)
    with new_folder(out) as folder:
        with RunWriter(folder, keep_steps=keep_steps, on_request=progress) as writer:
            known = {
                "recorder": writer,
                "vocab_size": machine.model["vocab_size"],
                "step_time": machine.step_time,
                "draft_time": machine.draft_time,
                "copy_time": machine.copy_time,
            }
            if fleet is None:
                shapes = serve_alone(workload, config, policies, timing, **known)
            else:
                served = Fleet(
                    *(workload, fleet, config, policies, timing),
                    on_transfer=writer.transfer,
                    on_role=writer.role,
                    group=group,
                    **known,
                )
                writer.low_water_us = served.low_water_us
                served.run()
                shapes = served.shapes
        told = {**machine.timing, "extrapolated_frac": timing.extrapolated_frac}
        if group is not None:
            told["waves"] = asdict(group.waves)
        if machine.calibration is not None and keep_steps:
            told["total_error_frac"] = _total_error_frac(machine.calibration, folder)
        manifest = Manifest(
            host="simulator",
            timing=told,
            model=dict(machine.model),
            fleet=None if fleet is None else fleet.as_dict(),
            graphs=None if shapes is None else shapes.counts.as_dict(),
            expert_layout=_places(machine, policies, writer),
            **describe(
                *(config, policies, machine.step_time, workload),
                draft_time=machine.draft_time,
                copy_time=machine.copy_time,
            ),
        )
        write_json(folder / "manifest.json", asdict(manifest))
        own.write(workload, folder / "workload.jsonl")
    return Run(out, manifest)


def _places(machine: Machine, policies: Policies, writer: RunWriter) -> dict[str, Any] | None:
    if machine.experts is None:
        return None
    return describe_experts(machine.experts.layout, policies.experts.num_redundant_experts, writer.decisions)


def _total_error_frac(calibration: Calibration, folder: Path) -> float:
    """Half width of the 95 % interval of the sum of step times, relative to it."""
    spread = calibration.run_spread()
    for rows in step_feature_rows(folder / STEPS_FILE):
        spread.add(rows)
    return float(f"{spread.half_width_frac():.4g}")
