"""Each metric against an example small enough to compute by hand."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.small_runs import batch_policies, busy_workloads, run, tight_configs
from xllm_lab import metrics
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPolicy, RequestId
from xllm_lab.records import FinishReason, Records, RequestRecord, StepRecord
from xllm_lab.workload import Workload


def record(request_id: int, times_us: list[int], **changes: Any) -> RequestRecord:
    """A request of 8 prompt tokens that arrived at 100, was first scheduled at 110 and ended with its last token."""
    usual: dict[str, Any] = {
        "arrival_us": 100,
        "prompt_tokens": 8,
        "priority": 2,
        "ttft_slo_us": None,
        "tpot_slo_us": None,
        "e2e_slo_us": None,
        "first_scheduled_us": 110,
        "finish_us": times_us[-1] if times_us else None,
        "finish_reason": FinishReason.LENGTH,
    }
    return RequestRecord(id=RequestId(request_id), token_times_us=array("q", times_us), **{**usual, **changes})


def step(index: int, start_us: int, end_us: int) -> StepRecord:
    return StepRecord(
        step=index,
        start_us=start_us,
        end_us=end_us,
        ids=[0],
        num_tokens=[1],
        num_computed_tokens=[0],
        num_logits=1,
        admitted=[],
        preempted=[],
        num_waiting=0,
        num_used_blocks=1,
        num_idle_blocks=0,
        reason="",
    )


# Tokens at 130, 150 and 190: TTFT 30, TPOT (190 - 130) / 2 = 30, gaps of 20 and 40, 90 in all, 10 in the queue.
SERVED = record(0, [130, 150, 190])
# A single token, of which half the prompt was cached: no time per output token.
SHORT = record(1, [120], cached_tokens=4, finish_reason=FinishReason.STOP, num_preemptions=2)
CANCELLED = record(2, [140], finish_us=1100, finish_reason=FinishReason.CANCELLED)
REJECTED = record(3, [], arrival_us=300, first_scheduled_us=None, finish_us=300, finish_reason=FinishReason.REJECTED)
FAILED = record(4, [140], finish_us=1100, finish_reason=FinishReason.FAILED)
RUN = Records([SERVED, SHORT, CANCELLED, REJECTED], [step(0, 110, 140), step(1, 140, 360)])


def test_latencies_of_one_request() -> None:
    """Each from the times in its record."""
    assert metrics.ttft_us(SERVED) == 30
    assert metrics.tpot_us(SERVED) == 30.0
    assert metrics.e2e_us(SERVED) == 90
    assert metrics.queue_us(SERVED) == 10


def test_one_token_has_no_time_per_output_token() -> None:
    """There is nothing after the first."""
    summary = metrics.summarize(Records([SHORT]))
    assert (metrics.tpot_us(SHORT), summary.tpot_us, summary.itl_us) == (None, None, None)


@pytest.mark.parametrize(
    ("promise", "kept"),
    [
        ({}, True),
        ({"ttft_slo_us": 30}, True),
        ({"ttft_slo_us": 29}, False),
        ({"tpot_slo_us": 30}, True),
        ({"tpot_slo_us": 29}, False),
        ({"e2e_slo_us": 90}, True),
        ({"e2e_slo_us": 89}, False),
        ({"ttft_slo_us": 30, "tpot_slo_us": 30, "e2e_slo_us": 89}, False),
    ],
)
def test_a_promise_is_kept_to_the_microsecond(promise: dict[str, int], kept: bool) -> None:
    """At most what was promised, each of them; what was not promised is kept."""
    summary = metrics.summarize(Records([record(0, [130, 150, 190], **promise)]))
    assert summary.slo_attainment_frac == kept


def test_whoever_was_not_served_met_no_promise() -> None:
    """Even if nothing was promised."""
    summary = metrics.summarize(Records([CANCELLED, REJECTED, FAILED]))
    assert (summary.slo_attainment_frac, summary.goodput_per_s) == (0, 0)


def test_the_makespan_is_from_first_arrival_to_last_finish() -> None:
    """Cancelled requests end too."""
    assert metrics.summarize(RUN).makespan_s == 0.001


def test_rates_are_per_second_of_makespan() -> None:
    """Four tokens of two served requests in 1000 us; the cancelled one's token is nobody's."""
    assert metrics.summarize(RUN).output_throughput_per_s == 4 * 1000
    assert metrics.summarize(RUN).request_throughput_per_s == 2 * 1000


def test_goodput_counts_tokens_of_kept_promises() -> None:
    """The three tokens of a broken promise do not count."""
    late = Records([record(0, [130, 150, 190], ttft_slo_us=29), SHORT, CANCELLED, REJECTED])
    assert metrics.summarize(RUN).goodput_per_s == 4 * 1000
    assert metrics.summarize(late).goodput_per_s == 1 * 1000
    assert metrics.summarize(late).slo_attainment_frac == 1 / 4


def test_prefix_hits_are_a_fraction_of_admitted_prompts() -> None:
    """Four of the 24 prompt tokens of three admitted requests."""
    assert metrics.summarize(RUN).prefix_hit_frac == 4 / 24


def test_busy_is_time_in_steps() -> None:
    """250 of 1000 us."""
    assert metrics.summarize(RUN).busy_frac == 0.25


def test_a_distribution_interpolates_between_order_statistics() -> None:
    """The 90th percentile of 0, 10, ..., 100 is 90; of two values, nine tenths of the way."""
    assert metrics.Distribution.of(range(0, 101, 10)) == metrics.Distribution(mean=50, p50=50, p90=90, p99=99)
    assert metrics.Distribution.of([0, 10]).p90 == 9


def test_a_summary_is_all_of_them() -> None:
    """Latencies are those of served requests alone."""
    summary = metrics.summarize(RUN)
    counts = (summary.num_requests, summary.num_served, summary.num_cancelled, summary.num_rejected, summary.num_steps)
    assert counts == (4, 2, 1, 1, 2)
    assert (summary.makespan_s, summary.num_preemptions) == (0.001, 2)
    assert summary.ttft_us == metrics.Distribution.of([30, 20])
    assert summary.tpot_us == metrics.Distribution.of([30])
    assert summary.itl_us == metrics.Distribution.of([20, 40])
    assert summary.e2e_us == metrics.Distribution.of([90, 20])
    assert summary.queue_us == metrics.Distribution.of([10, 10])


def test_a_run_that_serves_nobody_has_no_latencies() -> None:
    """And rates of 0, not an error."""
    summary = metrics.summarize(Records([REJECTED]))
    assert (summary.ttft_us, summary.tpot_us, summary.e2e_us) == (None, None, None)
    assert (summary.output_throughput_per_s, summary.prefix_hit_frac, summary.busy_frac) == (0.0, 0.0, 0.0)


@given(busy_workloads(), tight_configs(), batch_policies())
def test_metrics_agree_with_one_another(workload: Workload, config: InstanceConfig, policy: BatchPolicy) -> None:
    """Every request ends in one way; fractions are fractions; nothing good exceeds the whole."""
    records = run(workload, config, policy)
    summary = metrics.summarize(records)
    assert (
        summary.num_served + summary.num_cancelled + summary.num_rejected + summary.num_failed == summary.num_requests
    )
    assert 0 <= summary.goodput_per_s <= summary.output_throughput_per_s
    assert 0 <= summary.slo_attainment_frac <= summary.num_served / summary.num_requests
    assert 0 <= summary.prefix_hit_frac < 1
    assert 0 <= summary.busy_frac <= 1 + 1e-9
    for request in filter(metrics.is_served, records.requests):
        itl_us = np.diff(request.token_times_us).tolist()
        first_us, rest_us = metrics.ttft_us(request), sum(itl_us)
        assert metrics.e2e_us(request) == first_us + rest_us
        assert metrics.queue_us(request) < first_us
        if (tpot_us := metrics.tpot_us(request)) is not None:
            assert np.isclose(tpot_us, np.mean(itl_us))
