"""Cache policies over the real tiers: laws for all of them, and each one's choices by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policies.tiers_by_hand import TiersByHand
from tests.small_runs import values_of_knobs
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.catalog import make_policy, policies

TIERED = sorted(name for name in policies("cache") if name != "device-only")


@st.composite
def cache_policies(draw: st.DrawFn) -> CachePolicy:
    """Any that copies, with any values of its knobs; its host is small."""
    policy: CachePolicy = draw(values_of_knobs("cache", draw(st.sampled_from(TIERED))))
    return replace(policy, host_blocks_factor=draw(st.sampled_from((0.25, 0.5, 1.0, 2.0))))  # type: ignore[type-var]


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(
    policy=cache_policies(),
    num_blocks=st.integers(7, 12),
    used=st.lists(st.tuples(prompts, st.integers(0, 3)), max_size=12),
    waiting=st.lists(prompts, max_size=4),
    pause_us=st.sampled_from((0, 1000, 10**9)),
)
def test_copying_comes_to_an_end(
    policy: CachePolicy, num_blocks: int, used: list[tuple[list[int], int]], waiting: list[list[int]], pause_us: int
) -> None:
    """However often it is asked while nothing else happens: no two blocks take each other's place for ever."""
    tiers = TiersByHand(policy, num_blocks=num_blocks)
    for names, num_asks in used:
        tiers.now_us += 10 * len(names)
        tiers.uses(names)
        for _ in range(num_asks):
            tiers.asks()
    states = [tiers.request(names) for names in waiting]
    for _ in range(4 * num_blocks):
        tiers.now_us += pause_us
        if not tiers.asks(states):
            break
    else:
        pytest.fail(f"{policy} copies for ever: {tiers.records.copies[-4:]}")


@pytest.mark.parametrize("name", TIERED)
def test_requests_that_cannot_run_do_not_take_each_others_blocks(name: str) -> None:
    """The device has room for one of two prompts; the one that came first has it, and the other waits for room."""
    watermark = {"low_frac": 1.0} if name == "watermark" else {}
    tiers = TiersByHand(make_policy("cache", name, watermark), num_blocks=7)
    first, second = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]
    for names in (first, second):
        tiers.uses(names)
        tiers.asks()
        tiers.fills_the_device()
    waiting = [tiers.request(first), tiers.request(second)]
    # Others are before them, so that it pays to fetch.
    assert tiers.asks(waiting, outstanding=1000)
    assert not tiers.asks(waiting, outstanding=1000)
    assert (tiers.on_device(first), tiers.on_device(second)) == (6, 0)
