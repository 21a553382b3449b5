"""Two constants say how long calls take, and are those of the calls that were measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.places import store_at
from xllm_lab.errors import ConfigError
from xllm_lab.store.timing import LinkTime, fit_link_time, fit_store_times, time_store

SIZES = (100_000, 400_000, 1_500_000, 6_000_000)


@given(latency_us=st.floats(1, 1e5), bytes_per_s=st.floats(1e7, 1e11))
def test_a_link_that_obeys_is_found(latency_us: float, bytes_per_s: float) -> None:
    link = LinkTime(latency_us=latency_us, bytes_per_s=bytes_per_s)
    found = fit_link_time((size, link.us(size)) for size in SIZES)
    for size in SIZES:
        assert found.us(size) == pytest.approx(link.us(size), rel=1e-6)


@given(
    latency_us=st.floats(10, 1e4),
    bytes_per_s=st.floats(1e8, 1e10),
    scatter=st.lists(st.floats(0.9, 1.1), min_size=12, max_size=12),
)
def test_scatter_moves_the_fit_no_further_than_itself(
    latency_us: float, bytes_per_s: float, scatter: list[float]
) -> None:
    """And one stall in three calls moves nothing."""
    link = LinkTime(latency_us=latency_us, bytes_per_s=bytes_per_s)
    samples = [(size, link.us(size) * factor) for size, factor in zip(SIZES * 3, scatter, strict=True)]
    found = fit_link_time([*samples[:8], *((size, us * 50) for size, us in samples[8:])])
    calm = fit_link_time([(size, max(a, b)) for (size, a), (_, b) in zip(samples[:4], samples[4:8], strict=True)])
    for size in SIZES:
        assert found.us(size) == pytest.approx(calm.us(size))
        assert found.us(size) == pytest.approx(link.us(size), rel=0.25)


def test_what_does_not_grow_with_size_is_latency() -> None:
    assert fit_link_time([(1, 50), (1000, 50), (10_000, 40)]).bytes_per_s == math.inf


def test_too_little_is_refused() -> None:
    with pytest.raises(ConfigError, match="of 1 sizes; at least 2 are accepted"):
        fit_link_time([(1000, 5), (1000, 6)])
    with pytest.raises(ConfigError, match="a call of 1000 bytes took 0 us"):
        fit_link_time([(1000, 0), (2000, 6)])


def test_a_store_is_timed(tmp_path: Path) -> None:
    """Each operation, size and batch as often as asked; and the times have a latency."""
    opened = lambda size: store_at(f"dir:{tmp_path}", size, batch_blocks=4)  # noqa: E731
    samples = list(time_store(opened, sizes=(1000, 100_000), batches=(1, 4), repeats=3))
    assert len(samples) == 3 * 2 * 2 * 3
    assert {(s.operation, s.num_blocks, s.num_bytes) for s in samples} == {
        (name, n, n * size) for name in ("put", "get", "probe") for n in (1, 4) for size in (1000, 100_000)
    }
    times = fit_store_times(samples)
    assert set(times) == {"put", "get", "probe"}
    assert all(link.us(0) >= 0 and link.us(1e9) > 0 for link in times.values())


def test_a_store_that_is_too_small_is_not_timed(tmp_path: Path) -> None:
    opened = lambda size: store_at(f"dir:{tmp_path}?bytes=2000", size)  # noqa: E731
    with pytest.raises(ConfigError, match=r"did 0 .*a store with room for them is expected"):
        list(time_store(opened, sizes=(10_000,), batches=(1,), repeats=1))
