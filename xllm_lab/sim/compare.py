"""How far the simulator is from the engine, beside how far the engine is from itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm_lab.errors import ConfigError
from xllm_lab.metrics import Summary, metric_value, summarize
from xllm_lab.runs import Run

_LATENCIES = ("ttft_us", "tpot_us", "itl_us", "e2e_us", "queue_us")
METRICS = (
    *(f"{latency}.{level}" for latency in _LATENCIES for level in ("p50", "p90")),
    "output_throughput_per_s",
    "goodput_per_s",
    "slo_attainment_frac",
    "prefix_hit_frac",
    "num_preemptions",
    "num_steps",
    "acceptance_length",
    "num_wasted_tokens",
)
ACCEPTED_ERROR_FRAC = 0.10
ACCEPTED_SPREADS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric.

    Attributes:
        engine: mean over the engine runs.
        spread_frac: (largest - smallest) / mean over the engine runs; `None` for a single run.
        error_frac: (simulated - engine) / engine; `None` if the engine's value is 0 and ours is not.
    """

    metric: str
    engine: float
    simulated: float
    spread_frac: float | None
    error_frac: float | None

    @property
    def is_within(self) -> bool:
        """Within 10 %, or within twice the engine's own spread."""
        if self.error_frac is None:
            return False
        return abs(self.error_frac) <= max(ACCEPTED_ERROR_FRAC, ACCEPTED_SPREADS * (self.spread_frac or 0.0))


def compare(simulated: Run, engine: Sequence[Run]) -> list[Row]:
    """Each metric of a simulated run against one or more engine runs of the same workload, policy and configuration.

    Raises:
        ConfigError: the runs are not of these hosts, or did not do the same thing.
    """
    if not engine:
        raise ConfigError("no engine runs to compare with; accepted: at least one")
    for run, host in ((simulated, "simulator"), *((r, "engine") for r in engine)):
        if run.manifest.host != host:
            raise ConfigError(f"{run.path}: is a {run.manifest.host} run; accepted here: a {host} run")
        for part in ("instance", "policies"):
            if getattr(run.manifest, part) != getattr(simulated.manifest, part):
                raise ConfigError(f"{run.path}: {part} differs from that of {simulated.path}; accepted: the same")
        if run.workload.requests != simulated.workload.requests:
            raise ConfigError(f"{run.path}: workload differs from that of {simulated.path}; accepted: the same")
    ours = summarize(simulated.records)
    theirs = [summarize(run.records) for run in engine]
    rows = (_row(metric, ours, theirs) for metric in METRICS)
    return [row for row in rows if row is not None]


def _row(metric: str, ours: Summary, theirs: Sequence[Summary]) -> Row | None:
    simulated = metric_value(ours, metric)
    measured = [value for s in theirs if (value := metric_value(s, metric)) is not None]
    if simulated is None or not measured:
        return None
    mean = sum(measured) / len(measured)
    spread = None
    if len(measured) > 1:
        spread = (max(measured) - min(measured)) / mean if mean else 0.0
    error = (simulated - mean) / mean if mean else (0.0 if simulated == 0 else None)
    return Row(metric=metric, engine=mean, simulated=simulated, spread_frac=spread, error_frac=error)
