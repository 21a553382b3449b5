"""Loads of experts: drawn ones are exact and of the stated shape; recorded ones lose no token, on disk neither."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.errors import ConfigError, TraceError
from xllm_lab.sim.experts.loads import ExpertLoads, ZipfLoads, load, recorded

PROCESS = ZipfLoads(
    num_layers=3,
    num_experts=16,
    experts_per_token=4,
    tokens_per_step=50,
    steps_per_tick=100,
    tick_us=1_000_000,
    drift_ticks=20.0,
    burst_frac=0.01,
)


def test_the_same_seed_draws_the_same_loads() -> None:
    """A longer draw begins like a shorter one, another seed draws others, and every token is there."""
    one, longer, other = PROCESS.drawn(20, seed=1), PROCESS.drawn(30, seed=1), PROCESS.drawn(20, seed=2)
    assert np.array_equal(one.tokens, longer.tokens[:20])
    assert not np.array_equal(one.tokens, other.tokens)
    assert (one.tokens.sum(axis=2) == 50 * 4 * 100).all()


def test_popularity_falls_as_stated_and_drifts_no_faster() -> None:
    """Ranked, the shares are Zipf's; a tick later they are nearly the same, after many drift times they are not."""
    process = replace(PROCESS, burst_frac=0.0, exponent=1.2, steps_per_tick=2000)
    shares = process.drawn(200, seed=0).tokens / (50 * 4 * 2000)
    expected = np.arange(1, 17) ** -1.2
    expected /= expected.sum()
    assert np.abs(-np.sort(-shares, axis=2) - expected).max() < 0.01
    kept = [np.corrcoef(shares[0, 0], shares[lag, 0])[0, 1] for lag in (1, 150)]
    assert kept[0] > 0.6 > kept[1]
    still = replace(process, drift_ticks=None).drawn(50, seed=0).tokens
    assert (np.argmax(still, axis=2) == np.argmax(still[0], axis=1)).all()


def test_a_burst_lasts_as_long_as_stated() -> None:
    """With uniform popularity, whoever has far more than its share has it for `burst_ticks`, unless it begins anew."""
    process = replace(PROCESS, exponent=0.0, burst_frac=0.002, burst_factor=30.0, burst_ticks=5, num_experts=32)
    tokens = process.drawn(400, seed=3).tokens
    is_hot = tokens > 4 * tokens.mean(axis=2, keepdims=True)
    begins = is_hot[1:] & ~is_hot[:-1]
    assert begins.sum() > 20
    lasts = [
        int(np.argmin(np.append(is_hot[t + 1 :, layer, e], False))) for t, layer, e in np.argwhere(begins).tolist()
    ]
    assert min(lasts[:-3]) == 5
    assert np.median(lasts) == 5


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 50), st.lists(st.integers(0, 9), min_size=6, max_size=6)), min_size=1, max_size=20
    ),
    tick_us=st.integers(1, 30),
)
def test_recorded_counters_lose_nothing(steps: list[tuple[int, list[int]]], tick_us: int) -> None:
    """Steps of one tick are added up; ticks without steps are there, empty."""
    ends = np.cumsum([gap for gap, _ in steps]).tolist()
    loads = recorded(
        ((end, np.reshape(rows, (2, 3))) for end, (_, rows) in zip(ends, steps, strict=True)), tick_us=tick_us
    )
    assert loads.num_steps.sum() == len(steps)
    assert loads.num_ticks == ends[-1] // tick_us + 1
    assert loads.tokens.sum(axis=0).ravel().tolist() == np.sum([rows for _, rows in steps], axis=0).tolist()


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    """And what is no such file is refused by its name."""
    loads = PROCESS.drawn(4, seed=0)
    loads.save(tmp_path / "some" / "loads.npz")
    again = load(tmp_path / "some" / "loads.npz")
    assert np.array_equal(again.tokens, loads.tokens)
    assert np.array_equal(again.num_steps, loads.num_steps)
    assert again.tick_us == loads.tick_us
    (tmp_path / "text").write_text("no arrays")
    np.savez(tmp_path / "other.npz", tokens=loads.tokens)
    np.savez(tmp_path / "halves.npz", tokens=loads.tokens / 2, num_steps=loads.num_steps, tick_us=np.int64(1))
    for wrong in ("none", "text", "other.npz", "halves.npz"):
        with pytest.raises(TraceError, match=wrong):
            load(tmp_path / wrong)


def test_loads_that_cannot_be_are_refused() -> None:
    """With what is accepted."""
    tokens, steps = np.ones((2, 1, 4), np.int64), np.ones(2, np.int64)
    for changed in (
        {"tokens": tokens[0]},
        {"num_steps": steps[:1]},
        {"tokens": -tokens},
        {"tick_us": 0},
        {"num_steps": np.zeros(2, np.int64)},
    ):
        with pytest.raises(TraceError, match="accepted"):
            ExpertLoads(**{"tokens": tokens, "num_steps": steps, "tick_us": 1, **changed})
    for changed in (
        {"experts_per_token": 17},
        {"num_layers": 0},
        {"drift_ticks": 0.0},
        {"burst_frac": 1.5},
        {"exponent": -1.0},
    ):
        with pytest.raises(ConfigError, match="accepted"):
            replace(PROCESS, **changed)
    with pytest.raises(TraceError, match="no step"):
        recorded([], tick_us=1)
    with pytest.raises(TraceError, match="shape"):
        recorded([(0, [[1, 2]]), (1, [[1]])], tick_us=1)
