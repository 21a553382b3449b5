"""Tokens of slots and devices: none is lost, copies share evenly; and what aggregates of steps and layers cost."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.policies.experts_by_hand import shares
from xllm_lab.policies.experts.placement import contiguous, peak
from xllm_lab.sim.experts.loads import ZipfLoads
from xllm_lab.sim.experts.shares import ExpertPrice, Placement, experts_us, peak_to_mean

PRICE = ExpertPrice(layer_us=20.0, token_us=0.5)


@given(data=st.data(), num_devices=st.integers(1, 5), share=st.integers(1, 4), num_layers=st.integers(1, 3))
def test_no_token_is_lost(data: st.DataObject, num_devices: int, share: int, num_layers: int) -> None:
    """What devices compute is what experts had; a copy has its even share, or one more; each layer by itself."""
    num_experts = num_devices * share
    redundant = data.draw(st.integers(0, num_experts - share))
    slots = [
        [names[e] for e in contiguous(num_experts, num_devices, redundant)]
        for names in data.draw(st.lists(st.permutations(range(num_experts)), min_size=num_layers, max_size=num_layers))
    ]
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tokens = rng.integers(0, 1000, (2, num_layers, num_experts))
    placement = Placement(slots, num_experts=num_experts, num_devices=num_devices)
    split, on_device = placement.slot_tokens(tokens), placement.device_tokens(tokens)
    assert (on_device.sum(axis=2) == tokens.sum(axis=2)).all()
    for tick in range(2):
        for layer in range(num_layers):
            loads = tokens[tick, layer].tolist()
            assert split[tick, layer].tolist() == list(shares(loads, slots[layer]))
            even = float(peak(slots[layer], loads, num_devices))
            assert abs(on_device[tick, layer].max() - even) < len(slots[layer])


def test_steps_wait_for_the_most_loaded_device_of_each_layer() -> None:
    """By hand: two layers, two devices, 10 steps of 20 us a layer and 0.5 us a token."""
    tokens = np.array([[[3, 1, 2, 2], [8, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    on_device = Placement([contiguous(4, 2)] * 2, num_experts=4, num_devices=2).device_tokens(tokens)
    assert on_device.tolist() == [[[4, 4], [8, 0]], [[0, 0], [0, 0]]]
    assert peak_to_mean(on_device).tolist() == [1.5, 1.0]
    assert experts_us(on_device, np.array([10, 0]), PRICE).tolist() == [406, 0]


def drawn(num_layers: int, num_experts: int, tokens_per_step: int, steps_per_tick: int) -> ZipfLoads:
    return ZipfLoads(
        num_layers=num_layers,
        num_experts=num_experts,
        experts_per_token=8,
        tokens_per_step=tokens_per_step,
        steps_per_tick=steps_per_tick,
        tick_us=1_000_000,
        exponent=0.8,
        drift_ticks=None,
    )


def test_ticks_in_place_of_steps_say_too_little_by_little() -> None:
    """Never too much, as a sum's maximum is at most the sum of maxima. 128 tokens a step for each of 32 devices: less
    than 4 % of a skewed placement's tokens at the peak; of few tokens a step, much more."""
    errors = []
    for tokens_per_step in (32, 4096):
        steps = drawn(4, 256, tokens_per_step, 1).drawn(100, seed=5)
        on_device = Placement([contiguous(256, 32)] * 4, num_experts=256, num_devices=32).device_tokens(steps.tokens)
        stepped = on_device.max(axis=2).sum()
        errors.append(1 - on_device.sum(axis=0).max(axis=1).sum() / stepped)
        one_tick = on_device.sum(axis=0, keepdims=True)
        told = experts_us(one_tick, np.array([100]), PRICE).sum()
        assert told <= experts_us(on_device, np.ones(100, np.int64), PRICE).sum() + 100
    assert 0 <= errors[1] < 0.04 < errors[0] < 0.4, errors


def test_some_layers_in_place_of_all() -> None:
    """A thousand and more devices, every fourth of 60 layers: within 5 % of all layers' time, ten times over; every
    twelfth, within 12 %."""
    num_devices = 1024
    placement = {
        n: Placement([contiguous(2048, num_devices)] * n, num_experts=2048, num_devices=num_devices)
        for n in (60, 15, 5)
    }
    worst = dict.fromkeys((4, 12), 0.0)
    for seed in range(10):
        loads = drawn(60, 2048, 65536, 1).drawn(1, seed=seed)
        exact = experts_us(placement[60].device_tokens(loads.tokens), loads.num_steps, PRICE)[0]
        for stride in worst:
            some = loads.every(stride)
            tokens = placement[some.num_layers].device_tokens(some.tokens)
            told = experts_us(tokens, some.num_steps, PRICE, num_layers=60)[0]
            worst[stride] = max(worst[stride], abs(told / exact - 1))
    assert 0 < worst[4] < 0.05, worst
    assert worst[4] < worst[12] < 0.12, worst
