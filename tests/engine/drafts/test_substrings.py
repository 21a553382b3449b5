"""Counts are those of going through all sequences, after any additions and removals."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.engine.drafts.asking import texts
from xllm_lab.engine.drafts.substrings import SubstringCounts

RUNS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=20)


def counted(sequences: list[list[int]], max_tokens: int) -> Counter[tuple[int, ...]]:
    """Every run of up to `max_tokens` tokens at every place."""
    return Counter(
        tuple(tokens[start:end])
        for tokens in sequences
        for start in range(len(tokens))
        for end in range(start + 1, min(start + max_tokens, len(tokens)) + 1)
    )


@given(changes=st.lists(st.one_of(texts(), st.integers(0, 5)), max_size=14), max_tokens=st.integers(1, 8), others=RUNS)
def test_counts_are_those_of_the_sequences_that_are_there(
    changes: list[list[int] | int], max_tokens: int, others: list[list[int]]
) -> None:
    """A list is a sequence that is added, a number one that is removed; counts are right after each change."""
    counts, there = SubstringCounts(max_tokens), list[list[int]]()
    for change in changes:
        if isinstance(change, list):
            counts.add(change)
            there.append(change)
        elif there:
            counts.remove(there.pop(change % len(there)))
        expected = counted(there, max_tokens)
        for run in [*expected, *(tuple(other[:max_tokens]) for other in others)]:
            assert counts.count(run) == expected[run]


@given(tokens=texts(), max_tokens=st.integers(1, 8), longest=st.integers(0, 8))
def test_matches_at_the_end_are_all_that_occur(tokens: list[int], max_tokens: int, longest: int) -> None:
    """Their lengths are 1 to the longest, each once, the longest first; and each state counts its strings."""
    longest = min(longest, max_tokens, len(tokens))
    counts = SubstringCounts(max_tokens)
    counts.add(tokens)
    matches = list(counts.matches_at_end(longest))
    assert matches == list(counts.matches(tokens[len(tokens) - longest :]))
    lengths = [m for match in matches for m in range(match.longest, match.shortest - 1, -1)]
    assert lengths == list(range(longest, 0, -1))
    expected = counted([tokens], max_tokens)
    for match in matches:
        for length in range(match.shortest, match.longest + 1):
            ending = tuple(tokens[len(tokens) - length :])
            followed = {run[-1]: n for run, n in counted([tokens], length + 1).items() if run[:-1] == ending}
            assert counts.count(ending) == expected[ending]
            if followed:
                best = min(followed, key=lambda token: (-followed[token], token))
                probability = followed[best] / expected[ending]
                if length < max_tokens:
                    assert counts.continuation(match.state, 1, 0.0) == ([best], [probability])


def test_a_text_that_repeats_one_token_is_counted_in_a_state_a_token() -> None:
    """Its every token ends as many runs as there are tokens before it; only those asked for are counted."""
    counts = SubstringCounts(4)
    counts.add([7] * 3000)
    assert [counts.count([7] * n) for n in (1, 2, 3, 4)] == [3000, 2999, 2998, 2997]
    assert counts.num_states == 3001
