"""Step times by terms: the parts that policies ask for are parts of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.step_time import TERMS, Chunk, StepTime

WEIGHTS = st.lists(st.floats(0, 1e4), min_size=len(TERMS), max_size=len(TERMS)).map(tuple)


@given(WEIGHTS, st.integers(1, 100), st.integers(1, 20), st.integers(0, 10_000))
def test_a_row_costs_what_the_step_takes_longer(
    weights: tuple[float, ...], others: int, num_tokens: int, num_computed_tokens: int
) -> None:
    """One more row of a request, with its logits; whatever else the step computes."""
    step_time = StepTime(weights)
    rest = [Chunk(1, 7)] * others
    before, after = (
        step_time.step_us([*rest, Chunk(n, num_computed_tokens)], others + n) for n in (num_tokens, num_tokens + 1)
    )
    told = step_time.row_us(others + num_tokens, num_computed_tokens + num_tokens)
    assert told == pytest.approx(after - before, rel=1e-6, abs=1e-6 * after)
