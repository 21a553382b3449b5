"""Arrival processes: sorted, repeatable, of the rate and the irregularity that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workload_strategies import HOUR_US, plain_request, workloads
from xllm_lab.arrivals import gamma_bursts, poisson, rotated, uniform, with_arrivals
from xllm_lab.errors import ConfigError
from xllm_lab.workload import Workload

counts = st.integers(1, 200)
rates = st.floats(0.01, 1000)
seeds = st.integers(0, 2**63 - 1)
Process = Callable[[int, float, int], tuple[int, ...]]

PROCESSES: dict[str, Process] = {
    "uniform": lambda num, rate_per_s, seed: uniform(num, rate_per_s),
    "poisson": poisson,
    "gamma_bursts": lambda num, rate_per_s, seed: gamma_bursts(num, rate_per_s, 3.0, seed),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@every_process
@given(num=counts, rate_per_s=rates, seed=seeds)
def test_arrivals_start_at_zero_never_decrease_and_repeat(
    process: Process, num: int, rate_per_s: float, seed: int
) -> None:
    arrival_us = process(num, rate_per_s, seed)
    assert len(arrival_us) == num
    assert arrival_us[0] == 0
    assert all(earlier <= later for earlier, later in pairwise(arrival_us))
    assert all(type(us) is int for us in arrival_us)
    assert arrival_us == process(num, rate_per_s, seed)


@every_process
@given(num=counts, rate_per_s=rates, seed=seeds)
def test_twice_the_rate_is_half_of_every_time(process: Process, num: int, rate_per_s: float, seed: int) -> None:
    slow, fast = process(num, rate_per_s, seed), process(num, 2 * rate_per_s, seed)
    assert all(abs(s - 2 * f) <= 2 for s, f in zip(slow, fast, strict=True))


@pytest.mark.parametrize(("cv", "seed"), [(0.5, 1), (1.0, 2), (3.0, 3)])
def test_gamma_gaps_have_the_mean_and_the_variation_asked_for(cv: float, seed: int) -> None:
    gaps_us = np.diff(gamma_bursts(50_000, 4.0, cv, seed))
    assert gaps_us.mean() == pytest.approx(250_000, rel=0.05)
    assert gaps_us.std() / gaps_us.mean() == pytest.approx(cv, rel=0.05)


def test_poisson_gaps_vary_as_much_as_their_mean() -> None:
    gaps_us = np.diff(poisson(50_000, 4.0, seed=1))
    assert gaps_us.mean() == pytest.approx(250_000, rel=0.02)
    assert gaps_us.std() == pytest.approx(gaps_us.mean(), rel=0.02)


def test_uniform_arrivals_do_not_drift() -> None:
    """A third of a second is no whole number of microseconds; three of them are a second all the same."""
    assert uniform(7, 3.0) == (0, 333_333, 666_667, 1_000_000, 1_333_333, 1_666_667, 2_000_000)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: poisson(0, 1.0, seed=1), "num is 0, at least 1"),
        (lambda: uniform(3, 0.0), "rate_per_s is 0.0, a finite number above 0"),
        (lambda: poisson(3, float("inf"), seed=1), "rate_per_s is inf, a finite number above 0"),
        (lambda: gamma_bursts(3, 1.0, float("nan"), seed=1), "cv is nan, a finite number above 0"),
        (lambda: poisson(3, 1.0, seed=-1), "seed is -1, at least 0"),
    ],
)
def test_impossible_processes_are_refused_by_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert said in str(refused.value)


@given(workloads(), st.data())
def test_new_arrivals_change_nothing_but_times(workload: Workload, data: st.DataObject) -> None:
    num = len(workload.requests)
    arrival_us = sorted(data.draw(st.lists(st.integers(0, HOUR_US), min_size=num, max_size=num, unique=True)))
    moved = with_arrivals(workload, arrival_us)
    assert [r.arrival_us for r in moved.requests] == arrival_us
    back = [r.at(old.arrival_us) for r, old in zip(moved.requests, workload.requests, strict=True)]
    assert tuple(back) == workload.requests


def test_arrivals_must_fit_the_workload() -> None:
    workload = Workload(requests=(plain_request(0), plain_request(1)))
    with pytest.raises(ConfigError, match="3 arrivals for the 2 requests"):
        with_arrivals(workload, [0, 1, 2])
    with pytest.raises(ConfigError, match="from 5 us to 4 us"):
        with_arrivals(workload, [5, 4])


@given(st.integers(3, 40), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_rotated_arrivals_have_the_same_gaps_in_the_same_circle(num: int, seed: int, draw: int) -> None:
    """So rate, span and every burst but one stay as they were; seed 0 is the workload itself."""
    times = poisson(num, 3.0, draw)
    before = Workload(requests=tuple(replace(plain_request(i), arrival_us=us) for i, us in enumerate(times)))
    turned = rotated(before, seed)
    assert [r.id for r in turned.requests] == [r.id for r in before.requests]
    gaps, others = ([b - a for a, b in pairwise(r.arrival_us for r in w.requests)] for w in (before, turned))
    assert any(others == gaps[k:] + gaps[:k] for k in range(len(gaps)))
    assert (turned == before) or seed > 0
