"""Every metric, defined once, as a pure function of records.

Percentiles interpolate linearly between order statistics (numpy's default). Only requests that finished with all
their tokens count in latencies; the others are counted by reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from xllm_lab.records import FinishReason, Records, RequestRecord

SERVED = (FinishReason.LENGTH, FinishReason.STOP)
PERCENTILES = (50, 90, 99)


def is_served(request: RequestRecord) -> bool:
    return request.finish_reason in SERVED


def ttft_us(request: RequestRecord) -> int:
    """Time to first token: first_token - arrival."""
    assert request.first_token_us is not None
    return request.first_token_us - request.arrival_us


def tpot_us(request: RequestRecord) -> float | None:
    """Time per output token after the first: (last_token - first_token) / (output_tokens - 1); none for one token."""
    times = request.token_times_us
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def itl_us(request: RequestRecord) -> list[int]:
    """Inter-token latencies: differences of successive token times."""
    times = request.token_times_us
    return [b - a for a, b in pairwise(times)]


def e2e_us(request: RequestRecord) -> int:
    """End to end: finish - arrival."""
    assert request.finish_us is not None
    return request.finish_us - request.arrival_us


def queue_us(request: RequestRecord) -> int:
    """Queue time: first_scheduled - arrival."""
    assert request.first_scheduled_us is not None
    return request.first_scheduled_us - request.arrival_us


def meets_slo(request: RequestRecord) -> bool:
    """Served, with TTFT, TPOT and E2E each at most its promise. A missing promise is kept."""
    if not is_served(request):
        return False
    pairs = (
        (ttft_us(request), request.ttft_slo_us),
        (tpot_us(request), request.tpot_slo_us),
        (e2e_us(request), request.e2e_slo_us),
    )
    return all(value is None or limit is None or value <= limit for value, limit in pairs)


def makespan_us(records: Records) -> int:
    """From the first arrival to the last finish."""
    ends = [r.finish_us for r in records.requests if r.finish_us is not None]
    return max(ends) - min(r.arrival_us for r in records.requests) if ends else 0


def output_throughput_per_s(records: Records) -> float:
    """Output tokens of served requests / makespan."""
    return _per_s(sum(r.output_tokens for r in records.requests if is_served(r)), makespan_us(records))


def request_throughput_per_s(records: Records) -> float:
    """Served requests / makespan."""
    return _per_s(sum(is_served(r) for r in records.requests), makespan_us(records))


def goodput_per_s(records: Records) -> float:
    """Output tokens of requests that met every promise / makespan."""
    return _per_s(sum(r.output_tokens for r in records.requests if meets_slo(r)), makespan_us(records))


def slo_attainment_frac(records: Records) -> float:
    """Requests that met every promise / all requests."""
    return sum(meets_slo(r) for r in records.requests) / len(records.requests)


def prefix_hit_frac(records: Records) -> float:
    """Prompt tokens supplied by the prefix cache at first admission / prompt tokens of admitted requests."""
    admitted = [r for r in records.requests if r.first_scheduled_us is not None]
    prompt_tokens = sum(r.prompt_tokens for r in admitted)
    return sum(r.cached_tokens for r in admitted) / prompt_tokens if prompt_tokens else 0.0


def num_preemptions(records: Records) -> int:
    return sum(r.num_preemptions for r in records.requests)


def busy_frac(records: Records) -> float:
    """Sum of step times / makespan."""
    span = makespan_us(records)
    return sum(s.step_us for s in records.steps) / span if span else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean and percentiles of one latency, microseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values: Iterable[float]) -> Distribution:
        """Of at least one value."""
        array = np.fromiter(values, dtype=np.float64)
        p50, p90, p99 = (float(np.percentile(array, p)) for p in PERCENTILES)
        return Distribution(mean=float(array.mean()), p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in numbers. Latencies are `None` when no request was served (or none had two tokens)."""

    num_requests: int
    num_served: int
    num_cancelled: int
    num_rejected: int
    num_steps: int
    makespan_s: float
    busy_frac: float
    request_throughput_per_s: float
    output_throughput_per_s: float
    goodput_per_s: float
    slo_attainment_frac: float
    prefix_hit_frac: float
    num_preemptions: int
    ttft_us: Distribution | None
    tpot_us: Distribution | None
    itl_us: Distribution | None
    e2e_us: Distribution | None
    queue_us: Distribution | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(records: Records) -> Summary:
    """All metrics of a run that has at least one request."""
    served = [r for r in records.requests if is_served(r)]
    reasons = [r.finish_reason for r in records.requests]
    return Summary(
        num_requests=len(records.requests),
        num_served=len(served),
        num_cancelled=reasons.count(FinishReason.CANCELLED),
        num_rejected=reasons.count(FinishReason.REJECTED),
        num_steps=len(records.steps),
        makespan_s=makespan_us(records) / 1e6,
        busy_frac=busy_frac(records),
        request_throughput_per_s=request_throughput_per_s(records),
        output_throughput_per_s=output_throughput_per_s(records),
        goodput_per_s=goodput_per_s(records),
        slo_attainment_frac=slo_attainment_frac(records),
        prefix_hit_frac=prefix_hit_frac(records),
        num_preemptions=num_preemptions(records),
        ttft_us=_distribution([float(ttft_us(r)) for r in served]),
        tpot_us=_distribution([t for r in served if (t := tpot_us(r)) is not None]),
        itl_us=_distribution([float(t) for r in served for t in itl_us(r)]),
        e2e_us=_distribution([float(e2e_us(r)) for r in served]),
        queue_us=_distribution([float(queue_us(r)) for r in served]),
    )


def metric_value(summary: Summary, metric: str) -> float | None:
    """A metric by its dotted name, `ttft_us.p50` or `goodput_per_s`; None where the run has none."""
    value: Any = summary
    for name in metric.split("."):
        value = None if value is None else getattr(value, name)
    return None if value is None else float(value)


def _distribution(values: Sequence[float]) -> Distribution | None:
    return Distribution.of(values) if values else None


def _per_s(amount: float, span_us: int) -> float:
    return amount * 1e6 / span_us if span_us else 0.0
