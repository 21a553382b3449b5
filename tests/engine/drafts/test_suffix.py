"""Suffix drafts are those of xLLM's definitions, worked out by counting; and the cases of xLLM's own unit test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.drafts.asking import ask, texts
from tests.engine.drafts.test_substrings import counted
from xllm_lab.engine.drafts.suffix import EndedOutputs, SuffixParams, SuffixProposer
from xllm_lab.errors import ConfigError
from xllm_lab.workload import RequestId

PARAMS = st.builds(
    SuffixParams,
    cache_max_depth=st.integers(2, 9),
    max_spec_factor=st.sampled_from([0.5, 1.0, 2.0]),
    max_spec_offset=st.sampled_from([-1.0, 0.0, 1.5]),
    min_token_prob=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    max_cached_requests=st.sampled_from([-1, 0, 1, 2]),
)


def occurrences(sequences: Sequence[list[int]], run: list[int]) -> int:
    return sum(tokens[i : i + len(run)] == run for tokens in sequences for i in range(len(tokens)))


def path(sequences: Sequence[list[int]], run: list[int], limit: int, least: float) -> tuple[list[int], float]:
    """What followed a run most often, token by token, and the sum of the probabilities."""
    drafts: list[int] = []
    probability, score = 1.0, 0.0
    while len(drafts) < limit:
        followed = {token: occurrences(sequences, [*run, *drafts, token]) for token in range(4)}
        best = min(followed, key=lambda token: (-followed[token], token))
        probability *= followed[best] / occurrences(sequences, run + drafts)
        if not followed[best] or probability < least:
            break
        drafts.append(best)
        score += probability
    return drafts, score


def defined(
    sequences: Sequence[list[int]], context: list[int], depth: int, params: SuffixParams
) -> tuple[list[int], float]:
    """xLLM's SuffixTree::speculate, on sequences that are counted anew for every question."""
    drafts, score = list[int](), 0.0
    context = context[-params.cache_max_depth :]
    for matched in range(1, len(context)):
        run = context[-matched:]
        if not occurrences(sequences, run):
            break
        # The tree is no deeper than so many tokens.
        limit = min(params.most_tokens(matched, depth), params.cache_max_depth - matched)
        found = path(sequences, run, limit, params.min_token_prob)
        if found[1] >= score:
            drafts, score = found
    return drafts, score


class Told:
    """What a proposer was told, and what it should draft by definition."""

    def __init__(self, params: SuffixParams) -> None:
        self.params = params
        self.live: dict[int, tuple[list[int], list[int]]] = {}
        self.ended: dict[int, list[int]] = {}

    def drafts(self, number: int, prompt: list[int], output: list[int], depth: int) -> list[int]:
        if number not in self.live:
            self.ended.pop(number, None)
        self.live[number] = (prompt, output)
        known = prompt + output
        own, own_score = defined([known], known, depth, self.params)
        others, score = defined(list(self.ended.values()), known, depth, self.params)
        return own if own_score >= score else others

    def forget(self, number: int) -> None:
        _, output = self.live.pop(number, ([], []))
        most = self.params.max_cached_requests
        if output and most:
            if len(self.ended) == most:
                del self.ended[next(iter(self.ended))]
            self.ended[number] = output


@settings(max_examples=150, deadline=None)
@given(
    params=PARAMS,
    requests=st.lists(st.tuples(texts(max_size=16), texts(min_size=0, max_size=16)), min_size=1, max_size=4),
    events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 5)), max_size=20),
)
def test_drafts_are_those_of_the_definition(
    params: SuffixParams, requests: list[tuple[list[int], list[int]]], events: list[tuple[int, int, int]]
) -> None:
    """Requests grow, end, and begin anew in any order. An event is (request, tokens more or 5 to end, depth)."""
    proposer, told = SuffixProposer(params), Told(params)
    grown = [0] * len(requests)
    for which, num_more, depth in events:
        number = which % len(requests)
        if num_more == 5:
            proposer.forget(RequestId(number))
            told.forget(number)
            continue
        prompt, output = requests[number]
        grown[number] = min(grown[number] + num_more, len(output))
        so_far = output[: grown[number]]
        assert proposer.propose([ask(number, prompt, so_far, depth)]) == [told.drafts(number, prompt, so_far, depth)]


@given(
    outputs=st.lists(texts(), max_size=12), most=st.integers(-1, 3), max_depth=st.integers(2, 6), back=st.integers(0, 9)
)
def test_only_the_outputs_that_ended_last_are_counted(
    outputs: list[list[int]], most: int, max_depth: int, back: int
) -> None:
    """Evicted ones are subtracted to the last count, and their states are dropped before they outnumber the others."""
    ended, there = EndedOutputs(max_depth, most), dict[int, list[int]]()
    for number, output in enumerate(outputs):
        ended.add(RequestId(number), output)
        there[number] = output
        if 0 <= most < len(there):
            del there[next(iter(there))]
        if number == back:
            ended.withdraw(RequestId(number))
            there.pop(number, None)
    expected = counted(list(there.values()), max_depth)
    for run in counted(outputs, max_depth):
        assert ended.counts.count(run) == expected[run]
    # Two states a token; at most as many tokens were removed as are there, and one sequence more may have gone first.
    live = sum(len(output) for output in there.values())
    assert ended.counts.num_states <= 1 + 2 * (2 * live + 2 * max((len(o) for o in outputs), default=0))


def drafts(proposer: SuffixProposer, number: int, prompt: list[int], output: list[int], depth: int) -> list[int]:
    return list(proposer.propose([ask(number, prompt, output, depth)])[0])


def test_what_followed_most_often_is_drafted_as_far_as_the_match_was_long() -> None:
    """5 was followed by 1 twice and by 2 once; a match of one token drafts one, of two tokens two."""
    proposer = SuffixProposer()
    assert drafts(proposer, 1, [5, 1, 9, 5, 2, 8, 5, 1, 7, 5], [], 4) == [1]
    assert drafts(proposer, 2, [4, 5, 6, 7, 8, 4, 5], [], 4) == [6, 7]


def test_equal_counts_go_to_the_smaller_token() -> None:
    assert drafts(SuffixProposer(), 1, [5, 3, 9, 5, 2, 8, 5], [], 1) == [2]


def test_a_draft_ends_where_it_is_hardly_likely() -> None:
    """The request's own last token is an occurrence too, as in xLLM: 1 follows 5 with probability 1/3."""
    prompt = [5, 1, 4, 5, 2, 3, 5]
    assert drafts(SuffixProposer(SuffixParams(min_token_prob=0.33)), 1, prompt, [], 1) == [1]
    assert drafts(SuffixProposer(SuffixParams(min_token_prob=0.34)), 1, prompt, [], 1) == []


def test_a_requests_own_output_is_drafted() -> None:
    """xLLM's AddResponseAndSpeculate, with a context that the request has really reached."""
    proposer = SuffixProposer(SuffixParams(max_spec_factor=2.0, min_token_prob=0.01))
    assert drafts(proposer, 1, [1, 2, 3], [4, 5, 6, 7, 2, 3, 4], 4)[0] == 5


def test_outputs_of_requests_that_ended_are_drafted_and_their_prompts_are_not() -> None:
    """xLLM's GlobalCacheSpeculateAcrossRequests and AddPromptOnlyDoesNotPolluteGlobalCache."""
    params = SuffixParams(max_spec_factor=2.0, min_token_prob=0.01)
    context = [1, 2, 10, 20, 30, 40]
    proposer = SuffixProposer(params)
    drafts(proposer, 1, [10, 20, 30], [40, 50, 60], 3)
    assert drafts(proposer, 2, context, [], 3) == []  # it has not ended
    proposer.forget(RequestId(1))
    assert drafts(proposer, 3, context, [], 3) == [50, 60]
    proposer = SuffixProposer(params)
    drafts(proposer, 1, [10, 20, 30, 40, 50, 60], [], 3)
    proposer.forget(RequestId(1))
    assert drafts(proposer, 2, context, [], 3) == []


@pytest.mark.parametrize(("most", "found"), [(-1, [[50], [51]]), (1, [[], [51]]), (0, [[], []])])
def test_the_oldest_output_goes_first(most: int, found: list[list[int]]) -> None:
    """xLLM's EvictionByMaxCachedRequests and MaxCachedRequestsZeroDisablesGlobalCache, of outputs 40 50 and 41 51."""
    proposer = SuffixProposer(SuffixParams(max_cached_requests=most))
    for number in (0, 1):
        drafts(proposer, number, [9], [40 + number, 50 + number], 1)
        proposer.forget(RequestId(number))
    assert [drafts(proposer, 2 + last, [1, 40 + last], [], 1) for last in (0, 1)] == found


def test_a_request_that_comes_again_is_not_its_own_other() -> None:
    """It lost its KV after three tokens; what was kept of them is taken back, and kept whole when it ends."""
    proposer = SuffixProposer()
    drafts(proposer, 1, [9], [40, 50, 60], 1)
    proposer.forget(RequestId(1))
    assert drafts(proposer, 1, [9], [40], 1) == []
    drafts(proposer, 1, [9], [40, 50, 60, 70], 1)
    proposer.forget(RequestId(1))
    assert drafts(proposer, 2, [50, 60], [], 1) == [70]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cache_max_depth": 1}, "cache_max_depth is 1, at least 2"),
        ({"max_spec_factor": -0.5}, "max_spec_factor is -0.5, at least 0"),
        ({"max_spec_offset": float("nan")}, "max_spec_offset is nan, a finite number"),
        ({"min_token_prob": 1.5}, "min_token_prob is 1.5, 0 to 1"),
        ({"max_cached_requests": -2}, "max_cached_requests is -2, at least -1"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SuffixParams(**values)
