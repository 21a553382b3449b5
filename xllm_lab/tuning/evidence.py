"""What paired replays say, worked out from their records: gain, noise, promises kept, tokens changed, warm-up.

Default and candidate meet the same arrivals, so requests are paired. `verify` writes down what it finds here, and
`promote` works it out again from the runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xllm_lab.errors import ConfigError
from xllm_lab.metrics import Summary, is_served, metric_value, summarize, tpot_us, ttft_us
from xllm_lab.records import Records, RequestRecord
from xllm_lab.tuning.bootstrap import LEVELS, Difference, PairedBootstrap
from xllm_lab.tuning.gain import Gain, paired_gain
from xllm_lab.tuning.warm_up import after, num_warm_up
from xllm_lab.workload import Workload

PROMISES = ("ttft", "tpot", "e2e")
# What is predicted and measured: what is paid for, and what promises are about.
METRICS = (
    "goodput_per_s",
    "output_throughput_per_s",
    *(f"{latency}_us.p{level}" for latency in ("ttft", "tpot") for level in LEVELS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Of a default and a candidate, repeat by repeat, without warm-up.

    Attributes:
        default, tuned: one summary a repeat.
        num_warm_up: requests left out, a repeat; None where the hit rate never became stationary, and none are.
        gain: of goodput.
        bootstrap_frac: a 95 % interval of that gain which also draws requests; None if the default may have none.
        noise_frac: root mean square of what the default's goodput differs by when replayed again on the same
            arrivals, relative to it; None if it was not.
        differences: of latencies' percentiles, by metric.
        worst_kept_frac: of each promise that was made, the fraction of requests for which the candidate kept it, at
            the repeat where it kept fewest.
        num_changed_outputs: greedy requests to which the candidate gave other tokens than the default.
    """

    default: tuple[Summary, ...]
    tuned: tuple[Summary, ...]
    num_warm_up: tuple[int | None, ...]
    gain: Gain
    bootstrap_frac: tuple[float, float] | None
    noise_frac: float | None
    differences: dict[str, Difference]
    worst_kept_frac: dict[str, float]
    num_changed_outputs: int

    @property
    def counted_from(self) -> tuple[int, ...]:
        """First request that counts, in order of arrival, a repeat."""
        return tuple(num or 0 for num in self.num_warm_up)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for people and manifests."""
        return {**asdict(self), "least_gain_frac": self.least_gain_frac}

    @property
    def least_gain_frac(self) -> float | None:
        """The gain is above this: the lower of two lower bounds, as three pairs are few, and requests share queues."""
        if self.gain.low_frac is None or self.bootstrap_frac is None:
            return None
        return min(self.gain.low_frac, self.bootstrap_frac[0])


def evidence(
    default: Sequence[Records],
    tuned: Sequence[Records],
    workloads: Sequence[Workload],
    again: Mapping[int, Records] | None = None,
) -> Evidence:
    """Of repeats.

    Args:
        default, tuned: one run a repeat, at least two, of the same requests.
        workloads: that were replayed, one a repeat.
        again: further runs of the default, by the repeat whose arrivals they had.

    Raises:
        ConfigError: fewer than two repeats, or paired runs that did not serve the same requests.
    """
    again = again or {}
    if not 2 <= len(default) == len(tuned) == len(workloads):
        raise ConfigError(
            f"{len(default)} and {len(tuned)} runs of {len(workloads)} workloads; accepted: as many of each, at least 2"
        )
    for one, other in (*zip(default, tuned, strict=True), *((default[k], run) for k, run in again.items())):
        if [(r.id, r.arrival_us) for r in one.requests] != [(r.id, r.arrival_us) for r in other.requests]:
            raise ConfigError("paired runs served other requests, or at other times; accepted: the same")
    warm_up = [_warm_up(*pair) for pair in zip(default, tuned, strict=True)]
    theirs, ours = ([warm(run, num or 0) for run, num in zip(runs, warm_up, strict=True)] for runs in (default, tuned))
    of_default, of_tuned = (tuple(summarize(run) for run in runs) for runs in (theirs, ours))
    drawn = PairedBootstrap(theirs, ours)
    once_more = {k: warm(run, warm_up[k] or 0) for k, run in again.items()}
    return Evidence(
        default=of_default,
        tuned=of_tuned,
        num_warm_up=tuple(warm_up),
        gain=paired_gain([s.goodput_per_s for s in of_default], [s.goodput_per_s for s in of_tuned]),
        bootstrap_frac=drawn.gain(),
        noise_frac=_noise([(of_default[k], summarize(run)) for k, run in once_more.items()]),
        differences=drawn.differences(),
        worst_kept_frac=_worst_kept([run.requests for run in ours]),
        num_changed_outputs=sum(map(_num_changed, default, tuned, workloads)),
    )


def warm(run: Records, num_warm_up: int) -> Records:
    """The requests that count."""
    return Records(after(run.requests, num_warm_up), run.steps) if num_warm_up else run


def mean_metrics(summaries: Sequence[Summary]) -> dict[str, float]:
    """Means over runs, of those of `METRICS` that every run has."""
    found = {}
    for metric in METRICS:
        values = [value for s in summaries if (value := metric_value(s, metric)) is not None]
        if len(values) == len(summaries):
            found[metric] = math.fsum(values) / len(values)
    return found


def _warm_up(one: Records, other: Records) -> int | None:
    """The larger of both: pairs must count the same requests."""
    found = [num_warm_up(run.requests) for run in (one, other)]
    return None if None in found else max(num for num in found if num is not None)


def _noise(pairs: Sequence[tuple[Summary, Summary]]) -> float | None:
    relative = []
    for one, other in pairs:
        mean = (one.goodput_per_s + other.goodput_per_s) / 2
        relative.append((other.goodput_per_s - one.goodput_per_s) / mean if mean else 0.0)
    return math.sqrt(sum(r * r for r in relative) / len(relative)) if relative else None


def _num_changed(default: Records, tuned: Records, workload: Workload) -> int:
    """Greedy requests that both served, and to which they gave other tokens."""
    greedy = {r.id for r in workload.requests if r.sampling.temperature == 0}
    return sum(
        one.output_token_ids != other.output_token_ids
        for one, other in zip(default.requests, tuned.requests, strict=True)
        if one.id in greedy and is_served(one) and is_served(other)
    )


def _worst_kept(runs: Sequence[Sequence[RequestRecord]]) -> dict[str, float]:
    found = {}
    for promise in PROMISES:
        kept = [frac for run in runs if (frac := _kept_frac(run, promise)) is not None]
        if kept:
            found[promise] = min(kept)
    return found


def _kept_frac(requests: Sequence[RequestRecord], promise: str) -> float | None:
    """Of those to whom it was made; None if it was to nobody. Who was not served was promised in vain."""
    promised = [(r, limit_us) for r in requests if (limit_us := getattr(r, f"{promise}_slo_us")) is not None]
    kept = [is_served(r) and _latency_us(r, promise) <= limit_us for r, limit_us in promised]
    return sum(kept) / len(kept) if kept else None


def _latency_us(request: RequestRecord, promise: str) -> float:
    """0 for the TPOT of a single token."""
    assert request.finish_us is not None
    if promise == "e2e":
        return request.finish_us - request.arrival_us
    return ttft_us(request) if promise == "ttft" else tpot_us(request) or 0.0
