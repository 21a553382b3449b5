"""What is wrong with the step model in two ways is found again; more than twice is not believed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuning.searches import CALIBRATION, workload
from xllm_lab.step_samples import StepSample
from xllm_lab.step_time import Chunk
from xllm_lab.tuning.arrival_seeds import noise_frac, reseeded
from xllm_lab.tuning.correction import HIGHEST, LOWEST, NUM_FIXED, correction, residuals
from xllm_lab.tuning.judging import is_worse

SHAPES = [(1, 10), (8, 100), (32, 400), (64, 0), (128, 0)]


def steps(fixed: float, load: float) -> list[StepSample]:
    """Of a machine on which the two parts take so many times as long as calibrated."""
    weights, made = CALIBRATION.step_time.weights, []
    for tokens, context in SHAPES:
        one = StepSample(chunks=(Chunk(tokens, context),), num_logits=1, step_us=1.0)
        parts = [w * f for w, f in zip(weights, one.features(), strict=True)]
        us = fixed * sum(parts[:NUM_FIXED]) + load * sum(parts[NUM_FIXED:])
        made.append(StepSample(chunks=one.chunks, num_logits=1, step_us=us))
    return made


FACTOR = st.floats(LOWEST, HIGHEST)


@given(FACTOR, FACTOR)
def test_what_is_wrong_is_found(fixed: float, load: float) -> None:
    found = correction([residuals(steps(fixed, load), CALIBRATION).as_dict()])
    assert found.fixed == pytest.approx(fixed, rel=1e-3)
    assert found.load == pytest.approx(load, rel=1e-3)
    assert found.error_frac[1] == pytest.approx(0, abs=1e-3)


def test_a_machine_three_times_as_slow_hits_the_bound_and_says_so() -> None:
    found = correction([residuals(steps(3.0, 1.0), CALIBRATION).as_dict()])
    assert found.fixed == HIGHEST
    assert found.bounds_hit == {"fixed": HIGHEST}


@given(FACTOR, FACTOR)
def test_runs_add_up(fixed: float, load: float) -> None:
    """Two runs say what one of both says, and survive being written down."""
    measured = steps(fixed, load)
    both = [residuals(part, CALIBRATION).as_dict() for part in (measured[:2], measured[2:])]
    one = correction([residuals(measured, CALIBRATION).as_dict()])
    assert correction(json.loads(json.dumps(both))).load == pytest.approx(one.load, rel=1e-6)


def test_the_corrected_calibration_predicts_what_was_measured() -> None:
    corrected = correction([residuals(steps(1.5, 0.8), CALIBRATION).as_dict()]).corrected(CALIBRATION)
    for one in steps(1.5, 0.8):
        assert corrected.step_time.step_us(one.chunks, 1) == pytest.approx(one.step_us, rel=1e-3)


def test_nothing_measured_corrects_nothing() -> None:
    assert correction([]).corrected(CALIBRATION) == CALIBRATION


def test_a_seed_deals_out_the_same_gaps() -> None:
    """The same requests, in the same order, over the same time; seed 0 is the trace as it was."""
    one = workload()
    for seed in range(1, 6):
        other = reseeded(one, seed)
        assert [r.prompt for r in other.requests] == [r.prompt for r in one.requests]
        assert other.requests[-1].arrival_us == one.requests[-1].arrival_us
    assert reseeded(one, 0) == one


def test_noise_is_what_chance_alone_makes() -> None:
    """None of equal runs; half the mean's spread of runs that differ."""
    assert noise_frac([5.0, 5.0, 5.0]) == 0
    assert noise_frac([5.0]) == 0
    assert 0.05 < noise_frac([95.0, 100.0, 105.0]) < 0.5
    assert noise_frac([95.0, 100.0, 105.0] * 4) < noise_frac([95.0, 100.0, 105.0])


def test_who_is_worse_each_time_is_given_up_after_four() -> None:
    """One in sixteen by chance; of three, one in eight."""
    best = [10.0, 11.0, 12.0, 13.0]
    worse = [9.0, 10.5, 11.0, 12.8]
    assert is_worse(worse, best, 0.1)
    assert not is_worse(worse[:3], best[:3], 0.1)
    assert not is_worse(best, worse, 0.1)
