"""Serve a workload in simulated time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import simpy

from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.records import Records
from xllm_lab.runs import Manifest, Run, describe, fill_run, new_folder
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import WorkloadFeed, serve
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.cost.fitted import FittedCost
from xllm_lab.sim.instance import Instance, Predicted, Timing
from xllm_lab.step_time import StepTime
from xllm_lab.workload import Request, TokenIds, Workload, prompt_token_ids

# More than this fraction of steps outside the calibrated range earns a warning.
EXTRAPOLATED_FRAC_WARNING = 0.05
_NO_TOKENS = np.empty(0, dtype=np.int32)


def run_simulation(
    workload: Workload,
    config: InstanceConfig,
    policy: BatchPolicy,
    timing: Timing,
    *,
    vocab_size: int,
    step_time: StepTime | None = None,
) -> Records:
    """Records of one instance that serves `workload`.

    Raises:
        ConfigError: the policy needs step times and has none.
        PolicyError: the policy planned something illegal, or starves a request.
    """

    def prompt_ids(request: Request) -> TokenIds:
        if not config.enable_prefix_cache:
            return _NO_TOKENS  # only block keys ever read them
        return prompt_token_ids(request, vocab_size=vocab_size, seed=workload.seed)

    records = Records()
    scheduler = Scheduler(config, policy, records, step_time=step_time)
    env = simpy.Environment(initial_time=0)
    feed = WorkloadFeed(workload)
    Instance(env, serve(scheduler, feed, prompt_ids), timing, feed)
    env.run()
    return records.sort()


def simulate(
    workload: Workload,
    config: InstanceConfig,
    policy: BatchPolicy,
    calibration: Calibration,
    *,
    out: Path,
) -> Run:
    """Simulate, and write a run folder whose manifest carries the calibration's error and the extrapolated fraction.

    Raises:
        RequestTooLargeError: a request could never run on this configuration.
        ConfigError, PolicyError: as `run_simulation`.
        RunError: the folder exists, or cannot be written.
    """
    for request in workload.requests:
        config.refuse_if_too_large(request)
    with new_folder(out) as folder:
        predicted = Predicted(FittedCost(calibration))
        records = run_simulation(
            workload,
            config,
            policy,
            predicted,
            vocab_size=calibration.model["vocab_size"],
            step_time=calibration.step_time,
        )
        timing = {
            "cost_model": "fitted",
            "calibrated_on": list(calibration.runs),
            "residual": asdict(calibration.residual),
            "extrapolated_frac": predicted.extrapolated_frac,
        }
        manifest = Manifest(
            host="simulator",
            timing=timing,
            model=calibration.model,
            **describe(config, policy, calibration.step_time, workload),
        )
        fill_run(folder, manifest, workload, records)
    return Run(out, manifest)
