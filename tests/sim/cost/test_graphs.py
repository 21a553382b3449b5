"""Padding to captured sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.errors import ConfigError
from xllm_lab.sim.cost.graphs import GraphBuckets, vllm_graph_buckets, xllm_graph_buckets

sizes = st.sets(st.integers(1, 600), max_size=20).map(lambda found: tuple(sorted(found)))


@given(sizes, st.integers(1, 700))
def test_the_smallest_that_holds_them(captured: tuple[int, ...], num_tokens: int) -> None:
    graphs = GraphBuckets(captured)
    fitting = [size for size in captured if size >= num_tokens]
    assert graphs.padded(num_tokens) == (min(fitting) if fitting else num_tokens)
    assert graphs.is_replayed(num_tokens) == bool(fitting)


def test_vllm_sizes() -> None:
    """The list in vLLM's documentation for its default of 256 sequences: 51 sizes."""
    sizes = vllm_graph_buckets(256).sizes
    assert sizes[:6] == (1, 2, 4, 8, 16, 24)
    assert sizes[-17:-15] == (256, 272)
    assert (len(sizes), sizes[-1]) == (51, 512)
    assert vllm_graph_buckets(1).sizes == (1, 2)
    assert vllm_graph_buckets(8).sizes == (1, 2, 4, 8, 16)


def test_xllm_sizes() -> None:
    """Beyond 16 an NPU runs eagerly unless the limit is raised."""
    assert xllm_graph_buckets().sizes == (1, 2, 4, 8, 16)
    assert xllm_graph_buckets(64).sizes == (1, 2, 4, 8, 16, 32, 48, 64)
    assert xllm_graph_buckets(3).sizes == (1, 2, 4)
    assert not xllm_graph_buckets().is_replayed(17)


@pytest.mark.parametrize("bad", [(0, 4), (-2,), (4, 2), (2, 2)])
def test_impossible_sizes_are_refused(bad: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="graph sizes"):
        GraphBuckets(bad)
