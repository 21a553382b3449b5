"""What each cache policy does that no other does: a story for each, which is true of it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.policies.tiers_by_hand import TiersByHand
from tests.small_runs import COPY_TIME, instance_config, request, run_audited
from xllm_lab.copy_time import KINDS, CopyTime, CopyWeights
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.catalog import make_policy
from xllm_lab.workload import Workload

NAMES = ("cost-aware", "device-only", "lru", "reuse-aware", "watermark")
# A token is computed in 1 us; fetched alone, a block in less, or in far more.
FAST, SLOW = (CopyTime(dict.fromkeys(KINDS, CopyWeights(us, us))) for us in (0.1, 100.0))


def tiers(name: str, num_blocks: int = 16, *, link: CopyTime = FAST, host: float = 4.0) -> TiersByHand:
    policy = make_policy("cache", name, {"host_blocks_factor": host})
    return TiersByHand(policy, num_blocks=num_blocks, copy_time=link)


def uses(one: TiersByHand, *names: int) -> list[int]:
    """A prompt is computed and leaves; how many blocks each copy has that is asked for then."""
    one.now_us += 1000
    assert one.uses(names)
    return [len(copy.blocks) for copy in one.asks()]


def copies_nothing_however_little_room_there_is(name: str) -> bool:
    """Two prompts in turns, of which the device holds one."""
    prompts = [request(k, 500 * k, prompt=44, hashes=tuple(range(50 * (k % 2), 50 * (k % 2) + 10))) for k in range(4)]
    cache: Any = make_policy("cache", name)
    config = instance_config(max_tokens_per_batch=16, num_kv_blocks=14)
    return not run_audited(Workload(requests=tuple(prompts)), config, DecodeFirst(), cache=cache).copies


def takes_whatever_comes_at_whatever_price(name: str) -> bool:
    """On a quiet device, over a slow link, and for a block that was used more often, what was used last is copied."""
    if name == "device-only":
        return False
    one = tiers(name, link=SLOW, host=1 / 16)
    for _ in range(5):
        uses(one, 1)
    one.fills_the_device()
    return uses(one, 2) == [1]


def copies_what_is_near_its_end_when_room_runs_out(name: str) -> bool:
    """Of 16 blocks 4 are to be safe: with 10 clean ones it does nothing, with 2 it copies the 2 that would go first."""
    if name == "device-only":
        return False
    one = tiers(name)
    quiet = uses(one, 1, 2, 3, 4, 5, 6)
    pressed = uses(one, *range(7, 15))
    # A prompt's end goes before its beginning.
    return (quiet, pressed, one.in_host([1])) == ([], [2], 0)


def keeps_what_was_used_again(name: str) -> bool:
    """One block that three prompts had, and then many that one had each, in a host of four."""
    if name == "device-only":
        return False
    one = tiers(name, num_blocks=4, host=1.0)
    for _ in range(3):
        uses(one, 1)
    for k in range(2, 20):
        uses(one, k)
    one.fills_the_device()
    return (one.on_device([1]), one.in_host([1])) == (0, 1)


def copies_only_what_the_link_brings_sooner_than_it_is_computed(name: str) -> bool:
    """Over a fast link, under pressure; and over a slow one nothing."""
    if name == "device-only":
        return False
    copied = [[n for k in range(4) for n in uses(one, *range(10 * k, 10 * k + 6))] for one in both_links(name)]
    return bool(copied[0]) and not copied[1]


def both_links(name: str) -> list[TiersByHand]:
    return [tiers(name, num_blocks=8, link=link) for link in (FAST, SLOW)]


STORIES: dict[str, Callable[[str], bool]] = {
    "device-only": copies_nothing_however_little_room_there_is,
    "lru": takes_whatever_comes_at_whatever_price,
    "watermark": copies_what_is_near_its_end_when_room_runs_out,
    "reuse-aware": keeps_what_was_used_again,
    "cost-aware": copies_only_what_the_link_brings_sooner_than_it_is_computed,
}


@pytest.mark.parametrize(("name", "story"), STORIES.items())
def test_a_story_is_true_of_one_policy(name: str, story: Callable[[str], bool]) -> None:
    """Or it would not say what the policy is for."""
    assert [other for other in NAMES if story(other)] == [name]


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    """So the watermark copies the end first: the beginning stays on the device, where all behind it can be found."""
    one = tiers("watermark")
    prompt = list(range(14))
    assert uses(one, *prompt) == [2]
    keys = one.request(prompt).block_keys(14)
    assert [key in one.tiering.host for key in keys] == 12 * [False] + 2 * [True]


def test_uses_are_worth_less_as_they_age() -> None:
    """Ten half-lives after its last use, a block that eight prompts had is worth less than one that was used just now.

    With a half-life as long as all that it is kept.
    """
    kept = []
    for half_life_us in (1_000, 1_000_000):
        policy = make_policy("cache", "reuse-aware", {"half_life_us": half_life_us, "host_blocks_factor": 0.25})
        one = TiersByHand(policy, num_blocks=4, copy_time=COPY_TIME)
        for _ in range(8):
            uses(one, 1)
        one.fills_the_device()
        one.now_us += 10_000
        uses(one, 2)
        kept.append((one.in_host([1]), one.in_host([2])))
    assert kept == [(0, 1), (1, 0)]


def test_what_was_used_once_is_not_worth_a_copy() -> None:
    """Where the policy is told so."""
    one = TiersByHand(make_policy("cache", "reuse-aware", {"min_uses": 2}), num_blocks=16)
    assert uses(one, 1, 2, 3) == []
    assert uses(one, 1, 2) == [2]
    assert (one.in_host([1, 2]), one.in_host([1, 2, 3])) == (2, 2)


@pytest.mark.parametrize("name", ["cost-aware", "lru", "watermark"])
def test_old_blocks_do_not_hide_younger_ones(name: str) -> None:
    """The host has room for one block, and what lies there was used after the first two of the device.

    These come first, are worth less, and stay; the third was used last, and takes its place.
    """
    values = {"low_frac": 1.0} if name == "watermark" else {}
    policy = make_policy("cache", name, {"host_blocks_factor": 1 / 8, "max_offloading_blocks": 2, **values})
    one = TiersByHand(policy, num_blocks=8, copy_time=FAST)
    assert uses(one, 3) == [1]
    one.fills_the_device()
    one.now_us = 0
    for k, now_us in ((1, 10), (2, 20), (4, 5000)):
        one.now_us = now_us
        assert one.uses([k])
    assert one.in_host([3]) == 1
    (copy,) = one.asks()
    assert copy.keys == (one.request([4]).block_keys(1)[0],)
    assert (one.in_host([3]), one.in_host([4]), one.asks()) == (0, 1, [])
