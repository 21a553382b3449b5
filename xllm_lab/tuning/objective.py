"""What a configuration is worth: a pure function from a specification to a report, and what studies make of those."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from xllm_lab.candidate import Candidate, candidate
from xllm_lab.errors import ConfigError, PolicyError, RequestTooLargeError
from xllm_lab.formats import read_trace
from xllm_lab.metrics import Distribution, Summary, summarize
from xllm_lab.sim.calibrate import Calibration, read_calibration
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.tuning.evaluations import Report, Spec, checksum, code_version, inputs_of
from xllm_lab.tuning.tiers import Tiers, tiers_of
from xllm_lab.workload import Workload

# A configuration that cannot run violates by this much, so that a sampler learns to stay away from it.
CANNOT_RUN = 10.0
# The second axis that no run has to be made for.
COST = "cost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Goodput per device is sought: output tokens/s of requests that met every promise made to them, over devices.

    Attributes:
        min_slo_attainment_frac: of requests, on every workload; candidates below it are infeasible.
        limits: most that a metric may be on any workload, by its dotted name, as {"ttft_us.p99": 2e6}.
        second_axis: what is sought to be small beside: a metric, "tpot_us.p99" say, or "cost", the devices provided.

    Raises:
        ConfigError: a number out of range, or an unknown metric.
    """

    min_slo_attainment_frac: float = 0.0
    limits: Mapping[str, float] = field(default_factory=dict)
    second_axis: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_slo_attainment_frac <= 1:
            raise ConfigError(f"min_slo_attainment_frac is {self.min_slo_attainment_frac}, from 0 to 1 is accepted")
        for metric, most in self.limits.items():
            _refuse_unknown_metric(metric)
            if not most > 0:
                raise ConfigError(f"limit of {metric} is {most}, more than 0 is accepted")
        if self.second_axis not in (None, COST):
            _refuse_unknown_metric(str(self.second_axis))

    @property
    def directions(self) -> tuple[str, ...]:
        """As Optuna has them."""
        return ("maximize",) if self.second_axis is None else ("maximize", "minimize")

    def report(self, reports: Sequence[Report], num_workloads: int) -> Report:
        """Of a trial, from those of its evaluations: the mean of goodputs, and the worst of everything promised.

        Args:
            num_workloads: that a whole trial is evaluated on; fewer reports are one that was stopped early.

        Returns:
            {"goodput_per_s", "goodput_per_device_per_s": means over workloads, "by_workload_per_s": each, per device,
            "constraints": {name: at most 0 is kept}, "second": on the second axis, "extrapolated_frac": largest,
            "summaries": one per workload, "failure": None or why it cannot run, "category": of that, "is_whole"}.
        """
        failures = [r["failure"] for r in reports if r["failure"] is not None]
        whole = {"is_whole": len(reports) == num_workloads or bool(failures)}
        if failures:
            return {**whole, **self._failed(failures[0])}
        summaries = [r["summary"] for r in reports]
        goodputs = [float(s["goodput_per_s"]) for s in summaries]
        per_device = [g / r["num_devices"] for g, r in zip(goodputs, reports, strict=True)]
        return {
            **whole,
            "goodput_per_s": sum(goodputs) / len(goodputs),
            "goodput_per_device_per_s": sum(per_device) / len(per_device),
            "by_workload_per_s": per_device,
            "constraints": self._constraints(summaries),
            "second": self._second(reports),
            "extrapolated_frac": max(r["extrapolated_frac"] for r in reports),
            "summaries": summaries,
            "failure": None,
            "category": None,
        }

    def values(self, report: Report) -> list[float]:
        """What Optuna is told of a trial."""
        values = [float(report["goodput_per_device_per_s"])]
        return values if self.second_axis is None else [*values, float(report["second"])]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a study's specification."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"limits": dict(self.limits)}

    def _constraints(self, summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        attained = min(s["slo_attainment_frac"] for s in summaries)
        return {
            "runs": 0.0,
            "slo_attainment": self.min_slo_attainment_frac - attained,
            **{metric: max(_excess(s, metric, most) for s in summaries) for metric, most in self.limits.items()},
        }

    def _second(self, reports: Sequence[Report]) -> float | None:
        if self.second_axis is None:
            return None
        if self.second_axis == COST:
            return float(max(r["num_devices"] for r in reports))
        found = [metric_of(r["summary"], self.second_axis) for r in reports]
        return max((1e18 if value is None else value) for value in found)

    def _failed(self, failure: Mapping[str, str]) -> Report:
        names = ("runs", "slo_attainment", *self.limits)
        return {
            "goodput_per_s": 0.0,
            "goodput_per_device_per_s": 0.0,
            "by_workload_per_s": [],
            "constraints": dict.fromkeys(names, CANNOT_RUN),
            "second": None if self.second_axis is None else 1e18,
            "extrapolated_frac": 0.0,
            "summaries": [],
            "failure": f"{failure['category']}: {failure['reason']}",
            "category": failure["category"],
        }


def metric_of(summary: Mapping[str, Any], metric: str) -> float | None:
    """By its dotted name, of a summary as plain data; None where the run has none."""
    value: Any = summary
    for name in metric.split("."):
        value = None if value is None else value[name]
    return None if value is None else float(value)


def simulation(workload: str, calibration: str, tiers: Tiers, *, evaluator: str = "simulator") -> dict[str, Any]:
    """What all evaluations of a study on one workload have in common; with a "candidate", a specification.

    Args:
        workload, calibration: SHA-256 of what the files hold.
    """
    return {
        "evaluator": evaluator,
        "code": code_version(),
        "workload": workload,
        "calibration": calibration,
        **tiers.described(),
    }


def evaluate(job: dict[str, Any]) -> Report:
    """Simulate a candidate on a workload.

    Args:
        job: {"spec": see `simulation`, "inputs": {SHA-256: path}}.

    Returns:
        {"summary": metrics, "num_devices", "extrapolated_frac", "failure": None}; or no summary, and "failure" is
        {"category", "reason"}.
    """
    spec: Spec = job["spec"]
    chosen = candidate(spec["candidate"])
    try:
        calibration = _calibration(job["inputs"][spec["calibration"]])
        machine = tiers_of(spec).machine(calibration, chosen.policies)
        machine.refuse_if_not_priced(chosen.policies, chosen.instance)
        workload = _workload(job["inputs"][spec["workload"]])
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
    except (RequestTooLargeError, ConfigError, PolicyError, MemoryError) as error:
        return failed(type(error).__name__, " ".join(str(error).split()))
    num_instances = 1 if chosen.fleet is None else chosen.fleet.num_instances
    return {
        "summary": summarize(records).as_dict(),
        "num_devices": num_instances * int(machine.model.get("tensor_parallel", 1)),
        "extrapolated_frac": predicted.extrapolated_frac,
        "failure": None,
    }


def worth(
    one: Candidate,
    workloads: Sequence[Path],
    calibration: Path,
    *,
    tiers: Tiers | None = None,
    objective: Objective | None = None,
) -> Report:
    """What a study would report of a candidate, without one."""
    inputs = inputs_of([*workloads, calibration])
    *served, calibrated = (checksum(path.read_bytes()) for path in (*workloads, calibration))
    specs = [{**simulation(w, calibrated, tiers or Tiers()), "candidate": one.as_dict()} for w in served]
    reports = [evaluate({"spec": spec, "inputs": inputs}) for spec in specs]
    return (objective or Objective()).report(reports, len(reports))


def failed(category: str, reason: str) -> Report:
    """Of a candidate that cannot run."""
    failure = {"category": category, "reason": reason}
    return {"summary": None, "num_devices": 1, "extrapolated_frac": 0.0, "failure": failure}


def _excess(summary: Mapping[str, Any], metric: str, most: float) -> float:
    value = metric_of(summary, metric)
    return CANNOT_RUN if value is None else value / most - 1


def _refuse_unknown_metric(metric: str) -> None:
    name, _, of = metric.partition(".")
    plain = {f.name for f in fields(Summary) if "Distribution" not in str(f.type)}
    spread = {f.name for f in fields(Summary)} - plain
    quantiles = {f.name for f in fields(Distribution)}
    if not (name in plain and not of) and not (name in spread and of in quantiles):
        accepted = f"{', '.join(sorted(plain))}, or {', '.join(sorted(spread))} with .{', .'.join(sorted(quantiles))}"
        raise ConfigError(f"unknown metric {metric!r}; accepted: {accepted}")


@functools.lru_cache(maxsize=16)
def _workload(path: str) -> Workload:
    return read_trace(Path(path))


@functools.lru_cache(maxsize=4)
def _calibration(path: str) -> Calibration:
    return read_calibration(Path(path))
