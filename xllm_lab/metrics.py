"""Every metric, defined once, of records in memory and of columns of a file.

Percentiles interpolate linearly between order statistics (numpy's default). Only requests that finished with all
their tokens count in latencies; the others are counted by reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from xllm_lab.copy_time import HOST_KINDS
from xllm_lab.exact_counts import ExactCounts
from xllm_lab.policies.cache import CopyKind
from xllm_lab.records import FinishReason, Records, RequestRecord, StepRecord
from xllm_lab.request_columns import Flags, Floats, Ints, RequestColumns, columns_of

SERVED = (FinishReason.LENGTH, FinishReason.STOP)
PERCENTILES = (50, 90, 99)

N = TypeVar("N", int, Floats)
N_co = TypeVar("N_co", int, Floats, covariant=True)


class Lived(Protocol[N_co]):
    """One request's record, or columns of many: the definitions below are of both."""

    @property
    def arrival_us(self) -> N_co: ...
    @property
    def first_scheduled_us(self) -> N_co | None: ...
    @property
    def first_token_us(self) -> N_co | None: ...
    @property
    def finish_us(self) -> N_co | None: ...


def is_served(request: RequestRecord) -> bool:
    return request.finish_reason in SERVED


def ttft_us(request: Lived[N]) -> N:
    """Time to first token: first_token - arrival."""
    assert request.first_token_us is not None
    return request.first_token_us - request.arrival_us


def tpot_us(request: RequestRecord) -> float | None:
    """Time per output token after the first: (last_token - first_token) / (output_tokens - 1); none for one token."""
    times = request.token_times_us
    return _tpot_us(times[0], times[-1], len(times)) if len(times) > 1 else None


def _tpot_us(first_us: Any, last_us: Any, output_tokens: Any) -> Any:
    return (last_us - first_us) / (output_tokens - 1)


def e2e_us(request: Lived[N]) -> N:
    """End to end: finish - arrival."""
    assert request.finish_us is not None
    return request.finish_us - request.arrival_us


def queue_us(request: Lived[N]) -> N:
    """Queue time: first_scheduled - arrival."""
    assert request.first_scheduled_us is not None
    return request.first_scheduled_us - request.arrival_us


def itl_us(requests: RequestColumns, chosen: Flags) -> Ints:
    """Inter-token latencies: differences of successive token times of the requests that are `chosen`."""
    between = np.diff(requests.token_times_us)
    is_first = np.zeros(len(requests.token_times_us) + 1, dtype=np.bool_)
    is_first[np.cumsum(requests.output_tokens)] = True
    return between[~is_first[1:-1] & requests.of_tokens(chosen)[1:]]


def meets_slo(requests: RequestColumns) -> Flags:
    """Served, with TTFT, TPOT and E2E each at most its promise. A missing promise is kept."""
    kept = np.isin(requests.finish_reason, SERVED)
    pairs = (
        (ttft_us(requests), requests.ttft_slo_us),
        (_tpots_us(requests), requests.tpot_slo_us),
        (e2e_us(requests), requests.e2e_slo_us),
    )
    for value, limit in pairs:
        kept &= ~(value > limit)  # nothing is more than NaN
    return kept


def _tpots_us(requests: RequestColumns) -> Floats:
    """NaN for less than two tokens."""
    num_tokens = np.where(requests.output_tokens > 1, requests.output_tokens, np.nan)
    times: Floats = _tpot_us(requests.first_token_us, requests.last_token_us, num_tokens)
    return times


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean and percentiles of one latency, microseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values: Iterable[float]) -> Distribution:
        """Of at least one value, in any order."""
        array = np.fromiter(values, dtype=np.float64)
        p50, p90, p99 = (float(p) for p in np.percentile(array, PERCENTILES))
        return Distribution(mean=math.fsum(array) / len(array), p50=p50, p90=p90, p99=p99)

    @staticmethod
    def of_counts(values: Ints, counts: Ints) -> Distribution:
        """Of values that came so often, in ascending order; at least one."""
        last = np.cumsum(counts)  # places of a value's last copy, from 1
        places = [(int(last[-1]) - 1) * (p / 100) for p in PERCENTILES]
        p50, p90, p99 = (_between(values, last, place) for place in places)
        return Distribution(mean=int(values @ counts) / int(last[-1]), p50=p50, p90=p90, p99=p99)


def _between(values: Ints, last: Ints, place: float) -> float:
    """The value at a place, from 0, between order statistics; rounded as numpy rounds it."""
    whole = math.floor(place)
    low, high = (float(values[np.searchsorted(last, k, side="right")]) for k in (whole, math.ceil(place)))
    part = place - whole
    return low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in numbers. Latencies are `None` when no request was served (or none had two tokens).

    Attributes:
        makespan_s: from the first arrival to the last finish.
        busy_frac: sum of step times / makespan; of a fleet, the sum over its instances.
        request_throughput_per_s: served requests / makespan.
        output_throughput_per_s: output tokens of served requests / makespan.
        goodput_per_s: output tokens of requests that met every promise / makespan.
        slo_attainment_frac: requests that met every promise / all requests.
        prefix_hit_frac: prompt tokens supplied by the prefix cache at first admission / prompt tokens of admitted
            requests.
        acceptance_length: mean tokens that a step with drafts draws for a request, as vLLM and xLLM count it; at least
            1. What speculation saves in steps; None without it.
        num_drafted_tokens, num_wasted_tokens: drafts that were verified, and those of them in vain.
        unused_page_frac: of mapped pages of virtual KV, those that no running request uses, mean over steps; this and
            the next three are None where KV is paged.
        unfilled_page_frac: of what the pages of running requests could hold, what is empty: internal fragmentation.
        page_reuse_frac: of the pages that requests began to need, those that were mapped already.
        map_frac: of the time of all steps, what they waited for pages.
        num_offloaded_tokens, num_restored_tokens: whose KV was copied from the device to the host, and back; None
            without tiers.
        num_saved_tokens, num_prefetched_tokens, num_pushed_tokens: from the host to the store, back, and from the
            device to the store; None without a store.
        num_handed_over: requests that one instance began and another went on with; None if there are none.
    """

    num_requests: int
    num_served: int
    num_cancelled: int
    num_rejected: int
    num_failed: int
    num_steps: int
    makespan_s: float
    busy_frac: float
    request_throughput_per_s: float
    output_throughput_per_s: float
    goodput_per_s: float
    slo_attainment_frac: float
    prefix_hit_frac: float
    num_preemptions: int
    acceptance_length: float | None
    num_drafted_tokens: int | None
    num_wasted_tokens: int | None
    unused_page_frac: float | None
    unfilled_page_frac: float | None
    page_reuse_frac: float | None
    map_frac: float | None
    num_offloaded_tokens: int | None
    num_restored_tokens: int | None
    num_saved_tokens: int | None
    num_prefetched_tokens: int | None
    num_pushed_tokens: int | None
    num_handed_over: int | None
    ttft_us: Distribution | None
    tpot_us: Distribution | None
    itl_us: Distribution | None
    e2e_us: Distribution | None
    queue_us: Distribution | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class PageSums(NamedTuple):
    """Sums over steps: columns of their records, and the pages that were mapped while they waited."""

    num_late_pages: int
    num_reused_pages: int
    mapped_tokens: int
    table_tokens: int
    kv_tokens: int
    map_us: int


def page_sums(steps: Iterable[StepRecord]) -> PageSums:
    """Of steps of virtual KV; of others there is nothing to add."""
    virtual = [s for s in steps if s.mapped_tokens is not None]
    counts = {name: sum(getattr(s, name) or 0 for s in virtual) for name in PageSums._fields[1:]}
    return PageSums(sum(sum(s.page_maps[3::4]) for s in virtual), **counts)


class Tally:
    """A run added up part by part, in any order: a few sums, and four numbers per served request."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._first_arrival_us = math.inf
        self._last_finish_us = -math.inf
        self._latencies: dict[str, list[Floats]] = {"ttft_us": [], "tpot_us": [], "e2e_us": [], "queue_us": []}
        self._itl_us = ExactCounts()
        self._copied: Counter[CopyKind] = Counter()

    def add_requests(self, requests: RequestColumns) -> None:
        """At least one."""
        served, good = np.isin(requests.finish_reason, SERVED), meets_slo(requests)
        admitted = ~np.isnan(requests.first_scheduled_us)
        self._first_arrival_us = min(self._first_arrival_us, float(requests.arrival_us.min()))
        self._last_finish_us = max(self._last_finish_us, float(np.fmax.reduce(requests.finish_us, initial=-np.inf)))
        self._sums.update(Counter(requests.finish_reason.tolist()))
        self._sums.update(
            requests=len(served),
            served=int(served.sum()),
            served_tokens=int(requests.output_tokens[served].sum()),
            good=int(good.sum()),
            good_tokens=int(requests.output_tokens[good].sum()),
            prompt_tokens=int(requests.prompt_tokens[admitted].sum()),
            cached_tokens=int(requests.cached_tokens[admitted].sum()),
            preemptions=int(requests.num_preemptions.sum()),
            verifications=requests.num_verifications,
            drafted=requests.num_drafted_tokens,
            accepted=requests.num_accepted_tokens,
            handed_over=requests.num_handed_over,
        )
        self._itl_us.add(itl_us(requests, served))
        for name, values in (
            ("ttft_us", ttft_us(requests)),
            ("tpot_us", _tpots_us(requests)),
            ("e2e_us", e2e_us(requests)),
            ("queue_us", queue_us(requests)),
        ):
            # Of one token there is no TPOT, though it is served.
            self._latencies[name].append(values[served & ~np.isnan(values)])

    def add_steps(self, num_steps: int, busy_us: int) -> None:
        """Steps that took so long in all."""
        self._sums.update(steps=num_steps, busy_us=busy_us)

    def add_pages(self, pages: PageSums) -> None:
        """What these steps had of virtual KV."""
        self._sums.update(pages._asdict())

    def add_copies(self, num_tokens: Mapping[CopyKind, int]) -> None:
        """Copies between tiers, and whose KV they moved; with the store's kinds where there is one."""
        self._copied.update(num_tokens)

    def summary(self) -> Summary:
        """All metrics; at least one request has been added."""
        sums = self._sums
        span_us = max(0.0, self._last_finish_us - self._first_arrival_us)  # nothing has finished: none
        return Summary(
            num_requests=sums["requests"],
            num_served=sums["served"],
            num_cancelled=sums[FinishReason.CANCELLED],
            num_rejected=sums[FinishReason.REJECTED],
            num_failed=sums[FinishReason.FAILED],
            num_steps=sums["steps"],
            makespan_s=span_us / 1e6,
            busy_frac=_ratio(sums["busy_us"], span_us),
            request_throughput_per_s=_ratio(sums["served"] * 1e6, span_us),
            output_throughput_per_s=_ratio(sums["served_tokens"] * 1e6, span_us),
            goodput_per_s=_ratio(sums["good_tokens"] * 1e6, span_us),
            slo_attainment_frac=sums["good"] / sums["requests"],
            prefix_hit_frac=_ratio(sums["cached_tokens"], sums["prompt_tokens"]),
            num_preemptions=sums["preemptions"],
            acceptance_length=1 + sums["accepted"] / sums["verifications"] if sums["verifications"] else None,
            num_drafted_tokens=sums["drafted"] if sums["verifications"] else None,
            num_wasted_tokens=sums["drafted"] - sums["accepted"] if sums["verifications"] else None,
            **self._pages(),
            num_offloaded_tokens=self._copied.get("offload"),
            num_restored_tokens=self._copied.get("restore"),
            num_saved_tokens=self._copied.get("save"),
            num_prefetched_tokens=self._copied.get("prefetch"),
            num_pushed_tokens=self._copied.get("push"),
            num_handed_over=sums["handed_over"] or None,
            itl_us=self._itl(),
            **self._distributions(),
        )

    def _distributions(self) -> dict[str, Any]:
        return {name: self._distribution(parts) for name, parts in self._latencies.items()}

    def _pages(self) -> dict[str, Any]:
        sums, names = self._sums, ("unused_page_frac", "unfilled_page_frac", "page_reuse_frac", "map_frac")
        if not sums["mapped_tokens"]:
            return dict.fromkeys(names)
        values = (
            1 - sums["table_tokens"] / sums["mapped_tokens"],
            1 - _ratio(sums["kv_tokens"], sums["table_tokens"]),
            _ratio(sums["num_reused_pages"], sums["num_reused_pages"] + sums["num_late_pages"]),
            _ratio(sums["map_us"], sums["busy_us"]),
        )
        return dict(zip(names, values, strict=True))

    def _itl(self) -> Distribution | None:
        values, counts = self._itl_us.in_order()
        return Distribution.of_counts(values, counts) if len(values) else None

    def _distribution(self, parts: list[Floats]) -> Distribution | None:
        values = np.concatenate(parts)
        return Distribution.of(values) if len(values) else None


def summarize(records: Records) -> Summary:
    """All metrics of a run that has at least one request. `summary_of_run` has those of a run that is too large."""
    tally = Tally()
    for requests in columns_of(records.requests):
        tally.add_requests(requests)
    if records.spans:  # steps that nobody asked for are not made
        steps_us = [(len(s.ends_us), s.ends_us[-1] - s.start_us) for s in records.spans]
    else:
        steps_us = [(1, s.step_us) for s in records.steps]
    tally.add_steps(sum(num for num, _ in steps_us), sum(us for _, us in steps_us))
    if not records.spans or any(s.pages is not None for s in records.spans):
        tally.add_pages(page_sums(records.steps))
    if records.copies:
        tally.add_copies(moved_tokens((c.kind, c.num_moved_tokens) for c in records.copies))
    return tally.summary()


def moved_tokens(copies: Iterable[tuple[CopyKind, int | None]]) -> Counter[CopyKind]:
    """By kind, whose KV was moved: by copies that are over, of (kind, tokens)."""
    moved: Counter[CopyKind] = Counter(dict.fromkeys(HOST_KINDS, 0))
    for kind, num_tokens in copies:
        moved[kind] += num_tokens or 0
    return moved


def metric_value(summary: Summary, metric: str) -> float | None:
    """A metric by its dotted name, `ttft_us.p50` or `goodput_per_s`; None where the run has none."""
    value: Any = summary
    for name in metric.split("."):
        value = None if value is None else getattr(value, name)
    return None if value is None else float(value)


def _ratio(amount: float, whole: float) -> float:
    return amount / whole if whole else 0.0
