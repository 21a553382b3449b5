"""What a plan of drafts must obey: each rule, and the sentence that tells of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policies.drafting_views import request, step
from xllm_lab.policies.api import RequestId, ceil_div
from xllm_lab.policies.draft import Ask, DraftPlan, Room, blocks_for
from xllm_lab.policies.draft_checks import draft_violations


def plan(**asks: tuple[str, int]) -> DraftPlan:
    """Of request 0 is told as `r0`."""
    return DraftPlan(asks={RequestId(int(name[1:])): Ask(*ask) for name, ask in asks.items()}, reason="as told")


@pytest.mark.parametrize(
    ("asks", "told"),
    [
        ({"r7": ("ngram", 1)}, "drafts for request 7, which does not decode"),
        ({"r0": ("mtp", 1)}, "drafts by 'mtp' for request 0, accepted: ngram, suffix"),
        ({"r0": ("ngram", 0)}, "drafts 0 tokens for request 0, 1 to 15 can be kept"),
        ({"r1": ("suffix", 3)}, "drafts 3 tokens for request 1, 1 to 2 can be kept"),
        ({"r0": ("ngram", 10), "r1": ("ngram", 1)}, "drafts take 11 tokens, 10 are left"),
        ({"r0": ("ngram", 4), "r1": ("ngram", 1)}, "drafts take 2 KV blocks, 1 are left"),
    ],
)
def test_every_rule_is_told_with_its_numbers(asks: dict[str, tuple[str, int]], told: str) -> None:
    """Both requests' last blocks are of 4 tokens; the first has room for 3 drafts, the second for none."""
    view = step(
        request(0, num_tokens=101),
        request(1, num_tokens=100, most_drafts=2),
        methods=["ngram", "suffix"],
        tokens_left=10,
        blocks_left=3 if "11" in told else 1,
        block_size=4,
    )
    assert draft_violations(view, plan(**asks)) == [told]


def test_what_fits_is_legal() -> None:
    """To the last token and block, by two methods; and so is nothing at all."""
    view = step(
        request(0, num_tokens=101),
        request(1, num_tokens=100, most_drafts=2),
        methods=["ngram", "suffix"],
        tokens_left=5,
        blocks_left=1,
        block_size=4,
    )
    assert draft_violations(view, plan(r0=("ngram", 3), r1=("suffix", 2))) == []
    assert draft_violations(view, plan()) == []


def test_all_that_is_wrong_is_told() -> None:
    """One sentence for each request."""
    assert len(draft_violations(step(request(0)), plan(r0=("mtp", 1), r5=("ngram", 1)))) == 2


@given(num_tokens=st.integers(2, 60), depth=st.integers(1, 15), block_size=st.integers(1, 20))
def test_blocks_are_those_of_the_tokens_behind(num_tokens: int, depth: int, block_size: int) -> None:
    """All known tokens have theirs already."""
    one = request(0, num_tokens=num_tokens)
    assert blocks_for(one, depth, block_size) == ceil_div(num_tokens + depth, block_size) - ceil_div(
        num_tokens, block_size
    )


@given(
    wanted=st.lists(st.tuples(st.integers(2, 60), st.integers(0, 15), st.integers(0, 20)), max_size=6),
    tokens_left=st.integers(0, 40),
    blocks_left=st.integers(0, 6),
    block_size=st.integers(1, 16),
)
def test_room_grants_what_is_legal_and_no_less(
    wanted: list[tuple[int, int, int]], tokens_left: int, blocks_left: int, block_size: int
) -> None:
    """A plan made of grants keeps every rule, and one draft more for the last one would break one or was not wanted."""
    requests = [request(i, num_tokens=n, most_drafts=most) for i, (n, most, _) in enumerate(wanted)]
    view = step(*requests, tokens_left=tokens_left, blocks_left=blocks_left, block_size=block_size)
    room = Room(view)
    for one, (_, _, depth) in zip(requests, wanted, strict=True):
        before = dict(room.plan("before").asks)
        got = room.grant(one, "ngram", depth)
        assert 0 <= got <= depth
        assert draft_violations(view, room.plan("after")) == []
        if got < depth:
            more = DraftPlan(asks={**before, one.id: Ask("ngram", got + 1)}, reason="one more")
            assert draft_violations(view, more)
