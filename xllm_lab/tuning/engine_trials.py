"""Trials on the engine: one process holds an open engine, and whatever becomes of a trial, the coordinator lives.

A specification names what is served and on what; the report of a run also has what its steps say of the step model.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab.candidate import Candidate, candidate
from xllm_lab.errors import ConfigError, ModelError, PolicyError, RequestTooLargeError
from xllm_lab.formats import read_trace
from xllm_lab.metrics import summarize
from xllm_lab.sim.calibrate import read_calibration
from xllm_lab.step_samples import samples
from xllm_lab.tuning.correction import residuals
from xllm_lab.tuning.evaluations import Report, Spec, code_version
from xllm_lab.tuning.objective import failed
from xllm_lab.tuning.tiers import Tiers, tiers_of

if TYPE_CHECKING:
    from xllm_lab.engine.engine import Engine, EngineOptions


def engine_spec(
    workload: str, calibration: str, tiers: Tiers, options: EngineOptions, *, machine: dict[str, Any], repeat: int = 0
) -> Spec:
    """What all evaluations of a study on one workload have in common.

    Args:
        workload, calibration: SHA-256 of what the files hold; times that policies are told are the calibration's.
        machine: the hardware: a measurement is of one.
        repeat: which of several measurements of the same.
    """
    return {
        "evaluator": "engine",
        "code": code_version(),
        "workload": workload,
        "calibration": calibration,
        "options": json.loads(json.dumps(asdict(options))),
        "machine": machine,
        "repeat": repeat,
        **tiers.described(),
    }


def evaluate_on_engine(job: dict[str, Any]) -> Report:
    """Serve a workload as a candidate; what cannot be served is a violation with a category.

    Returns:
        as `objective.evaluate`, and "residuals": of the steps.
    """
    spec: Spec = job["spec"]
    chosen = candidate(spec["candidate"])
    try:
        if chosen.fleet is not None:
            raise ConfigError("a fleet on one engine; accepted: a single instance")
        engine = _engine(json.dumps(spec["options"], sort_keys=True))
        calibration = read_calibration(Path(job["inputs"][spec["calibration"]]))
        machine = tiers_of(spec).machine(calibration, chosen.policies)
        workload = read_trace(Path(job["inputs"][spec["workload"]]))
        with tempfile.TemporaryDirectory(prefix="xllm-lab-trial-") as folder:
            run = engine.replay(
                *(workload, chosen.instance, chosen.policies),
                out=Path(folder) / "run",
                step_time=machine.step_time,
                draft_time=machine.draft_time,
                copy_time=machine.copy_time or None,
            )
            records = run.records
    except (RequestTooLargeError, ConfigError, ModelError, PolicyError, MemoryError, RuntimeError) as error:
        # Of a device that is out of memory, or lost, PyTorch says so in a RuntimeError; the engine may be of no use.
        _engine.cache_clear()
        return failed(type(error).__name__, " ".join(str(error).split())[:500])
    return {
        "summary": summarize(records).as_dict(),
        "num_devices": int(engine.options.tensor_parallel),
        "extrapolated_frac": 0.0,
        "residuals": residuals(samples(records.steps), calibration).as_dict(),
        "failure": None,
    }


def in_groups(candidates: Sequence[Candidate]) -> list[int]:
    """Places of candidates in an order in which those that one running engine can serve follow one another.

    An instance's pool and its captured graphs are made anew for another instance or other shapes; all else is told to
    the scheduler.
    """
    groups: dict[str, int] = {}
    for one in candidates:
        groups.setdefault(_needs_restart(one), len(groups))
    return sorted(range(len(candidates)), key=lambda k: (groups[_needs_restart(candidates[k])], k))


def num_restarts(candidates: Sequence[Candidate]) -> int:
    """That serving them in this order takes, the first start included."""
    keys = [_needs_restart(one) for one in candidates]
    return sum(k == 0 or keys[k] != keys[k - 1] for k in range(len(keys)))


def _needs_restart(one: Candidate) -> str:
    return json.dumps([one.as_dict()["instance"], repr(one.policies.captured_by)], sort_keys=True)


@functools.lru_cache(maxsize=1)
def _engine(options: str) -> Engine:
    """The open one, as long as nobody wants another."""
    from xllm_lab.engine.engine import Engine, EngineOptions

    known: dict[str, Any] = json.loads(options)
    known["without_ops"] = tuple(known["without_ops"])
    return Engine(EngineOptions(**known))
