"""Policies over loads: peaks fall when loads are skewed, nothing moves in vain, and every change has its price."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.experts import ExpertsPlan, ExpertsView
from xllm_lab.policies.experts.placement import contiguous
from xllm_lab.policies.experts.static import STATIC
from xllm_lab.policies.experts.xllm_balanced import XllmBalanced
from xllm_lab.sim.experts.balancing import Balanced, Devices, balance, copied_slots
from xllm_lab.sim.experts.loads import ZipfLoads
from xllm_lab.sim.experts.shares import ExpertPrice, Placement

PRICE = ExpertPrice(layer_us=20.0, token_us=0.5)
FOUR = Devices(num_devices=4, expert_bytes=10_000_000, link_bytes_per_s=1e10, boundary_us=200_000, activation_us=5_000)
SKEWED = ZipfLoads(
    num_layers=4,
    num_experts=32,
    experts_per_token=4,
    tokens_per_step=256,
    steps_per_tick=50,
    tick_us=1_000_000,
    exponent=1.2,
    drift_ticks=3000.0,
)
INTERVAL_US = 20_000_000
ADAPTIVE = [name for name in policies("experts") if name != "static"]


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("seed", range(3))
def test_peaks_fall_within_one_interval(name: str, seed: int) -> None:
    """Skewed and drifting, on four devices: the peak, in means, falls by at least 30 %."""
    loads = SKEWED.drawn(60, seed=seed)
    policy = make_policy("experts", name, {"interval_us": INTERVAL_US})
    told, static = balance(policy, loads, FOUR, PRICE), balance(STATIC, loads, FOUR, PRICE)
    first = told.published[0]
    assert first.decided_us == INTERVAL_US
    held = slice(first.active_us // 1_000_000, 2 * INTERVAL_US // 1_000_000)
    assert told.peak_to_mean[held].mean() <= 0.7 * static.peak_to_mean[held].mean()
    assert told.total_us < static.total_us


def same(one: Balanced, other: Balanced) -> bool:
    arrays = ((getattr(one, name), getattr(other, name)) for name in ("peak_to_mean", "experts_us"))
    return all(np.array_equal(a, b) for a, b in arrays) and one.published == other.published


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(policies("experts"))),
    seed=st.integers(0, 99),
    interval=st.integers(1, 40),
    redundant=st.integers(0, 3),
    drift=st.sampled_from((None, 3.0, 30.0)),
)
def test_runs_repeat_and_add_up(name: str, seed: int, interval: int, redundant: int, drift: float | None) -> None:
    """Before a change holds, the run is the static one's of as many slots; changes follow one another; time adds up."""
    knobs = {} if name == "static" else {"interval_us": interval * 1_000_000, "num_redundant_experts": redundant}
    policy = make_policy("experts", name, knobs)
    loads = replace(SKEWED, num_layers=2, num_experts=8, drift_ticks=drift).drawn(50, seed=seed)
    told = balance(policy, loads, FOUR, PRICE)
    assert same(told, balance(policy, loads, FOUR, PRICE))
    assert len(told.peak_to_mean) == len(told.experts_us) == 50
    assert (told.peak_to_mean >= 1).all()
    assert told.redundant_bytes == policy.num_redundant_experts * 2 * FOUR.expert_bytes
    begun = told.published[0].active_us // 1_000_000 if told.published else 50
    unmoved = Placement([contiguous(8, 4, policy.num_redundant_experts)] * 2, num_experts=8, num_devices=4)
    peaks = unmoved.device_tokens(loads.tokens).max(axis=2).sum(axis=1)
    assert told.experts_us[:begun].tolist() == np.rint(20.0 * 2 * 50 + 0.5 * peaks)[:begun].tolist()
    times = [(c.decided_us, c.ready_us, c.active_us) for c in told.published]
    assert all(decided < ready <= active for decided, ready, active in times)
    assert all(held[2] <= new[0] for held, new in pairwise(times))
    assert all(c.moved_slots > 0 and c.copied_bytes >= c.moved_slots * FOUR.expert_bytes for c in told.published)
    assert told.stall_us == 5_000 * sum(c.active_us < 50_000_000 for c in told.published)


def test_uniform_loads_move_nothing() -> None:
    """Noise is below the gate."""
    told = balance(XllmBalanced(interval_us=INTERVAL_US), replace(SKEWED, exponent=0.0).drawn(100, seed=0), FOUR, PRICE)
    assert told.num_decisions == 5
    assert told.published == ()


def test_a_change_holds_when_its_weights_are_there() -> None:
    """A tenth of the link: ready ten times as late; a boundary far away: active later; nobody is asked meanwhile."""
    loads = SKEWED.drawn(100, seed=0)
    policy = XllmBalanced(interval_us=10_000_000)
    near = balance(policy, loads, FOUR, PRICE)
    far = balance(policy, loads, replace(FOUR, link_bytes_per_s=1e9, boundary_us=25_000_000), PRICE)
    (first, *_), (late, *_) = near.published, far.published
    assert first.copied_bytes == late.copied_bytes
    assert abs((late.ready_us - 10_000_000) - 10 * (first.ready_us - 10_000_000)) <= 10
    assert late.active_us >= late.ready_us + 25_000_000
    assert far.num_decisions < near.num_decisions
    # The longest copy of each of 4 layers: at most 9 slots of 10 MB at 10 GB/s.
    assert first.ready_us - 10_000_000 <= 4 * 9 * 1000


def test_copies_are_of_changed_slots_or_of_all() -> None:
    """All once half of a device's slots change, as it takes no less."""
    moved = np.array([[[False] * 4, [True, False, False, False], [True, True, False, False], [True] * 4]])
    assert copied_slots(moved).tolist() == [[0, 1, 4, 4]]


def test_what_a_policy_is_shown() -> None:
    """Counts of whole intervals, newest first, that add up to the loads; slots of those since the change only."""
    shown = list[ExpertsView]()

    @dataclass(frozen=True, kw_only=True)
    class Watching(XllmBalanced):
        def decide(self, view: ExpertsView) -> ExpertsPlan:
            shown.append(view)
            return super().decide(view)

    loads = replace(SKEWED, drift_ticks=10.0).drawn(60, seed=1)
    told = balance(Watching(interval_us=5_000_000), loads, FOUR, PRICE)
    assert len(shown) == told.num_decisions > 5
    for view in shown:
        end = view.now_us // 1_000_000
        for layer in view.layers:
            recent = sum(sum(window.expert_tokens) for window in layer.windows)
            begun = 0 if len(layer.windows) < 8 else end - recent // (256 * 4 * 50)
            assert recent == loads.tokens[begun:end, layer.id].sum()
            is_since = [bool(window.slot_tokens) for window in layer.windows]
            assert is_since == sorted(is_since, reverse=True)
            since = sum(sum(w.expert_tokens) for w in layer.windows if w.slot_tokens)
            if not all(is_since):
                assert since == layer.num_steps_since_change * 256 * 4
    moved = [layer for view in shown for layer in view.layers if not all(w.slot_tokens for w in layer.windows)]
    assert moved


@dataclass(frozen=True, kw_only=True)
class Forgetful:
    """Every slot gets expert 0."""

    decides: ClassVar[str] = "experts"
    num_redundant_experts: ClassVar[int] = 0
    interval_us: ClassVar[int | None] = 1_000_000

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        return ExpertsPlan(slots={layer.id: (0,) * len(layer.slots) for layer in view.layers}, reason="one for all")


def test_what_cannot_be_is_refused() -> None:
    """Plans that are not legal, devices and groups that do not divide, slots that nobody could fill."""
    loads = SKEWED.drawn(3, seed=0)
    with pytest.raises(PolicyError, match="leaves no slot of layer 0"):
        balance(Forgetful(), loads, FOUR, PRICE)
    for devices in (replace(FOUR, num_devices=5), replace(FOUR, num_groups=5)):
        with pytest.raises(ConfigError, match="accepted"):
            balance(STATIC, loads, devices, PRICE)
    with pytest.raises(ConfigError, match="num_redundant_experts is 25"):
        balance(XllmBalanced(num_redundant_experts=25), loads, FOUR, PRICE)
    for changed in ({"num_nodes": 3}, {"link_bytes_per_s": 0.0}, {"expert_bytes": 0}, {"boundary_us": -1}):
        with pytest.raises(ConfigError, match="accepted"):
            replace(FOUR, **changed)
