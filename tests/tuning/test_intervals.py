"""What is predicted comes with how wrong it may be, with where its numbers come from, and with which knobs matter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tuning.searches import CALIBRATION, default, workload
from xllm_lab.arrivals import gamma_bursts, rotated, with_arrivals
from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.metrics import summarize
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.runs import read_run
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.simulator import simulate
from xllm_lab.sim.spread import Spread
from xllm_lab.step_time import TERMS
from xllm_lab.tuning.evidence import METRICS, mean_metrics
from xllm_lab.tuning.intervals import Foresight, KnobEffect, Provenance, known_error, one_fewer, recommendation, scaled
from xllm_lab.tuning.tiers import Tiers

BURSTS = with_arrivals(workload(), gamma_bursts(12, 250.0, 2.0, seed=1))
ARRIVALS = [rotated(BURSTS, seed) for seed in range(3)]
TUNED = Candidate(instance=default(max_seqs_per_batch=4).instance, policies=Policies(make_policy("batch", "fcfs")))
# Relative error of all steps together: 4 %.
KNOWN_TO_4_PERCENT = replace(CALIBRATION, spread=Spread(bias_frac=0.04, scatter_us=1e-9))


def test_whoever_is_as_calibrated_lies_within_every_interval() -> None:
    foresight = Foresight(CALIBRATION)
    found = foresight.recommend(default(), TUNED, ARRIVALS, same_arrivals=True)
    measured = mean_metrics([summarize(foresight.run(TUNED, on)) for on in ARRIVALS])
    assert set(measured) == set(METRICS)
    assert all(found.tuned[metric].holds(value) for metric, value in measured.items())
    assert found.tuned["ttft_us.p90"].expected == measured["ttft_us.p90"]


def test_a_machine_within_its_stated_error_lies_within_its_interval_and_one_far_beyond_does_not() -> None:
    """By queues, not by proportion: TTFT under load moves by more than steps do, and the interval knows."""
    foresight = Foresight(KNOWN_TO_4_PERCENT, known=dict.fromkeys(METRICS, 0.0))
    found = foresight.recommend(default(), default(), ARRIVALS, same_arrivals=True).default
    for factor, is_held in ((0.97, True), (1.03, True), (1.6, False), (0.5, False)):
        measured = mean_metrics([summarize(foresight.run(default(), on, factor)) for on in ARRIVALS])
        assert found["ttft_us.p90"].holds(measured["ttft_us.p90"]) == is_held, factor
        assert found["tpot_us.p50"].holds(measured["tpot_us.p50"]) == is_held, factor


def test_arrivals_that_were_not_simulated_widen_the_interval() -> None:
    foresight = Foresight(CALIBRATION)
    same, other = (foresight.recommend(default(), TUNED, ARRIVALS, same_arrivals=s).tuned for s in (True, False))
    assert all(same[m].parts_frac["seeds"] == 0 for m in METRICS)
    assert other["ttft_us.p90"].parts_frac["seeds"] > 0
    assert other["ttft_us.p90"].high > same["ttft_us.p90"].high


def test_a_worse_known_error_widens_the_interval() -> None:
    narrow, wide = (
        Foresight(CALIBRATION, known=dict.fromkeys(METRICS, frac))
        .recommend(default(), TUNED, ARRIVALS, same_arrivals=True)
        .tuned
        for frac in (0.01, 0.5)
    )
    assert all(wide[m].low <= narrow[m].low and wide[m].high > narrow[m].high for m in METRICS)
    assert wide["tpot_us.p50"].low < narrow["tpot_us.p50"].low


def test_numbers_say_where_they_come_from() -> None:
    """A step of more than 64 tokens was never calibrated, so of TTFT; who decodes alone met none."""
    most = dict(zip(TERMS, CALIBRATION.highest, strict=True)) | {"token_us": 64.0}
    beyond = replace(CALIBRATION, highest=tuple(most.values()))
    one_by_one = [with_arrivals(workload(), [10**7 * k * i for i in range(12)]) for k in (1, 2)]
    found = Foresight(beyond).recommend(default(), default(), one_by_one).default
    assert found["ttft_us.p50"].provenance is Provenance.EXTRAPOLATED
    assert found["tpot_us.p50"].provenance is Provenance.INTERPOLATED
    found = Foresight(CALIBRATION).recommend(default(), default(), ARRIVALS).default
    assert {one.provenance for one in found.values()} == {Provenance.INTERPOLATED}
    cached = replace(default(), policies=replace(default().policies, cache=make_policy("cache", "lru")))
    given = Foresight(CALIBRATION, Tiers(host_link_bytes_per_s=1e9)).recommend(cached, cached, ARRIVALS).default
    assert {one.provenance for one in given.values()} == {Provenance.ANALYTIC}


def test_each_change_is_taken_back_alone() -> None:
    was = default(max_tokens_per_batch=512)
    tuned = Candidate(
        instance=default(max_tokens_per_batch=256, block_size=32, num_kv_blocks=32).instance,
        policies=Policies(make_policy("batch", "fcfs"), cache=make_policy("cache", "lru", {"host_blocks_factor": 2.0})),
    )
    found = {knob: (before, after, one) for knob, before, after, one in one_fewer(was, tuned)}
    assert set(found) == {"max_tokens_per_batch", "block_size", "num_kv_blocks", "batch", "cache"}
    assert found["batch"][:2] == ("decode-first", "fcfs")
    assert found["batch"][2].instance == tuned.instance
    assert found["max_tokens_per_batch"][2].instance == replace(tuned.instance, max_tokens_per_batch=512)
    # Sixty-four blocks of 32 would be twice the memory.
    assert found["num_kv_blocks"][2].instance.num_kv_tokens == was.instance.num_kv_tokens


def test_a_knob_that_does_nothing_is_in_the_noise_and_one_that_decides_is_not() -> None:
    """A context limit that nobody reaches; a batch of one where twelve are waiting."""
    tuned = default(max_seqs_per_batch=1, max_model_len=4096)
    effects = {k.knob: k for k in Foresight(CALIBRATION).recommend(default(), tuned, [workload()] * 3).knobs}
    assert effects["max_model_len"].is_in_noise
    assert effects["max_model_len"].effect_frac == 0
    assert not effects["max_seqs_per_batch"].is_in_noise


@pytest.mark.parametrize(
    ("low_frac", "high_frac", "is_in_noise"),
    [(-0.005, 0.2, True), (0.02, 0.2, False), (-0.3, -0.02, False), (-0.1, 0.1, True), (None, None, False)],
)
def test_an_effect_is_in_the_noise_unless_its_whole_interval_is_beyond_it(
    low_frac: float | None, high_frac: float | None, is_in_noise: bool
) -> None:
    effect = KnobEffect(knob="k", default="1", tuned="2", effect_frac=0.1, low_frac=low_frac, high_frac=high_frac)
    assert effect.is_in_noise == is_in_noise


def test_a_recommendation_is_read_as_it_was_written() -> None:
    found = Foresight(CALIBRATION).recommend(default(), TUNED, ARRIVALS)
    assert recommendation(json.loads(json.dumps(found.as_dict()))) == found


def test_the_error_on_a_known_run_is_the_largest_of_each_metric(tmp_path: Path) -> None:
    """A "measured" run on a machine 20 % slower: a step's latency is predicted a sixth too low."""
    slower = fitted_machine(scaled(CALIBRATION, 1.2))
    run = simulate(workload(), default().instance, default().policies, slower, out=tmp_path / "slow")
    with pytest.raises(ConfigError, match="is a simulator run; accepted: engine runs"):
        known_error(CALIBRATION, [run])
    manifest = json.loads((run.path / "manifest.json").read_text())
    (run.path / "manifest.json").write_text(json.dumps({**manifest, "host": "engine"}))
    assert known_error(CALIBRATION, [read_run(run.path)])["tpot_us.p50"] == pytest.approx(1 / 6, abs=0.03)


def test_one_workload_has_no_spread() -> None:
    with pytest.raises(ConfigError, match="at least 2, for their spread"):
        Foresight(CALIBRATION).recommend(default(), TUNED, ARRIVALS[:1])


def test_a_scaled_machine_takes_as_many_times_as_long() -> None:
    weights = np.asarray(scaled(CALIBRATION, 1.5).step_time.weights)
    assert weights == pytest.approx(1.5 * np.asarray(CALIBRATION.step_time.weights))
