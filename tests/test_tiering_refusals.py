"""What tiers refuse: plans that break a rule, and instances where nothing can be copied."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from tests.policies import cache_sins
from tests.policies.tiers_by_hand import TiersByHand
from tests.small_runs import HandDriven, instance_config, request
from xllm_lab.errors import PolicyError
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache import CachePlan, CachePolicy, CacheView
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.catalog import policy_name
from xllm_lab.tiering import Tiering

SINS: dict[str, CachePolicy] = {
    r"offloads blocks \[\d+\], which are not idle, not cached, or in the host": cache_sins.OffloadsWhatIsUsed(),
    r"offloads block \d+ 2 times": cache_sins.OffloadsTwice(),
    r"offloads blocks \[\d+\], which are not idle, not cached, or in the": cache_sins.OffloadsAgain(),
    r"offloads \d+ blocks, the host has room for \d+": cache_sins.OffloadsWithoutRoom(),
    r"evicts 1 host blocks for \d+ that take 0": cache_sins.EvictsForNothing(),
    r"evicts \d+ host blocks for \d+ that take [1-9]": cache_sins.EvictsTooMuch(),
    r"evicts host blocks \[\d+.*\], which hold nothing or are in a copy": cache_sins.EvictsTheUnknown(),
    r"evicts host block \d+ 2 times": cache_sins.EvictsTwice(),
    r"restores \d+ blocks of request \d+, the host has \d+": cache_sins.RestoresMoreThanThereIs(),
    r"restores blocks of request 999, which does not wait for any": cache_sins.RestoresForNobody(),
    r"restores 0 blocks of request \d+, the host has \d+": cache_sins.RestoresNothing(),
    r"takes \d+ blocks to offload and restore, \d+ are free": cache_sins.TakesMoreThanIsFree(),
}


def picture(tiering: Tiering) -> Any:
    """All that a plan of copies could change."""
    ledger, host = tiering.ledger, tiering.host
    return (
        *(ledger.version, [*ledger.idle()], ledger.num_clean_blocks, ledger.num_used_blocks),
        *(host.version, [*host.unread()], host.num_free_slots),
        *(tiering.num_copies, tiering.num_under_way("offload"), tiering.num_under_way("restore")),
    )


def converse(host: HandDriven, before_each: Callable[[], None]) -> None:
    """Fifty times two of six prompts, which share nothing and do not fit on the device together."""
    rng = random.Random(5)
    for first in range(0, 100, 2):
        for k in rng.sample(range(6), 2):
            said = tuple(range(100 * k, 100 * k + 2 * k))
            host.add(request(10 * first + k, prompt=8 * k + 3, hashes=said))
        while host.scheduler.num_live:
            before_each()
            host.step()


@pytest.mark.parametrize(("told", "sinner"), SINS.items(), ids=[type(s).__name__ for s in SINS.values()])
def test_a_sin_is_refused_and_nothing_changes(told: str, sinner: CachePolicy) -> None:
    """By the scheduler, with the policy's name; which goes on as if nothing had happened once it is another."""
    host = HandDriven(instance_config(), Fcfs(), cache=sinner)
    tiering = host.scheduler.tiering
    assert tiering is not None
    seen: list[Any] = []
    with pytest.raises(PolicyError, match=told) as refused:
        converse(host, lambda: seen.append(picture(tiering)))
    assert picture(tiering) == seen[-1]
    assert str(refused.value).startswith(f"cache policy {policy_name(sinner)} at {host.now_us} us: ")
    tiering.policy = Lru()
    while host.scheduler.num_live:
        host.step()
        tiering.audit()
    assert {r.output_tokens for r in host.records.requests} == {2}


@dataclass(frozen=True, slots=True, kw_only=True)
class AsTold:
    """One plan after another, and then none."""

    decides: ClassVar[str] = "cache"

    plans: list[CachePlan] = field(default_factory=list)
    host_blocks_factor: float = 1.0

    def decide(self, view: CacheView) -> CachePlan:
        return self.plans.pop(0) if self.plans else CachePlan(reason="nothing more")


@pytest.mark.parametrize("state", ["in use", "clean", "in the host", "on its way there", "no block of this device"])
def test_only_an_idle_block_that_the_host_lacks_is_offloaded(state: str) -> None:
    """Of two prompts of two blocks, each with its keys; the second one's are idle and ask for a decision."""
    policy = AsTold()
    tiers = TiersByHand(policy, num_blocks=8)
    for names in ([1, 2], [3, 4]):
        assert tiers.uses(names)
    first = tiers.request([1, 2])
    block = tiers.ledger.find(first.block_keys(1)[0])
    assert block is not None
    offload = CachePlan(offload=(block,), reason="as told")
    if state == "in use":
        tiers.ledger.attach(first.id, first.block_keys(2))
    elif state == "clean":
        block = next(b for b in range(8) if b not in {i for i, _ in tiers.ledger.idle()})
    elif state == "in the host":
        policy.plans.append(offload)
        assert tiers.asks()
    elif state == "on its way there":
        policy.plans.append(offload)
        tiers.tiering.plan([], 0, 0)
    else:
        block = 8
    policy.plans.append(CachePlan(offload=(block,), reason="as told"))
    before = picture(tiers.tiering)
    with pytest.raises(PolicyError, match=rf"as-told at 0 us: offloads blocks \[{block}\], which are not idle"):
        tiers.tiering.plan([], 0, 0)
    assert picture(tiers.tiering) == before
    tiers.audit()


def test_a_block_that_a_copy_reads_is_not_given_up() -> None:
    """Nor one that is being filled: both hold something, and neither can be had."""
    policy = AsTold(host_blocks_factor=0.25)  # two blocks
    tiers = TiersByHand(policy, num_blocks=8)
    assert tiers.uses([1])
    assert tiers.uses([2])
    one, two = (block for block, _ in tiers.ledger.idle())
    policy.plans.append(CachePlan(offload=(one,), reason="as told"))
    (copy,) = tiers.asks()
    waits = tiers.request([1])
    tiers.fills_the_device()
    assert tiers.uses([2])
    (two,) = (block for block, _ in tiers.ledger.idle())
    policy.plans.append(CachePlan(offload=(two,), restore={waits.id: 1}, reason="as told"))
    assert tiers.tiering.plan([waits], 0, 0) == [waits.id]
    assert tiers.uses([3])
    three = next(b for b, k in tiers.ledger.idle() if k == tiers.request([3]).block_keys(1)[0])
    for slot in range(2):
        policy.plans.append(CachePlan(offload=(three,), evict=(slot,), reason="as told"))
        before = picture(tiers.tiering)
        with pytest.raises(PolicyError, match=rf"evicts host blocks \[{slot}\], which hold nothing or are in a copy"):
            tiers.tiering.plan([], 0, 0)
        assert picture(tiers.tiering) == before
    assert copy.slots == (0,)
