"""Outages: given ones that cannot be are refused, and drawn ones follow their process."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.errors import ConfigError
from xllm_lab.outages import MOST_OUTAGES, FailureProcess, Outage, in_order, refuse_impossible
from xllm_lab.policies.routing import InstanceId

PROCESSES = st.builds(
    FailureProcess,
    mean_up_us=st.integers(1, 10_000),
    mean_repair_us=st.integers(1, 10_000),
    horizon_us=st.integers(1, 50_000),
    seed=st.integers(0, 5),
)


def outage(instance: int, start_us: int, end_us: int) -> Outage:
    return Outage(instance=InstanceId(instance), start_us=start_us, end_us=end_us)


@given(process=PROCESSES, num_instances=st.integers(1, 5))
def test_drawn_outages_are_possible(process: FailureProcess, num_instances: int) -> None:
    """They would be accepted from a file, are in order, and begin within the horizon."""
    drawn = process.outages(num_instances)
    refuse_impossible(drawn, num_instances)
    assert drawn == in_order(drawn)
    assert all(0 < o.start_us < process.horizon_us for o in drawn)


@given(process=PROCESSES, num_instances=st.integers(1, 5))
def test_a_larger_fleet_keeps_the_outages_of_a_smaller_one(process: FailureProcess, num_instances: int) -> None:
    """Two fleets can be compared under the same failures."""
    larger = process.outages(num_instances + 1)
    assert process.outages(num_instances) == tuple(o for o in larger if o.instance < num_instances)


@given(process=PROCESSES, more_us=st.integers(1, 50_000))
def test_a_longer_horizon_keeps_the_outages_of_a_shorter_one(process: FailureProcess, more_us: int) -> None:
    """So do two runs of unequal length."""
    longer = FailureProcess(
        mean_up_us=process.mean_up_us,
        mean_repair_us=process.mean_repair_us,
        horizon_us=process.horizon_us + more_us,
        seed=process.seed,
    )
    shorter = tuple(o for o in longer.outages(2) if o.start_us < process.horizon_us)
    assert process.outages(2) == shorter


def test_failures_and_repairs_take_the_times_they_should() -> None:
    """Of some 4,000 outages both means are within four standard errors: mean over root n, for exponential times."""
    process = FailureProcess(mean_up_us=900_000, mean_repair_us=100_000, horizon_us=1_000_000_000, seed=1)
    up_us, repair_us = [], []
    for instance in range(4):
        last_us = 0
        for o in (o for o in process.outages(4) if o.instance == instance):
            up_us.append(o.start_us - last_us)
            repair_us.append(o.end_us - o.start_us)
            last_us = o.end_us
    assert len(up_us) > 3_000
    for times_us, mean_us in ((up_us, 900_000), (repair_us, 100_000)):
        assert abs(sum(times_us) / len(times_us) - mean_us) < 4 * mean_us / math.sqrt(len(times_us))


def test_seeds_differ_and_instances_do_not_fail_together() -> None:
    """Or redundancy would be worth nothing."""
    process = FailureProcess(mean_up_us=1_000, mean_repair_us=1_000, horizon_us=20_000)
    other = FailureProcess(mean_up_us=1_000, mean_repair_us=1_000, horizon_us=20_000, seed=1)
    assert process.outages(2) != other.outages(2)
    first, second = ([o.start_us for o in process.outages(2) if o.instance == i] for i in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    ("outages", "said"),
    [
        ([outage(2, 0, 5)], "outage of instance 2, 0 to 1 is accepted"),
        ([outage(-1, 0, 5)], "outage of instance -1, 0 to 1 is accepted"),
        (
            [outage(1, 6, 9), outage(1, 0, 7)],
            "outage of instance 1: start_us is 6, more than 7, the end of the one before, is accepted",
        ),
        (
            [outage(1, 0, 7), outage(1, 7, 9)],
            "outage of instance 1: start_us is 7, more than 7, the end of the one before, is accepted",
        ),
    ],
    ids=["unknown instance", "negative instance", "overlap", "no time between"],
)
def test_impossible_outages_are_refused(outages: list[Outage], said: str) -> None:
    """In whichever order they are given."""
    with pytest.raises(ConfigError) as refused:
        refuse_impossible(outages, 2)
    assert str(refused.value) == said


def test_two_instances_may_be_down_together() -> None:
    """Overlap is a contradiction for one of them only."""
    refuse_impossible([outage(0, 0, 10), outage(1, 5, 7), outage(0, 11, 12)], 2)


def test_a_process_that_never_rests_is_refused() -> None:
    """Before it fills the memory."""
    process = FailureProcess(mean_up_us=1, mean_repair_us=1, horizon_us=10**12)
    with pytest.raises(ConfigError) as refused:
        process.outages(3)
    assert str(refused.value) == f"about 1500000000000 outages within horizon_us, at most {MOST_OUTAGES} is accepted"
