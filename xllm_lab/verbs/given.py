"""What verbs are given: names, paths, or what was opened already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab.candidate import Candidate
from xllm_lab.formats import read_trace
from xllm_lab.policies.of_instance import BESIDE, refuse_other_decisions
from xllm_lab.runs import Run, read_run
from xllm_lab.settings import DEFAULT, changed
from xllm_lab.workload import Workload

if TYPE_CHECKING:
    from xllm_lab.fleet_config import FleetConfig
    from xllm_lab.sim.calibrate import Calibration

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
    return changed(DEFAULT, by_decision(policy, beside), settings or {})


def by_decision(policy: str | None, beside: Mapping[str, str | None]) -> dict[str, str | None]:
    """Names of policies by what they decide; ConfigError for a decision that is none."""
    refuse_other_decisions(beside, BESIDE)
    return {"batch": policy, **beside}


def configuration_of(run: Run) -> Candidate:
    return Candidate(instance=run.manifest.instance_config(), policies=run.manifest.instance_policies())


def workload_of(trace: Workload | PathLike) -> Workload:
    return trace if isinstance(trace, Workload) else read_trace(Path(trace))


def run_of(run: Run | PathLike) -> Run:
    return run if isinstance(run, Run) else read_run(Path(run))


def calibration_of(calibration: Calibration | PathLike) -> Calibration:
    """Read from its file, if it is not open."""
    from xllm_lab.sim.calibrate import read_calibration

    return read_calibration(Path(calibration)) if isinstance(calibration, Path | str) else calibration


def fleet_of(fleet: FleetConfig | PathLike) -> FleetConfig:
    """Read from its cluster file, if it is not open."""
    from xllm_lab.fleet_file import read_fleet

    return read_fleet(Path(fleet)) if isinstance(fleet, (Path, str)) else fleet
