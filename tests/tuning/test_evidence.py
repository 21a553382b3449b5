"""What pairs of runs say: intervals that hold, promises counted where they break, tokens that may not change."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from tests.small_runs import request
from tests.tuning.searches import CALIBRATION, default, workload
from xllm_lab.arrivals import rotated
from xllm_lab.errors import ConfigError
from xllm_lab.metrics import summarize
from xllm_lab.records import Records
from xllm_lab.tuning.bootstrap import PairedBootstrap
from xllm_lab.tuning.evidence import evidence
from xllm_lab.tuning.intervals import Foresight
from xllm_lab.workload import Sampling, Slo, Workload

MACHINE = Foresight(CALIBRATION)
PROMISE = Slo(ttft_us=90_000, tpot_us=12_000)
ARRIVALS = [rotated(workload(), seed) for seed in range(3)]


def runs(factor: float = 1.0) -> list[Records]:
    """The default on each of the arrivals, its steps so much slower."""
    return [MACHINE.run(default(), on, factor) for on in ARRIVALS]


def test_a_run_beside_itself_has_no_gain_and_no_noise() -> None:
    """Nor any width: each pair says exactly 0."""
    found = evidence(runs(), runs(), ARRIVALS, {0: runs()[0]})
    assert (found.gain.gain_frac, found.bootstrap_frac, found.noise_frac) == (0, (0, 0), 0)
    assert all((d.expected, d.low, d.high) == (0, 0, 0) for d in found.differences.values())
    assert found.num_changed_outputs == 0
    assert found.least_gain_frac == 0


def test_a_faster_machine_shows_in_every_interval() -> None:
    found = evidence(runs(), runs(0.5), ARRIVALS)
    assert found.least_gain_frac is not None
    assert found.least_gain_frac > 0
    assert found.differences["tpot_us.p50"].high < 0
    assert found.noise_frac is None, "nobody replayed the default again"


def test_noise_is_what_the_default_differs_by_from_itself() -> None:
    again = runs(1.1)
    found = evidence(runs(), runs(), ARRIVALS, {0: again[0], 2: again[2]})
    ours, theirs = ([summarize(run).goodput_per_s for run in of] for of in (runs(), again))
    relative = [2 * (theirs[k] - ours[k]) / (theirs[k] + ours[k]) for k in (0, 2)]
    assert found.noise_frac == pytest.approx(np.sqrt(np.mean(np.square(relative))))


def test_the_worst_repeat_says_whether_a_promise_is_kept() -> None:
    """In one of three repeats a third of the requests wait too long."""
    late = runs()
    for record in late[1].requests:
        record.ttft_slo_us, record.tpot_slo_us, record.e2e_slo_us = (1 if record.id < 4 else 10**9), None, 10**9
    for run in (late[0], late[2]):
        for record in run.requests:
            record.ttft_slo_us, record.tpot_slo_us, record.e2e_slo_us = 10**9, None, 10**9
    assert evidence(runs(), late, ARRIVALS).worst_kept_frac == {"ttft": 8 / 12, "e2e": 1.0}


def test_changed_tokens_of_greedy_requests_are_counted() -> None:
    """What a request drew by chance may be another thing each time."""
    drawn = Workload(
        requests=tuple(
            replace(r, sampling=Sampling(temperature=1.0 if r.id == 0 else 0.0)) for r in workload().requests
        )
    )
    changed = runs()
    for k in (0, 5):
        changed[1].requests[k].output_token_ids[-1] += 1
    assert evidence(runs(), changed, [drawn] * 3).num_changed_outputs == 1


def test_pairs_of_other_requests_are_refused() -> None:
    other = runs()
    other[1] = copy.deepcopy(other[1])
    other[1].requests[0].arrival_us += 1
    with pytest.raises(ConfigError, match="served other requests, or at other times"):
        evidence(runs(), other, ARRIVALS)
    with pytest.raises(ConfigError, match="at least 2"):
        evidence(runs()[:1], runs()[:1], ARRIVALS[:1])


def test_the_interval_holds_the_true_gain() -> None:
    """Forty made-up verifications, 5 repeats of 100 requests whose promises are kept by chance: nearly all hold it.

    Requests are paired: a bad stretch is bad for both, and then says nothing of either.
    """
    held, num, kept = 0, 40, (0.6, 0.75)
    generator = np.random.default_rng(0)
    for _ in range(num):
        pairs = [_chance(generator, kept) for _ in range(5)]
        found = PairedBootstrap([a for a, _ in pairs], [b for _, b in pairs]).gain()
        assert found is not None
        held += found[0] <= kept[1] / kept[0] - 1 <= found[1]
    assert held >= 0.85 * num


def _chance(generator: np.random.Generator, kept: tuple[float, float]) -> tuple[Records, Records]:
    plain = Workload(requests=tuple(replace(request(i, 1000 * i, prompt=8, output=2)) for i in range(100)))
    base = MACHINE.run(default(), plain)
    luck = generator.random(100)
    made = []
    for frac in kept:
        run = copy.deepcopy(base)
        for record, u in zip(run.requests, luck, strict=True):
            record.ttft_slo_us = 10**9 if u < frac else 1
        made.append(run)
    return made[0], made[1]
