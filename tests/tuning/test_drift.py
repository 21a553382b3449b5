"""A trace of the same kind is not called another, one of another kind is, and what that costs is simulated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.small_runs import request
from tests.tuning.promotions import NOW_US, SLO, bursts, one, sharing, verified
from xllm_lab import transforms
from xllm_lab.arrivals import gamma_bursts, poisson, with_arrivals
from xllm_lab.errors import ConfigError
from xllm_lab.tuning.drift import drift
from xllm_lab.tuning.fingerprint import FEATURES, changes, fingerprint, fingerprint_from
from xllm_lab.tuning.promote import Promotion, promote
from xllm_lab.workload import ClosedLoop, Prompt, Slo, Workload, stream


def drawn(seed: int, num: int = 160, *, rate_per_s: float = 20.0, prompt: float = 200, cv: float = 1.0) -> Workload:
    """Prompts and outputs of exponential lengths, a third of them sharing their beginning."""
    generator = stream(seed, "lengths")
    prompts, outputs = (8 + generator.exponential(mean, num).astype(int) for mean in (prompt, 40))
    shares = generator.random(num) < 1 / 3
    requests = tuple(
        replace(
            request(i, i, prompt=8, output=int(outputs[i])),
            prompt=Prompt(
                num_tokens=int(prompts[i]) + 64 * int(shares[i]),
                block_hashes=(7,) if shares[i] else (),
                hash_block_tokens=64,
            ),
        )
        for i in range(num)
    )
    return with_arrivals(Workload(requests=requests), gamma_bursts(num, rate_per_s, cv, seed))


def test_the_same_kind_of_trace_seldom_alarms() -> None:
    """Sixty others of the same kind, of as many requests and of half: a false alarm in at most three."""
    known = fingerprint(drawn(0))
    alarms = sum(any(c.is_drift for c in changes(known, drawn(seed, 160 - 80 * (seed % 2)))) for seed in range(1, 61))
    assert alarms <= 3


@pytest.mark.parametrize(
    ("live", "feature"),
    [
        (drawn(1, rate_per_s=60.0), "log_rate"),
        (drawn(1, prompt=600), "prompt_tokens.p50"),
        (drawn(1, prompt=600), "prompt_tokens.p90"),
        (transforms.scale_length(drawn(1), 3.0), "output_tokens.p50"),
        (with_arrivals(drawn(1), tuple(50_000 * i for i in range(160))), "irregularity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_kind_alarms_by_what_is_other(live: Workload, feature: str) -> None:
    found = {c.feature: c for c in changes(fingerprint(drawn(0)), live)}
    assert found[feature].is_drift


def test_prefixes_and_sessions_are_told() -> None:
    """Alike by hashes as by tokens; a next turn begins with all of an earlier prompt."""
    alone = Workload(requests=tuple(request(i, 1000 * i, prompt=96, output=2) for i in range(32)))
    said = tuple(
        replace(r, prompt=Prompt(num_tokens=32 * (k % 4 + 1), token_ids=(*range(32 * (k % 4 + 1)),)))
        for k, r in enumerate(alone.requests)
    )
    turns = {c.feature: c for c in changes(fingerprint(alone), replace(alone, requests=said))}
    assert turns["continued_frac"].was == 0
    assert turns["continued_frac"].now == pytest.approx(3 / 4)
    assert turns["shared_prompt_frac"].now == pytest.approx((32 + 64 + 96) / (32 + 64 + 96 + 128))
    assert turns["continued_frac"].is_drift
    shared = {c.feature: c for c in changes(fingerprint(alone), replace(alone, requests=sharing(32).requests))}
    assert shared["shared_prompt_frac"].is_drift
    assert not shared["continued_frac"].is_drift


def test_clients_of_a_closed_loop_have_no_rate() -> None:
    closed = replace(drawn(0), closed_loop=ClosedLoop(num_clients=4))
    assert set(fingerprint(closed).slices) == set(FEATURES) - {"log_rate", "irregularity"}
    assert {c.feature for c in changes(fingerprint(drawn(0)), closed)} == set(fingerprint(closed).slices)


def test_a_fingerprint_is_read_as_it_was_written() -> None:
    known = fingerprint(drawn(0))
    assert fingerprint_from(json.loads(json.dumps(known.as_dict()))) == known


def test_too_few_requests_are_no_workload() -> None:
    with pytest.raises(ConfigError, match="15 requests have no fingerprint; accepted: at least 16"):
        fingerprint(drawn(0, 15))
    with pytest.raises(ConfigError, match="accepted: at least 20, two slices"):
        changes(fingerprint(drawn(0)), drawn(1, 19))


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> Promotion:
    """Eight at a time instead of one, for bursts of short questions."""
    folder = tmp_path_factory.mktemp("drift")
    verified(folder / "v", default=one(max_seqs_per_batch=1), tuned=one(max_tokens_per_batch=64))
    done, why = promote(folder / "v", to="xllm", out=folder / "out", now_us=NOW_US)
    assert why == []
    assert done is not None
    return done


def test_the_workload_that_was_tuned_for_has_not_drifted(promoted: Promotion) -> None:
    """Other arrivals of the same process, and nothing that was promised: they were promised what these were."""
    live = with_arrivals(transforms.with_slo(bursts(), Slo()), gamma_bursts(60, 40.0, 1.5, seed=8))
    assert not drift(live, promoted).has_drifted


def test_what_drift_costs_is_simulated(promoted: Promotion) -> None:
    """Long prompts choke in the small chunks that were good for questions: one change fewer serves them in time."""
    found = drift(bursts(prompt=700, rate_per_s=12.0, slo=SLO), promoted)
    assert found.has_drifted
    assert found.better is not None
    assert found.better.instance.max_tokens_per_batch == one().instance.max_tokens_per_batch
    assert found.better.instance.max_seqs_per_batch == 8
    assert found.pays_to_tune


def test_drift_may_cost_nothing(promoted: Promotion) -> None:
    """A quarter of the traffic is another workload, and is served by anybody."""
    requests = with_arrivals(bursts(), poisson(60, 4.0, seed=2))
    found = drift(requests, promoted)
    assert found.has_drifted
    assert not found.pays_to_tune


def test_a_trace_that_cannot_be_served_is_refused(promoted: Promotion) -> None:
    with pytest.raises(ConfigError, match="cannot be served by the promoted configuration"):
        drift(bursts(prompt=5000), promoted)
