"""What a configuration is worth: a pure function from a trial's specification to its report, both plain data."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from xllm_lab.candidate import candidate
from xllm_lab.errors import ConfigError, PolicyError, RequestTooLargeError
from xllm_lab.formats import read_trace
from xllm_lab.metrics import summarize
from xllm_lab.sim.calibrate import Calibration, read_calibration
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.tuning.tiers import tiers_of
from xllm_lab.workload import Workload

# A configuration that cannot run violates by this much, so that a sampler learns to stay away from it.
CANNOT_RUN = 1.0


def evaluate(spec: dict[str, Any]) -> dict[str, Any]:
    """Simulate a candidate on every workload of the specification.

    Args:
        spec: {"workloads": [paths], "calibration": path, "min_slo_attainment_frac": float, "candidate": ...}, and
            fields of `Tiers`.

    Returns:
        {"goodput_per_s": mean over workloads, "constraints": {name: at most 0 is kept}, "extrapolated_frac": largest,
        "summaries": one per workload, "failure": None or why it cannot run}.
    """
    chosen = candidate(spec["candidate"])
    summaries: list[dict[str, Any]] = []
    extrapolated = 0.0
    try:
        machine = tiers_of(spec).machine(_calibration(spec["calibration"]), chosen.policies)
        machine.refuse_if_not_priced(chosen.policies, chosen.instance)
        for path in spec["workloads"]:
            workload = _workload(path)
            for request in workload.requests:
                chosen.instance.refuse_if_too_large(request)
            predicted = machine.predicts(chosen.instance)
            records = run_simulation(
                workload,
                chosen.instance,
                chosen.policies,
                predicted,
                vocab_size=machine.model["vocab_size"],
                step_time=machine.step_time,
                draft_time=machine.draft_time,
                copy_time=machine.copy_time,
                fleet=chosen.fleet,
            )
            summaries.append(summarize(records).as_dict())
            extrapolated = max(extrapolated, predicted.extrapolated_frac)
    except (RequestTooLargeError, ConfigError, PolicyError) as error:
        return _failed(type(error).__name__, str(error))
    attained = min(s["slo_attainment_frac"] for s in summaries)
    return {
        "goodput_per_s": sum(s["goodput_per_s"] for s in summaries) / len(summaries),
        "constraints": {"runs": 0.0, "slo_attainment": spec["min_slo_attainment_frac"] - attained},
        "extrapolated_frac": extrapolated,
        "summaries": summaries,
        "failure": None,
    }


def _failed(category: str, reason: str) -> dict[str, Any]:
    return {
        "goodput_per_s": 0.0,
        "constraints": {"runs": CANNOT_RUN, "slo_attainment": CANNOT_RUN},
        "extrapolated_frac": 0.0,
        "summaries": [],
        "failure": f"{category}: {reason}",
    }


@functools.lru_cache(maxsize=8)
def _workload(path: str) -> Workload:
    return read_trace(Path(path))


@functools.lru_cache(maxsize=2)
def _calibration(path: str) -> Calibration:
    return read_calibration(Path(path))
