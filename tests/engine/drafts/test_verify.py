"""Verification gives the tokens of plain decoding where it says so, and tells nobody of the rest of the batch.

That tokens have the right distribution is in `test_distribution.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xllm_lab.engine.drafts.verify import Row, draw_draft, kept_until_stop, verify
from xllm_lab.engine.ops.reference import argmax
from xllm_lab.engine.sampler import sample
from xllm_lab.workload import RequestId, Sampling

VOCAB = 5
# A model whose logits are a function of the last token; two of its rows have ties, which go to the smallest id.
MODEL_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
MODEL_VV[1] = torch.tensor([0.5, 2.0, -1.0, 2.0, 2.0])
MODEL_VV[4] = 0.25
OTHER_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(4))  # a draft model that is often wrong

TOKENS = st.integers(0, VOCAB - 1)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 2]),
    top_p=st.sampled_from([0.6, 1.0]),
    seed=st.integers(0, 3),
)


def rows_of(last: int, drafts: Sequence[int]) -> Tensor:
    """What the model computes behind the last token and behind each draft."""
    return MODEL_VV[[last, *drafts]]


def plain(last: int, sampling: Sampling, id: RequestId, count: int) -> list[int]:
    """Decoding without drafts."""
    tokens = [last]
    for position in range(count):
        tokens += sample(MODEL_VV[tokens[-1:]], [sampling], [id], [position])
    return tokens[1:]


def drawn_drafts(last: int, sampling: Sampling, id: RequestId, position: int, depth: int) -> tuple[list[int], Tensor]:
    """Drafts of the other model for a request that is not greedy, and what they were drawn from."""
    tokens, proposals = [last], []
    for ahead in range(depth):
        token, proposal = draw_draft(OTHER_VV[tokens[-1]], sampling, id, position + ahead)
        assert proposal is not None
        tokens.append(token)
        proposals.append(proposal)
    return tokens[1:], torch.stack(proposals)


@given(last=TOKENS, sampling=SAMPLINGS, guesses=st.lists(st.lists(TOKENS, max_size=4), min_size=12, max_size=12))
def test_tokens_are_those_of_plain_decoding_whatever_is_guessed(
    last: int, sampling: Sampling, guesses: list[list[int]]
) -> None:
    """Greedy or drawn, with good guesses and bad, none and many."""
    id, tokens = RequestId(6), list[int]()
    for drafts in guesses:
        known = [last, *tokens]
        row = Row(sampling, id, len(tokens), drafts)
        (found,) = verify(rows_of(known[-1], drafts), [row])
        assert found[:-1] == drafts[: len(found) - 1]
        tokens += found
    assert tokens == plain(last, sampling, id, len(tokens))


@given(last=TOKENS, sampling=SAMPLINGS, depth=st.integers(0, 4), wrong_at=st.integers(0, 4))
def test_drafts_that_are_right_are_all_kept(last: int, sampling: Sampling, depth: int, wrong_at: int) -> None:
    """And if one is wrong, all before it; a token more comes in either case."""
    right = plain(last, sampling, RequestId(6), 5)
    drafts = right[:depth]
    kept = depth
    if wrong_at < depth:
        drafts[wrong_at] = (drafts[wrong_at] + 1) % VOCAB
        kept = wrong_at
    assert verify(rows_of(last, drafts), [Row(sampling, RequestId(6), 0, drafts)]) == [right[: kept + 1]]


@given(last=TOKENS, seed=st.integers(0, 3), depth=st.integers(1, 4))
def test_greedy_requests_ignore_what_drafts_were_drawn_from(last: int, seed: int, depth: int) -> None:
    drafts, proposal = drawn_drafts(last, Sampling(temperature=1.0, seed=seed), RequestId(6), 0, depth)
    (tokens,) = verify(rows_of(last, drafts), [Row(Sampling(), RequestId(6), 0, drafts, proposal)])
    assert tokens == plain(last, Sampling(), RequestId(6), len(tokens))


@given(
    requests=st.lists(st.tuples(TOKENS, SAMPLINGS, st.integers(0, 3), st.booleans()), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_the_rest_of_the_batch_cannot_move_a_token(
    requests: list[tuple[int, Sampling, int, bool]], order: object
) -> None:
    """Each request verified alone, and all in one step, in any order."""
    rows, logits = [], []
    for number, (last, sampling, depth, is_drawn) in enumerate(requests):
        id = RequestId(number)
        drafts, proposal = [0, 3, 1][:depth], None
        if is_drawn and depth and sampling.temperature > 0:
            drafts, proposal = drawn_drafts(last, sampling, id, number, depth)
        rows.append(Row(sampling, id, number, drafts, proposal))
        logits.append(rows_of(last, drafts))
    alone = [verify(own, [row])[0] for own, row in zip(logits, rows, strict=True)]
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    together = verify(torch.cat([logits[i] for i in shuffled]), [rows[i] for i in shuffled])
    assert together == [alone[i] for i in shuffled]


def test_one_call_finds_the_largest_logits_of_all_rows() -> None:
    calls = []

    def counted(logits_RV: Tensor) -> list[int]:
        calls.append(len(logits_RV))
        return argmax(logits_RV)

    rows = [
        Row(Sampling(), RequestId(1), 0, (2, 2)),
        Row(Sampling(temperature=1.0), RequestId(2), 0),
        Row(Sampling(), RequestId(3), 4, (1,)),
    ]
    verify(MODEL_VV[[0, 2, 2, 3, 1, 1]], rows, argmax=counted)
    assert calls == [6]


def test_a_draft_model_that_is_the_model_is_always_right() -> None:
    """Where q is p, every draft is kept, by any number drawn."""
    for number in range(300):
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=number)
        drafts, proposals = [2], []
        for position in range(3):
            token, proposal = draw_draft(MODEL_VV[drafts[-1]], sampling, RequestId(number), position)
            assert proposal is not None
            drafts.append(token)
            proposals.append(proposal)
        row = Row(sampling, RequestId(number), 0, drafts[1:], torch.stack(proposals))
        assert verify(rows_of(2, drafts[1:]), [row])[0][:-1] == drafts[1:]


def test_a_draft_of_a_greedy_request_is_the_largest_logit_and_not_drawn() -> None:
    assert draw_draft(MODEL_VV[1], Sampling(), RequestId(1), 0) == (1, None)


@pytest.mark.parametrize(("tokens", "kept"), [([4, 7, 5, 7], [4, 7]), ([7], [7]), ([4, 5], [4, 5])])
def test_tokens_behind_one_that_ends_the_request_are_dropped(tokens: list[int], kept: list[int]) -> None:
    assert kept_until_stop(tokens, lambda token: token == 7) == kept
