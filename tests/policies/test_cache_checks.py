"""What a plan of copies must obey: each rule, and the sentence that tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.drawn_cache_views import DrawnCacheView, DrawnWaiting, drawn_cache_view
from xllm_lab.policies.api import RequestId
from xllm_lab.policies.cache import CachedBlock, CachePlan, Copies, waiting_key
from xllm_lab.policies.cache_checks import cache_violations


def block(block_id: int, last_used_us: int = 0) -> CachedBlock:
    return CachedBlock(id=block_id, num_uses=1, last_used_us=last_used_us, depth=0)


def waits(request_id: int, *, device: int = 0, idle: int = 0, host: int = 0, unasked: int = 0) -> DrawnWaiting:
    return DrawnWaiting(
        id=RequestId(request_id),
        arrival_us=0,
        priority=2,
        num_tokens=100,
        num_device_blocks=device,
        num_idle_blocks=idle,
        num_host_blocks=host,
        num_unasked_blocks=unasked,
    )


def tiers(**changes: Any) -> DrawnCacheView:
    """Of the device, three idle blocks and two clean ones are free; of the host, one beside three that hold something.

    Request 0 keeps an idle block and wants two; request 1 wants three. Two of the host's blocks are not in the store,
    which request 1 could ask for four more.
    """
    scene: dict[str, Any] = {
        "num_blocks": 9,
        "num_free_blocks": 5,
        "num_clean_blocks": 2,
        "num_host_blocks": 4,
        "num_free_host_blocks": 1,
        "num_offloading": 0,
        "num_restoring": 0,
        "idle_blocks": [block(1), block(2), block(3)],
        "hosted_blocks": [block(11), block(12), block(13)],
        "has_store": True,
        "num_saving": 0,
        "num_prefetching": 0,
        "unsaved_blocks": [block(12), block(13)],
        "waiting": [waits(0, device=3, idle=1, host=2), waits(1, host=3, unasked=4)],
    }
    return replace(drawn_cache_view(0), **{**scene, **changes})


def plan(offload: tuple[int, ...] = (), evict: tuple[int, ...] = (), **restore: int) -> CachePlan:
    """Of request 0 is told as `r0`."""
    wanted = {RequestId(int(name[1:])): n for name, n in restore.items()}
    return CachePlan(offload=offload, evict=evict, restore=wanted, reason="as told")


def stores(save: tuple[int, ...] = (), evict: tuple[int, ...] = (), timeout_us: int = 9, **prefetch: int) -> CachePlan:
    wanted = {RequestId(int(name[1:])): n for name, n in prefetch.items()}
    return CachePlan(save=save, evict=evict, prefetch=wanted, prefetch_timeout_us=timeout_us, reason="as told")


@pytest.mark.parametrize(
    "legal",
    [
        plan(),
        plan((2,)),
        plan((2, 1), (12,)),
        plan((1, 2, 3), (13, 11)),
        plan(r0=2),
        plan(r1=3),
        plan(r0=1, r1=3),
        plan((1, 2), (11,), r0=2),
        stores((13, 12)),
        stores((), (11, 12, 13), r1=4),
        stores((13,), (11, 12), r1=3),
        replace(plan((1,), (11,), r0=2), prefetch={RequestId(1): 1}, prefetch_timeout_us=1),
    ],
    ids=str,
)
def test_what_there_is_room_for_is_legal(legal: CachePlan) -> None:
    """To the last block of either tier; and so is nothing at all."""
    assert cache_violations(tiers(), legal) == []


@pytest.mark.parametrize(
    ("view", "illegal", "told"),
    [
        ({"num_free_host_blocks": 2}, plan((1, 1)), "offloads block 1 2 times"),
        ({"num_free_host_blocks": 0}, plan((1, 2), (11, 11)), "evicts host block 11 2 times"),
        ({}, plan((4,)), "offloads blocks [4], which are not idle, not cached, or in the host already"),
        ({"num_free_host_blocks": 0}, plan((1,), (1,)), "evicts host blocks [1], which hold nothing or are in a copy"),
        ({}, plan((1, 2)), "offloads 2 blocks, the host has room for 1"),
        ({}, plan((1, 2, 3), (11,)), "offloads 3 blocks, the host has room for 2"),
        ({}, plan((1,), (11,)), "evicts 1 host blocks for 1 that take 0"),
        ({}, plan((), (11,)), "evicts 1 host blocks for 0 that take 0"),
        ({}, plan((1, 2), (11, 12)), "evicts 2 host blocks for 2 that take 1"),
        ({"num_free_host_blocks": 0}, plan((1,), (11, 12)), "evicts 2 host blocks for 1 that take 1"),
        ({}, plan(r7=1), "restores blocks of request 7, which does not wait for any"),
        ({}, plan(r0=3), "restores 3 blocks of request 0, the host has 2"),
        ({}, plan(r0=0), "restores 0 blocks of request 0, the host has 2"),
        ({}, plan(r0=-1), "restores -1 blocks of request 0, the host has 2"),
        ({}, plan(r0=2, r1=3), "takes 6 blocks to offload and restore, 5 are free on the device"),
        ({"num_free_blocks": 2}, plan(r0=2), "takes 3 blocks to offload and restore, 2 are free on the device"),
        ({}, stores((13, 13)), "saves host block 13 2 times"),
        ({}, stores((11,)), "saves host blocks [11], which hold nothing, are in a copy, or were saved"),
        ({}, stores((12,), (12,), r1=2), "saves and evicts host blocks [12]"),
        ({}, stores(r1=2), "offloads 0 blocks and prefetches 2, the host has room for 1"),
        ({}, stores((), (11,), r1=1), "evicts 1 host blocks for 1 that take 0"),
        ({}, stores(r0=1), "prefetches 1 blocks of request 0, which has 0 to ask for"),
        ({"num_free_host_blocks": 9}, stores(r1=5), "prefetches 5 blocks of request 1, which has 4 to ask for"),
        ({}, stores(r7=1), "prefetches blocks of request 7, which does not wait for any"),
        ({}, stores(r1=1, timeout_us=0), "prefetches for 0 us"),
        (
            {},
            replace(stores(r1=1), restore={RequestId(1): 1}),
            "prefetches and restores blocks of request 1",
        ),
        ({}, plan((1, 2), (11,), r0=1, r1=2), "takes 6 blocks to offload and restore, 5 are free on the device"),
    ],
    ids=str,
)
def test_every_rule_is_told_alone_with_its_numbers(view: Mapping[str, Any], illegal: CachePlan, told: str) -> None:
    assert cache_violations(tiers(**view), illegal) == [told]


def test_all_that_is_wrong_is_told() -> None:
    """One sentence for each."""
    assert len(cache_violations(tiers(), plan((4, 4, 1), (7,), r0=9, r7=1))) == 7


@given(number=st.integers(0, 500), wanted=st.lists(st.integers(-1, 20), min_size=6, max_size=6))
def test_copies_grant_what_is_legal_and_no_less(number: int, wanted: list[int]) -> None:
    """A plan made of grants keeps every rule; one block more for the last one would break one, or was not wanted."""
    view = drawn_cache_view(number)
    copies = Copies(view)
    copies.offload(view.idle_blocks[: max(0, wanted[0])])
    assert cache_violations(view, copies.plan("offloaded")) == []
    for request, num in zip(sorted(view.waiting, key=waiting_key), wanted, strict=False):
        before = copies.plan("before")
        asked = dict(before.restore)
        got = copies.restore(request, num)
        assert 0 <= got <= max(0, num)
        assert cache_violations(view, copies.plan("after")) == []
        more = replace(before, restore={**asked, request.id: got + 1})
        # Who got nothing has its idle blocks kept all the same: those who come later have that much less.
        if got < num and all(r.id in asked for r in view.waiting if waiting_key(r) < waiting_key(request)):
            assert cache_violations(view, more)


@given(st.integers(0, 500))
def test_the_host_keeps_what_is_worth_most(number: int) -> None:
    """Of what it has and what it is offered, the best first; nothing goes for its equal."""
    view = drawn_cache_view(number)

    def worth(one: CachedBlock) -> tuple[float, int]:
        return one.num_uses, -one.last_used_us

    offered = sorted(view.idle_blocks, key=worth, reverse=True)
    copies = Copies(view)
    copies.offload(offered, worth)
    told = copies.plan("the best")
    assert told.offload == tuple(b.id for b in offered[: len(told.offload)])
    for victim, taken in zip(told.evict, offered[view.num_free_host_blocks :], strict=False):
        (lost,) = [b for b in view.hosted_blocks if b.id == victim]
        assert worth(lost) < worth(taken)
    kept = [worth(b) for b in view.hosted_blocks if b.id not in told.evict]
    assert not (refused := offered[len(told.offload) :]) or not kept or worth(refused[0]) <= min(kept)
