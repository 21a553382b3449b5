"""Experts that move while a simulated instance serves: laws of decisions, counters and time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws import VOCAB_SIZE, experts_are_never_lost, obey_the_laws
from tests.small_runs import instance_config
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.experts import ExpertsPlan, ExpertsPolicy, ExpertsView
from xllm_lab.policies.experts.static import STATIC, Static
from xllm_lab.policies.experts.xllm_balanced import XllmBalanced
from xllm_lab.policies.of_instance import Policies
from xllm_lab.rebalancing import ExpertLayout, expert_tokens, placements
from xllm_lab.records import Records
from xllm_lab.sim.cost import Batch, Price, Prices
from xllm_lab.sim.experts.loads import ZipfLoads
from xllm_lab.sim.experts.serving import ServedExperts, popularity_of, recorded_popularity
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.workload import Prompt, Request, RequestId, Workload

LAYERS, EXPERTS, DEVICES, PER_TOKEN = (1, 2, 5), 16, 4, 2
LAYOUT = ExpertLayout(layers=LAYERS, num_experts=EXPERTS, num_devices=DEVICES, expert_bytes=1_000_000)
INTERVAL_US = 400_000
BALANCED = XllmBalanced(interval_us=INTERVAL_US, min_peak_gain_frac=0.05)


class Flat:
    """A step takes a millisecond, and a microsecond for each token and each token in KV of the decodes."""

    def step(self, batch: Batch) -> Price:
        return Price(1000.0 + batch.num_tokens + batch.decode_kv_tokens)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        us = np.asarray([self.step(batch.later(k)).us for k in range(num_steps)])
        return Prices(us, np.zeros(num_steps, np.bool_))


def served(*, exponent: float = 1.3, drift_ticks: float | None = None, seed: int = 0, **others: Any) -> ServedExperts:
    loads = ZipfLoads(
        num_layers=len(LAYERS),
        num_experts=EXPERTS,
        experts_per_token=PER_TOKEN,
        tokens_per_step=200,
        steps_per_tick=20,
        tick_us=90_000,
        exponent=exponent,
        drift_ticks=drift_ticks,
    ).drawn(40, seed=seed)
    given: dict[str, Any] = {"link_bytes_per_s": 2e8, "row_us": 3.0, "activation_us": 250, **others}
    return ServedExperts(layout=LAYOUT, popularity=popularity_of(loads), experts_per_token=PER_TOKEN, **given)


def work(num: int = 24, gap_us: int = 40_000, output_tokens: int = 150) -> Workload:
    each = [
        Request(
            id=RequestId(k),
            arrival_us=k * gap_us,
            prompt=Prompt(num_tokens=20 + 7 * (k % 5)),
            output_tokens=output_tokens,
        )
        for k in range(num)
    ]
    return Workload(requests=tuple(each), seed=0)


CONFIG = instance_config(num_kv_blocks=400, max_model_len=512, max_tokens_per_batch=64)


def run(
    policy: ExpertsPolicy,
    experts: ServedExperts,
    *,
    config: InstanceConfig = CONFIG,
    workload: Workload | None = None,
    fast_forward: bool = True,
) -> Records:
    decide = Policies(DecodeFirst(), experts=policy)
    timing = Predicted(Flat(), fast_forward=fast_forward, experts=experts)
    return run_simulation(workload or work(), config, decide, timing, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("scheduling", ["off", "on", "length_aware"])
@pytest.mark.parametrize("name", sorted(policies("experts")))
def test_every_run_obeys_the_laws(name: str, scheduling: str) -> None:
    """No expert is lost, a change follows its cause, and every token of every step is counted once."""
    policy = Static() if name == "static" else make_policy("experts", name, {"interval_us": INTERVAL_US})
    config = replace(CONFIG, async_scheduling=scheduling)
    records = run(policy, served(drift_ticks=8.0), config=config)
    obey_the_laws(work(), config, records)
    experts_are_never_lost(records, LAYOUT, policy.num_redundant_experts)
    rows = sum(sum(step.num_tokens) for step in records.steps) * PER_TOKEN
    counted = sum(load.slot_tokens_LP.sum(axis=1) for load in records.expert_loads)
    assert np.array_equal(counted, [rows] * len(LAYERS))
    assert sum(load.num_steps for load in records.expert_loads) == len(records.steps)
    assert bool(records.decisions) == (name != "static")
    assert name == "static" or any(d.active_step is not None for d in records.decisions)


@settings(max_examples=12, deadline=None)
@given(
    drift=st.sampled_from((None, 3.0, 30.0)),
    seed=st.integers(0, 9),
    scheduling=st.sampled_from(("off", "on", "length_aware")),
    gap_us=st.sampled_from((0, 15_000, 100_000)),
    rate=st.sampled_from((1e7, 2e8, 1e12)),
)
def test_skipped_steps_are_the_stepped_ones(
    drift: float | None, seed: int, scheduling: str, gap_us: int, rate: float
) -> None:
    """Decisions, counters and times are the same, however many steps an event holds."""
    config, workload = replace(CONFIG, async_scheduling=scheduling), work(10, gap_us)
    experts = served(drift_ticks=drift, seed=seed, link_bytes_per_s=rate)
    quick, slow = (
        run(BALANCED, experts, config=config, workload=workload, fast_forward=fast) for fast in (True, False)
    )
    assert quick == slow
    told = [
        [(r.end_us, r.num_steps, r.placement, r.slot_tokens_LP.tolist()) for r in x.expert_loads] for x in (quick, slow)
    ]
    assert told[0] == told[1]


def peaks(records: Records) -> list[tuple[int, float]]:
    """When each record ended, and rows of the most loaded device by those of the mean, over layers."""
    on_device = [
        (r.end_us, r.slot_tokens_LP.reshape(len(LAYERS), DEVICES, -1).sum(axis=-1)) for r in records.expert_loads
    ]
    return [(us, float(rows.max(axis=1).sum() / rows.mean(axis=1).sum())) for us, rows in on_device]


def test_the_peak_falls_and_steps_are_shorter() -> None:
    """Within an interval, by 30 % at least; who stays in place takes longer for the same work."""
    experts = served(exponent=1.5, drift_ticks=300.0)
    balanced, static = run(BALANCED, experts), run(STATIC, experts)
    first = next(d for d in balanced.decisions if d.active_us is not None)
    assert first.active_us is not None
    assert first.active_us <= 2 * INTERVAL_US
    now = [peak for us, peak in peaks(balanced) if us > first.active_us]
    before = [peak for us, peak in peaks(static) if us > first.active_us]
    assert np.mean(now) - 1 <= 0.7 * (np.mean(before) - 1)
    assert balanced.steps[-1].end_us < static.steps[-1].end_us


def test_a_change_stalls_one_step_and_only_for_activation() -> None:
    """Times of steps are those of free activation, but for one step a change."""
    dear, free = (run(BALANCED, served(activation_us=us, row_us=0.0)) for us in (5_000, 0))
    begins = {d.active_step for d in dear.decisions if d.active_step is not None}
    assert begins
    costs = {
        s.step: s.step_us - 1000 - sum(s.num_tokens) - _kv(s.num_tokens, s.num_computed_tokens) for s in dear.steps
    }
    assert {step for step, us in costs.items() if us} == begins
    assert {us for us in costs.values() if us} == {5_000}
    assert any(d.active_step is not None for d in free.decisions)


def _kv(num_tokens: list[int], computed: list[int]) -> int:
    return sum(k for n, k in zip(num_tokens, computed, strict=True) if n == 1)


def test_who_is_not_ready_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving goes on where experts were, and the next interval may try again."""
    never = served(link_bytes_per_s=1.0)
    records = run(BALANCED, never, workload=work(60, 600_000))
    changed = [d for d in records.decisions if d.layers]
    assert changed[0].dropped_us == changed[0].decided_us + 30_000_000
    assert all(d.active_step is None and d.ready_us is None for d in records.decisions)
    assert {load.placement for load in records.expert_loads} == {0}
    for one, other in pairwise(changed):
        assert one.dropped_us is not None
        assert other.decided_us >= one.dropped_us
    obey_the_laws(work(60, 600_000), CONFIG, records)


class Wrong:
    """Leaves an expert nowhere."""

    decides = "experts"
    num_redundant_experts, interval_us = 0, INTERVAL_US

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        layer = view.layers[0]
        return ExpertsPlan(slots={layer.id: (layer.slots[1], *layer.slots[1:])}, reason="wrong")


def test_a_wrong_plan_is_refused() -> None:
    with pytest.raises(PolicyError, match="leaves no slot of layer 1 to experts"):
        run(Wrong(), served())  # type: ignore[arg-type]


def test_a_policy_that_is_never_asked_is_refused() -> None:
    """Where experts are not divided, or do not fit."""
    decide = Policies(DecodeFirst(), experts=BALANCED)
    with pytest.raises(ConfigError, match="no experts are divided"):
        run_simulation(work(), CONFIG, decide, Predicted(Flat()), vocab_size=VOCAB_SIZE)
    with pytest.raises(ConfigError, match="num_redundant_experts is 13"):
        run(replace(BALANCED, num_redundant_experts=13), served())


def test_what_was_counted_drives_another_run() -> None:
    """Counters of a run are the popularity of the next, whatever was moved meanwhile."""
    experts = served(exponent=1.4)
    first = run(BALANCED, experts)
    slots = placements(LAYOUT, BALANCED.num_redundant_experts, first.decisions)
    assert len(slots) > 1
    again = recorded_popularity(first.expert_loads, slots)
    shares = [again.shared_out(row, 10_000) / 10_000 for row in range(len(again.ends_us))]
    ticks = range(len(experts.popularity.ends_us))
    true = np.mean([experts.popularity.shared_out(row, 10_000) / 10_000 for row in ticks], axis=0)
    assert np.abs(np.mean(shares, axis=0) - true).max() < 0.01
    other = run(BALANCED, replace(experts, popularity=again))
    assert [d.layers for d in other.decisions][:1] == [d.layers for d in first.decisions][:1]
    counted = [expert_tokens(slots[r.placement], r.slot_tokens_LP, EXPERTS).sum() for r in first.expert_loads]
    assert sum(counted) == sum(sum(s.num_tokens) for s in first.steps) * PER_TOKEN * len(LAYERS)
