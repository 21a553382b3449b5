"""Prompt lookup drafts what a look through the whole context would find, however the request grew."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.drafts.asking import ask, texts
from xllm_lab.engine.drafts.ngram import NgramProposer
from xllm_lab.errors import ConfigError
from xllm_lab.workload import RequestId


def looked_up(known: list[int], depth: int, max_ngram: int, min_ngram: int) -> list[int]:
    """The definition: try every place from the end."""
    for size in range(max_ngram, min_ngram - 1, -1):
        for start in range(len(known) - size - 1, -1, -1):
            if known[start : start + size] == known[-size:]:
                return known[start + size : start + size + depth]
    return []


@given(
    prompt=texts(),
    output=texts(min_size=0),
    told=st.lists(st.integers(0, 4), max_size=12),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    forgotten=st.sets(st.integers(0, 12)),
)
def test_drafts_are_those_of_a_look_through_the_context(
    prompt: list[int], output: list[int], told: list[int], sizes: tuple[int, int], forgotten: set[int]
) -> None:
    """Asked as the output grows by any number of tokens at a time, and after it was forgotten in between."""
    most, least = max(sizes), min(sizes)
    proposer = NgramProposer(max_ngram=most, min_ngram=least)
    num_output = 0
    for turn, num_more in enumerate([0, *told]):
        num_output = min(num_output + num_more, len(output))
        if turn in forgotten:
            proposer.forget(RequestId(5))
        depth = 1 + turn % 5
        drafts = proposer.propose([ask(5, prompt, output[:num_output], depth)])
        assert drafts == [looked_up(prompt + output[:num_output], depth, most, least)]


def test_requests_do_not_see_one_another() -> None:
    """The second has nothing to look up, whatever the first says."""
    asked = [ask(1, [7, 8, 9, 7], [], 2), ask(2, [7], [], 2), ask(3, [7, 8], [7], 5)]
    assert NgramProposer().propose(asked) == [[8, 9], [], [8, 7]]


def test_the_longest_match_wins_and_of_equal_ones_the_latest() -> None:
    """1 was followed by 9 last, but 5 1 by 2; and 3 by 4 before it was followed by 6."""
    assert NgramProposer(max_ngram=2).propose([ask(1, [5, 1, 2, 1, 9, 5, 1], [], 2)]) == [[2, 1]]
    assert NgramProposer(max_ngram=2).propose([ask(1, [3, 4, 3, 6, 0, 3], [], 3)]) == [[6, 0, 3]]


def test_a_draft_ends_where_the_known_tokens_end() -> None:
    assert NgramProposer().propose([ask(1, [1, 2, 1, 2], [], 9)]) == [[1, 2]]


@pytest.mark.parametrize(("most", "least"), [(3, 0), (2, 3)])
def test_sizes_that_make_no_sense_are_refused(most: int, least: int) -> None:
    with pytest.raises(ConfigError, match=f"min_ngram is {least} and max_ngram {most}"):
        NgramProposer(max_ngram=most, min_ngram=least)
