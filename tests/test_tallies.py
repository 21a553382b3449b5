"""Counts of drafts: what policies see is what was verified, and of a request only what was verified lately."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.policies.draft import RECENT_VERIFICATIONS, Tally
from xllm_lab.tallies import RecentTallies, Tallies

VERIFICATIONS = st.lists(
    st.tuples(st.sampled_from(("ngram", "mtp")), st.integers(1, 15), st.integers(0, 15)).map(
        lambda v: (v[0], v[1], min(v[1], v[2]))
    ),
    max_size=60,
)


def counted(verified: list[tuple[str, int, int]], method: str, last: int | None) -> Tally:
    """By the definition, of the last so many by the method."""
    own = [some for name, *some in verified if name == method]
    own = own if last is None else own[-last:]
    deepest = max((drafted for drafted, _ in own), default=0)
    return Tally(*(tuple(sum(some[k] > p for some in own) for p in range(deepest)) for k in (0, 1)))


@given(VERIFICATIONS)
def test_counts_are_those_of_the_definition(verified: list[tuple[str, int, int]]) -> None:
    """After every verification, of all and of the last few."""
    every, recent = Tallies(), RecentTallies()
    for num, verification in enumerate(verified, start=1):
        every.add(*verification)
        recent.add(*verification)
        for method in ("ngram", "mtp", "suffix"):
            assert every.of(method) == counted(verified[:num], method, None)
            assert recent.of(method) == counted(verified[:num], method, RECENT_VERIFICATIONS)
