"""Micro-batches that take turns: nothing is gained out of nothing, and nothing computed twice at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.sim.cost.overlap import LayerTime, overlapped

TIMES = st.builds(LayerTime, st.integers(1, 500), st.integers(0, 500))


@given(st.lists(TIMES, min_size=1, max_size=4), st.integers(1, 20))
def test_no_stream_is_in_two_places(micro_batches: list[LayerTime], layers: int) -> None:
    """At least as long as either stream, at most as long as one after the other, and exposed is what is not hidden."""
    found = overlapped(micro_batches, layers)
    compute_us = layers * sum(m.compute_us for m in micro_batches)
    communication_us = layers * sum(m.communication_us for m in micro_batches)
    assert max(compute_us, communication_us) <= found.us <= compute_us + communication_us
    assert found.exposed_us == found.us - compute_us
    assert 0 <= found.overlap_frac <= 1
    if communication_us:
        assert found.overlap_frac == pytest.approx(1 - found.exposed_us / communication_us)


@given(TIMES, st.integers(1, 20))
def test_one_micro_batch_hides_nothing(alone: LayerTime, layers: int) -> None:
    found = overlapped([alone], layers)
    assert found.us == layers * (alone.compute_us + alone.communication_us)
    assert found.overlap_frac == (0 if alone.communication_us else 1)


@given(st.lists(TIMES, min_size=1, max_size=3), st.integers(1, 10), st.integers(0, 2), st.booleans())
def test_more_is_never_faster(micro_batches: list[LayerTime], layers: int, who: int, computes: bool) -> None:
    who %= len(micro_batches)
    c, m = micro_batches[who]
    more = [*micro_batches]
    more[who] = LayerTime(c + computes, m + (not computes))
    assert overlapped(more, layers).us >= overlapped(micro_batches, layers).us
    assert overlapped(micro_batches, layers + 1).us > overlapped(micro_batches, layers).us


def test_two_equal_halves_by_hand() -> None:
    """3 us to compute and 2 to exchange, two layers: the link has the last word, and only that is exposed."""
    half = LayerTime(3, 2)
    assert overlapped([half, half], 2) == (14, 2, 0.75)
    # Where exchanging takes longer, computing waits for it in each layer.
    assert overlapped([LayerTime(2, 3), LayerTime(2, 3)], 2) == (14, 6, 0.5)
