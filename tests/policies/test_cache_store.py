"""What every policy that uses the host does with a store: saves, asks once, fetches what came, evicts it in time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.policies.tiers_by_hand import TiersByHand
from tests.small_runs import COPY_TIME, TIERED
from xllm_lab.copy_time import CopyTime, CopyWeights
from xllm_lab.policies.cache import CachePolicy

# Who keeps a part of the device clean does so always, and whoever weighs finds copies cheap.
CHEAP = CopyTime(dict.fromkeys(COPY_TIME.weights, CopyWeights(0.0, 0.01)))
USING = [replace(p, **{"low_frac": 1.0} if hasattr(p, "low_frac") else {}) for p in TIERED]


def tiers(policy: CachePolicy, **changes: Any) -> TiersByHand:
    told: Any = replace(policy, host_blocks_factor=1.0, **changes)  # type: ignore[type-var]
    return TiersByHand(told, num_blocks=4, copy_time=CHEAP, stored=set())


@pytest.mark.parametrize("policy", USING, ids=lambda p: type(p).__name__)
def test_a_prompt_comes_back_from_the_store(policy: CachePolicy) -> None:
    """Through the host, when neither device nor host has it any more; of another's, only what is asked for."""
    first = tiers(policy)
    assert first.uses([1, 2, 3])
    assert [c.kind for c in first.asks()] == ["offload"]
    assert [c.kind for c in first.asks()] == ["save"]
    assert first.stored is not None
    assert len(first.stored) == 3
    other = tiers(policy, prefetch_blocks=2)
    other.stored = first.stored
    waiting = other.request([1, 2, 3])
    (copy,) = other.asks([waiting])
    assert (copy.kind, len(copy.keys)) == ("prefetch", 2)
    (copy,) = other.asks([waiting])
    assert (copy.kind, len(copy.keys)) == ("restore", 2)
    assert other.on_device([1, 2, 3]) == 2
    assert not [c for c in other.asks([waiting]) if c.kind == "prefetch"], "it asks once"


@pytest.mark.parametrize("policy", USING, ids=lambda p: type(p).__name__)
def test_what_nobody_had_yet_gives_way_like_the_rest(policy: CachePolicy) -> None:
    """A host that is full of what was prefetched for somebody who went away."""
    one = tiers(policy)
    waiting = one.request([1, 2, 3, 4])
    assert one.stored is not None
    one.stored.update(waiting.block_keys(4))
    one.asks([waiting])
    assert one.in_host([1, 2, 3, 4]) == 4
    one.now_us = 10**9
    assert one.uses([5, 6])
    assert [c.kind for c in one.asks()] == ["offload"]
    assert one.in_host([5, 6]) == 2


@pytest.mark.parametrize("policy", USING, ids=lambda p: type(p).__name__)
def test_a_store_that_has_nothing_costs_a_question(policy: CachePolicy) -> None:
    one = tiers(policy)
    waiting = one.request([1, 2, 3])
    assert [c.kind for c in one.asks([waiting])] == ["prefetch"]
    assert one.in_host([1]) == 0
    assert one.tiering.host.num_free_slots == 4
    assert one.asks([waiting]) == []


@pytest.mark.parametrize("policy", USING, ids=lambda p: type(p).__name__)
def test_without_a_store_nobody_asks(policy: CachePolicy) -> None:
    one = TiersByHand(replace(policy, host_blocks_factor=1.0), num_blocks=4, copy_time=CHEAP)  # type: ignore[type-var]
    assert one.asks([one.request([1, 2, 3])]) == []
