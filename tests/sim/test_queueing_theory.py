"""Against closed forms: waits of single servers at any load, Little's law, batches, and closed loops.

Seeds are 0, 1, 2, ...; an interval of 99 % is wrong about once in a hundred laws. `benchmarks/queueing_theory.py` does
the same with narrower ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from xllm_lab.sim.queueing_theory import (
    US_PER_TOKEN,
    Estimate,
    Fixed,
    Memoryless,
    PerStep,
    PerToken,
    Service,
    TwoLengths,
    bus,
    bus_wait_us,
    mean_wait_us,
    num_by_little,
    num_left_behind,
    queue,
    served,
    waits_us,
)
from xllm_lab.workload import ClosedLoop, Prompt, Request, RequestId, Workload

SERVICES = (Fixed(), Memoryless(), TwoLengths())
# Many short runs and not few long ones: near saturation the mean wait of a run is so skewed that twenty are no sample.
NUM_RUNS = 100
# Requests a run.
LOADS = {0.3: 40, 0.6: 60, 0.8: 100, 0.95: 250}


def named(value: object) -> str:
    return str(value) if isinstance(value, float) else type(value).__name__


@pytest.mark.parametrize("service", SERVICES, ids=named)
@pytest.mark.parametrize("utilisation", LOADS)
def test_mean_wait_is_pollaczeks_and_khinchines(service: Service, utilisation: float) -> None:
    """M/D/1, M/M/1 and M/G/1. The interval is narrow enough to tell one from another."""
    runs = (queue(service, utilisation, LOADS[utilisation], seed) for seed in range(NUM_RUNS))
    waits = [waits_us(served(run, PerToken(), max_seqs_per_batch=1)) for run in runs]
    got, expected = Estimate.of([float(w.mean()) for w in waits]), mean_wait_us(service, utilisation)
    assert got.holds(expected), f"{got} us, theory says {expected:.0f} us"
    assert got.half_width < 0.35 * expected


@pytest.mark.parametrize("service", SERVICES, ids=named)
def test_each_wait_is_lindleys(service: Service) -> None:
    """W' = max(0, W + service - gap), exactly, to the microsecond: no interval hides an error of one step."""
    workload = queue(service, 0.95, 2000, 7)
    arrival = np.asarray([r.arrival_us for r in workload.requests])
    length = np.asarray([r.prompt.num_tokens for r in workload.requests]) * US_PER_TOKEN
    wait = [0]
    for gap, before in zip(np.diff(arrival), length[:-1], strict=True):
        wait.append(max(0, wait[-1] + before - gap))
    assert waits_us(served(workload, PerToken(), max_seqs_per_batch=1)).tolist() == wait[-2000:]


@pytest.mark.parametrize("service", SERVICES, ids=named)
def test_services_have_the_moments_they_state(service: Service) -> None:
    """And what is found in service is longer: its mean is E[S^2] / E[S]."""
    rng, count = np.random.default_rng(1), 100_000
    drawn, found = service.draw(rng, count), service.draw_by_length(rng, count)
    assert min(drawn.min(), found.min()) >= 1
    assert drawn.mean() == pytest.approx(service.mean, rel=0.03)
    assert (drawn.astype(float) ** 2).mean() == pytest.approx(service.mean_square, rel=0.05)
    assert found.mean() == pytest.approx(service.mean_square / service.mean, rel=0.03)


@pytest.mark.parametrize("utilisation", [0.3, 0.8])
def test_littles_law_joins_steps_and_requests(utilisation: float) -> None:
    """Requests in the system, as the steps' records tell, are arrivals per time times time in the system.

    In runs long enough that their last requests, behind which nobody comes, hardly count.
    """
    service = Memoryless()
    runs = [served(queue(service, utilisation, 400, seed), PerToken(), max_seqs_per_batch=1) for seed in range(20)]
    from_steps, from_requests = [num_left_behind(r) for r in runs], [num_by_little(r) for r in runs]
    difference = Estimate.of([a - b for a, b in zip(from_steps, from_requests, strict=True)])
    assert abs(difference.mean) <= difference.half_width
    num_waiting = mean_wait_us(service, utilisation) / US_PER_TOKEN * utilisation / service.mean
    left = Estimate.of(from_steps)
    assert abs(left.mean - (num_waiting + utilisation)) <= left.half_width
    assert difference.half_width < 0.7 * left.half_width


@pytest.mark.parametrize("rate_per_step", [0.2, 1.0, 4.0])
def test_a_step_that_takes_all_who_wait_is_a_bus(rate_per_step: float) -> None:
    """A batch without limit is never overloaded: four arrivals a step wait little more than half a step."""
    step_us = 10_000
    runs = [
        served(bus(rate_per_step, step_us, 500, seed), PerStep(step_us), max_seqs_per_batch=10_000)
        for seed in range(20)
    ]
    got = Estimate.of([float(waits_us(r).mean()) for r in runs])
    expected = bus_wait_us(rate_per_step, step_us)
    assert got.holds(expected), f"{got} us, theory says {expected:.0f} us"
    assert got.half_width < 0.05 * step_us
    # While busy, steps take what came during the one before; each first step after an idle time takes one request.
    sizes = [len(s.ids) for r in runs for s in r.steps]
    busy = np.exp(rate_per_step)
    assert np.mean(sizes) == pytest.approx((rate_per_step * busy + 1) / busy, rel=0.05)


@pytest.mark.parametrize("num_clients", [1, 3, 4, 9])
def test_a_closed_loop_is_as_fast_as_its_bottleneck(num_clients: int) -> None:
    """With equal services D and thinking times Z each takes max(D, N D - Z): Denning and Buzen's bound (1978)."""
    service_us, think_us = 1000, 2500
    workload = _equal_requests(200, prompt=service_us // US_PER_TOKEN, output=1)
    looped = replace(workload, closed_loop=ClosedLoop(num_clients=num_clients, think_us=think_us))
    records = served(looped, PerToken(), max_seqs_per_batch=1)
    last = sorted(records.requests, key=lambda r: r.finish_us or 0)[100:-num_clients]
    expected = max(service_us, num_clients * service_us - think_us)
    assert {(r.finish_us or 0) - r.arrival_us for r in last} == {expected}


def test_clients_in_lockstep_share_their_steps() -> None:
    """Eight clients, one batch: each round is one step of all prompts and one of all tokens for each token more."""
    num_clients, prompt, output = 8, 50, 12
    looped = replace(_equal_requests(80, prompt=prompt, output=output), closed_loop=ClosedLoop(num_clients=num_clients))
    records = served(looped, PerToken(), max_seqs_per_batch=num_clients)
    round_us = num_clients * US_PER_TOKEN * (prompt + output - 1)
    assert {(r.finish_us or 0) - r.arrival_us for r in records.requests} == {round_us}
    assert records.steps[-1].end_us == 80 // num_clients * round_us


def _equal_requests(count: int, *, prompt: int, output: int) -> Workload:
    return Workload(
        requests=tuple(
            Request(id=RequestId(k), arrival_us=0, prompt=Prompt(num_tokens=prompt), output_tokens=output)
            for k in range(count)
        )
    )
