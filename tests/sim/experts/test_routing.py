"""Routing: the most loaded device has at least its share, chance adds to it, and alike experts are the even case."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_lab.errors import ConfigError
from xllm_lab.known_models import known_model
from xllm_lab.sim.experts.loads import ExpertLoads
from xllm_lab.sim.experts.routing import Routing, popularity, routing_of, zipf_popularity
from xllm_lab.workload import stream

EXPERTS = 64
QWEN = known_model("qwen3-30b-a3b")


def drawn_rows(popularity_E: np.ndarray, num_tokens: int, k: int, num_draws: int, seed: int) -> np.ndarray:
    """Rows of each expert when each token takes k different ones by popularity (Gumbel's top k), [draws, E]."""
    rng = stream(seed, "routing test")
    gumbel = rng.gumbel(size=(num_draws, num_tokens, len(popularity_E)))
    chosen = np.argpartition(-(np.log(popularity_E) + gumbel), k - 1, axis=2)[:, :, :k]
    return np.stack([np.bincount(c.ravel(), minlength=len(popularity_E)) for c in chosen])


@given(st.floats(0, 1.5), st.sampled_from([1, 2, 8, 64]), st.integers(1, 4096), st.integers(0, 99))
@settings(max_examples=60)
def test_the_most_loaded_device_has_its_share_or_more(exponent: float, devices: int, tokens: int, seed: int) -> None:
    k = 4
    routing = Routing(zipf_popularity(3, EXPERTS, exponent, seed=seed), num_devices=devices, num_per_token=k)
    rows_L, activated_L = routing.peak(tokens)
    assert (rows_L >= tokens * k / devices * (1 - 1e-9)).all()
    assert (rows_L <= tokens * k * (1 + 1e-9)).all()
    assert (activated_L <= EXPERTS / devices + 1e-9).all()
    assert (activated_L <= rows_L + 1e-9).all()
    more_L, more_activated_L = routing.peak(tokens + 1)
    assert (more_L > rows_L).all()
    assert (more_activated_L >= activated_L).all()
    assert routing.peak_to_mean >= 1 - 1e-9


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_even_popularity_is_the_even_case(tokens: int) -> None:
    experts = QWEN.experts
    assert experts is not None
    rows_L, activated_L = routing_of(0.0, QWEN, num_devices=4).peak(tokens)
    even = tokens * experts.num_per_token / 4
    assert ((even < rows_L) & (rows_L < even + 2 * even**0.5)).all()
    assert activated_L == pytest.approx(np.full(experts.num_layers, experts.num_activated(tokens) / 4))


def test_a_copy_takes_half_of_its_experts_rows() -> None:
    """The popular expert is on both devices, and each has what the other has."""
    popularity_LE = [[0.5, 0.25, 0.25]]
    alone = Routing([[0.5, 0.5, 0.0, 0.0]], num_devices=2, num_per_token=1)
    halved = Routing(popularity_LE, num_devices=2, num_per_token=1, slots_LP=[[0, 1, 0, 2]])
    assert (alone.peak_to_mean, halved.peak_to_mean) == (2.0, 1.0)
    assert alone.peak(100)[0].tolist() == [100.0]
    assert 50 < halved.peak(100)[0][0] < 55


@pytest.mark.parametrize(("exponent", "devices"), [(0.0, 2), (0.0, 16), (0.5, 16), (0.0, 64), (1.2, 64)])
@pytest.mark.parametrize("tokens", [16, 256])
def test_the_most_loaded_device_is_foreseen(exponent: float, devices: int, tokens: int) -> None:
    """One figure a layer, beside steps whose tokens are drawn one by one."""
    k = 4
    popularity_LE = zipf_popularity(1, EXPERTS, exponent, seed=1)
    rows = drawn_rows(popularity_LE[0], tokens, k, 300, seed=2).reshape(300, devices, -1).sum(axis=2)
    counted_LE = drawn_rows(popularity_LE[0], 4096, k, 1, seed=3) / (4096 * k)
    expected = Routing(counted_LE, num_devices=devices, num_per_token=k).peak(tokens)[0][0]
    # Where devices have a handful of rows, these are no normal distribution.
    assert expected == pytest.approx(rows.max(axis=1).mean(), rel=0.16 if tokens < 100 else 0.03)


def test_by_popularity_alone_the_most_loaded_has_too_little() -> None:
    """Of 16 alike devices one always has more than its share: an eighth more with 2,048 rows."""
    routing = Routing(zipf_popularity(1, EXPERTS, 0.0), num_devices=16, num_per_token=4)
    assert routing.peak_to_mean == pytest.approx(1)
    assert routing.peak(512)[0][0] / (512 * 4 / 16) == pytest.approx(1.15, abs=0.03)


def test_thousands_of_devices_are_classes_of_alike_ones() -> None:
    """The same as one by one, where these can be held one by one."""
    rng = stream(5, "devices")
    shares_LE = rng.dirichlet(np.full(4096, 3.0), size=2)
    many = Routing(shares_LE, num_devices=4096, num_per_token=8)
    rows = rng.multinomial(100_000 * 8, shares_LE[0], size=50).max(axis=1).mean()
    assert many.peak(100_000)[0][0] == pytest.approx(rows, rel=0.02)


def test_loads_give_their_popularity() -> None:
    tokens = np.array([[[3, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 2, 2], [0, 0, 0, 0]]])
    loads = ExpertLoads(tokens=tokens, num_steps=np.array([1, 1]), tick_us=10)
    assert popularity(loads).tolist() == [[3 / 8, 1 / 8, 2 / 8, 2 / 8], [0.25] * 4]
    with pytest.raises(ConfigError, match=r"the loads are of 4 experts, .* has 128"):
        routing_of(loads, QWEN, num_devices=2)


@pytest.mark.parametrize(
    ("popularity_LE", "devices", "told"),
    [
        ([0.5, 0.5], 1, "layers by experts"),
        ([[0.5, 0.6]], 1, "sum to 1"),
        ([[1.5, -0.5]], 1, "at least 0"),
        ([[0.5, 0.5]], 4, "2 slots of experts on 4 devices"),
    ],
)
def test_what_is_no_routing_is_refused(popularity_LE: list[list[float]], devices: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Routing(popularity_LE, num_devices=devices, num_per_token=1)


def test_a_dense_model_has_nothing_to_route() -> None:
    with pytest.raises(ConfigError, match="has none"):
        routing_of(1.0, known_model("llama-3.1-8b"), num_devices=2)
