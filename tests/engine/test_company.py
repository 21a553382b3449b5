"""Engines that step together rest together: whatever comes when, nobody waits for one that rests."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.engine.company import Company


class Rank:
    """One of them: it hears of calls late, and has work for some steps after one that was its own."""

    def __init__(self) -> None:
        self.company = Company()
        self.unheard: deque[tuple[int, int]] = deque()  # number of the call, steps that it asks of this one
        self.steps = 0

    @property
    def meets(self) -> bool:
        return self.steps > 0 or self.company.is_needed

    def hear(self) -> None:
        number, steps = self.unheard.popleft()
        self.company.num_calls = number
        self.steps += steps


@st.composite
def events(draw: st.DrawFn) -> tuple[int, list[tuple[str, int]]]:
    """Of so many ranks: a call for one of them, or one of them hears."""
    size = draw(st.integers(1, 4))
    return size, draw(st.lists(st.tuples(st.sampled_from(["call", "hear"]), st.integers(0, size - 1)), max_size=40))


@given(events(), st.integers(1, 3))
def test_nobody_waits_for_one_that_rests(case: tuple[int, list[tuple[str, int]]], steps: int) -> None:
    """Whoever rests while others wait has something to hear, and in the end all rest."""
    size, drawn = case
    ranks, num_calls = [Rank() for _ in range(size)], 0
    for kind, which in [*drawn, *(("hear", r) for r in range(size) for _ in drawn)]:
        if kind == "call":
            num_calls += 1
            for number, rank in enumerate(ranks):
                rank.unheard.append((num_calls, steps if number == which else 0))
        elif ranks[which].unheard:
            ranks[which].hear()
        while all(rank.meets for rank in ranks):
            _meet(ranks)
        if any(rank.meets for rank in ranks):
            assert all(rank.meets or rank.unheard for rank in ranks)
    assert not any(rank.meets or rank.steps for rank in ranks)


def _meet(ranks: list[Rank]) -> None:
    requests, calls = [rank.steps for rank in ranks], [rank.company.num_calls for rank in ranks]
    for rank in ranks:
        rank.company.met(requests, calls)
        rank.steps = max(0, rank.steps - 1)
