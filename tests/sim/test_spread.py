"""Stated errors hold at about their rate on machines whose truth is known: inside the calibrated range, and outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from tests.sim.synthetic_machine import Machine, mixed_steps
from xllm_lab.sim.calibrate import MIN_STEPS, Calibration, calibrate_on
from xllm_lab.sim.cost import batch_of
from xllm_lab.sim.cost.fitted import FittedCost
from xllm_lab.sim.spread import UNKNOWN, RunSpread
from xllm_lab.step_samples import StepSample
from xllm_lab.step_time import TERMS, Chunk, features

NUM_MACHINES = 40


class Coverage(NamedTuple):
    """How often the truth lay within what was stated, and how wide that was."""

    half: float
    two_thirds: float
    most: float
    of_steps: float
    width_frac: float


@cache
def coverage(machine: Machine, *, run: int = 100, context: float = 1.0) -> Coverage:
    """Hold the stated 50, 68 and 95 % intervals of a run, and 95 % of each step, against calibrated machines."""
    within = {0.5: 0, 0.68: 0, 0.95: 0}
    steps_within, widths = 0.0, 0.0
    for seed in range(NUM_MACHINES):
        rng = np.random.default_rng(seed)
        fitted = machine.calibrated(rng, 300)
        cost, spread = FittedCost(fitted), fitted.run_spread()
        steps = mixed_steps(rng, run, context=context)
        times = machine.step_us(rng, steps)
        spread.add(np.asarray([features(chunks, len(chunks)) for chunks in steps]))
        error_frac = abs(times.sum() - spread.us) / spread.us
        for confidence in within:
            within[confidence] += error_frac <= spread.half_width_frac(confidence)
        prices = [cost.step(batch_of(chunks, len(chunks))) for chunks in steps]
        inside = [abs(t - p.us) <= 1.96 * fitted.spread.step_std_us(p) for t, p in zip(times, prices, strict=True)]
        steps_within += float(np.mean(inside))
        widths += spread.half_width_frac()
    half, two_thirds, most = (count / NUM_MACHINES for count in within.values())
    return Coverage(half, two_thirds, most, steps_within / NUM_MACHINES, widths / NUM_MACHINES)


@pytest.mark.parametrize("scatter_frac", [0.05, 0.2])
def test_inside_the_range_intervals_hold_at_their_rate(scatter_frac: float) -> None:
    """Of runs and of single steps; three standard deviations of 40 coin tosses are 0.24 at a half."""
    got = coverage(Machine(scatter_frac=scatter_frac))
    assert 0.35 <= got.half <= 0.75
    assert 0.50 <= got.two_thirds <= 0.90
    assert got.most >= 0.87
    assert 0.93 <= got.of_steps <= 0.97


def test_a_machine_that_drifts_is_known_less() -> None:
    """Drift does not average out as scatter does; it is told as wider intervals, which hold."""
    drifting = coverage(Machine(drift_frac=0.04))
    assert drifting.most >= 0.9
    assert drifting.width_frac > 3 * coverage(Machine()).width_frac


def test_outside_the_range_intervals_are_wider_and_hold() -> None:
    """With contexts four times as long: most of the steps are extrapolated."""
    outside = coverage(Machine(), context=4.0)
    assert outside.most >= 0.9
    assert outside.of_steps >= 0.93
    assert 3 * coverage(Machine()).width_frac < outside.width_frac < 0.5


def test_a_machine_that_is_no_sum_of_terms_is_still_known_nearby() -> None:
    """At contexts twice as long, where a fitted line leaves its curve: held less often than stated, but mostly."""
    got = coverage(Machine(bend=2e-6), context=2.0)
    assert got.most >= 0.75
    assert got.of_steps >= 0.9


def test_more_steps_make_it_surer() -> None:
    """Of a machine without drift, by about the square root."""
    rows = np.asarray([features(c, len(c)) for c in mixed_steps(np.random.default_rng(9), 2000)])
    widths = []
    for num_steps in (200, 3200):
        spreads = [Machine().calibrated(np.random.default_rng(seed), num_steps).run_spread() for seed in range(5)]
        for spread in spreads:
            spread.add(rows)
        widths.append(float(np.mean([spread.half_width_frac() for spread in spreads])))
    assert widths[1] < 0.5 * widths[0]


def test_doubt_grows_with_the_distance() -> None:
    """From a batch of the calibrated kind, along contexts, sequences and tokens alike."""
    cost = FittedCost(Machine().calibrated(np.random.default_rng(0), 400))
    directions: tuple[Callable[[int], list[Chunk]], ...] = (
        lambda k: [Chunk(1, 500 * k)] * 32,
        lambda k: [Chunk(1, 500)] * (32 * k),
        lambda k: [Chunk(500 * k, 0)],
    )
    for direction in directions:
        prices = [cost.step(batch_of(direction(k), len(direction(k)))) for k in (1, 4, 16, 64)]
        doubts = [p.std_us / p.us for p in prices]
        assert not prices[0].is_extrapolated
        assert all(p.is_extrapolated for p in prices[1:])
        assert all(b.std_us > 2 * a.std_us for a, b in pairwise(prices))
        assert doubts[-1] > 2 * doubts[0]


def test_what_never_varied_is_not_known() -> None:
    """All steps alike say nothing of other batches, however many they are."""
    machine, rng = Machine(), np.random.default_rng(0)
    alike = (Chunk(1, 500),) * 8
    times = machine.step_us(rng, [alike] * 400).tolist()
    samples = [StepSample(chunks=alike, num_logits=8, step_us=us) for us in times]
    fitted = calibrate_on(samples, model={}, hardware={}, sources=("alike",))
    cost = FittedCost(fitted)
    same, other = cost.step(batch_of(alike, 8)), cost.step(batch_of((Chunk(1, 5000),) * 8, 8))
    assert same.std_us < 0.05 * same.us
    assert other.std_us > 0.5 * other.us


def test_steps_without_scatter_that_are_alike_but_for_their_lengths() -> None:
    """A server that decodes full batches: lengths are known to many digits, and what a sequence costs not at all."""
    steps = []
    for lengths in np.random.default_rng(3).integers(64, 9000, (20_000, 2)).tolist():
        us = 20_000 + 0.1 * sum(lengths)
        steps.append(StepSample(chunks=tuple(Chunk(1, length - 1) for length in lengths), num_logits=2, step_us=us))
    cost = FittedCost(calibrate_on(steps, model={}, hardware={}, sources=("full",)))
    alike, more = (cost.step(batch_of([Chunk(1, 4999)] * num, num)) for num in (2, 16))
    assert alike.us == pytest.approx(20_000 + 0.1 * 2 * 5000, rel=1e-3)
    assert alike.std_us < 0.01 * alike.us
    assert more.std_us > 0.1 * more.us


def test_scatter_averages_out_and_bias_does_not() -> None:
    """A run a hundred times as long: what is stated shrinks to the shared part, and not below."""
    fitted = Machine(scatter_frac=0.2, drift_frac=0.03).calibrated(np.random.default_rng(3), 800)
    rows = np.asarray([features(c, len(c)) for c in mixed_steps(np.random.default_rng(4), 50)])
    short, long = fitted.run_spread(), fitted.run_spread()
    short.add(rows)
    for _ in range(100):
        long.add(rows)
    assert fitted.spread.bias_frac < long.half_width_frac() < short.half_width_frac()
    assert long.us == pytest.approx(100 * short.us)
    assert long.std_frac < long.half_width_frac(0.95)


def test_a_run_of_no_steps_has_no_error() -> None:
    nothing = Machine().calibrated(np.random.default_rng(0), MIN_STEPS).run_spread()
    assert (nothing.us, nothing.std_frac, nothing.half_width_frac()) == (0.0, 0.0, 0.0)


def test_a_calibration_made_by_hand_states_no_error() -> None:
    fitted: Calibration = Machine().calibrated(np.random.default_rng(0), 100)
    by_hand = RunSpread(fitted.step_time, fitted.highest, UNKNOWN)
    by_hand.add(np.ones((3, len(TERMS))))
    assert by_hand.half_width_frac() == 0.0
