"""What devices take to exchange data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.hardware import Link, hardware
from xllm_lab.sim.cost.collectives import Collectives, collectives

LINK = Link(bytes_per_s=1e11, latency_us=2.0, num_devices=64, frac=0.5)
sizes = st.floats(0, 1e9)
groups = st.integers(2, 64)


@given(groups, sizes)
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(n: int, num_bytes: float) -> None:
    group = Collectives(n, LINK, 5.0)
    halves = group.reduce_scatter_us(num_bytes / n) + group.all_gather_us(num_bytes / n)
    assert group.all_reduce_us(num_bytes) == pytest.approx(halves)


@given(groups, sizes)
def test_none_beats_its_latency_or_its_bytes(n: int, num_bytes: float) -> None:
    """Each device must at least receive what it lacks."""
    group = Collectives(n, LINK, 5.0)
    lacking = {
        group.all_gather_us: (n - 1) * num_bytes,
        group.all_reduce_us: num_bytes,
        group.all_to_all_us: (n - 1) / n * num_bytes,
    }
    for operation, missing in lacking.items():
        assert operation(num_bytes) >= max(7.0, LINK.us(missing))
        assert operation(2 * num_bytes) >= operation(num_bytes)


def test_a_single_device_exchanges_nothing() -> None:
    alone = Collectives(1, LINK, 5.0)
    assert alone.all_reduce_us(1e9) == alone.all_gather_us(1e9) == alone.all_to_all_us(1e9) == 0


def test_groups_beyond_a_node_use_the_far_link() -> None:
    device = hardware("ascend-910b2")
    assert collectives(device, 16).all_to_all_us(1e9) > 7 * collectives(device, 8).all_to_all_us(1e9)
