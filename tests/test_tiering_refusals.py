"""What tiers refuse: plans that break a rule, and instances where nothing can be copied."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest

from tests.policies import cache_sins
from tests.policies.tiers_by_hand import TiersByHand
from tests.small_runs import COPY_TIME, STEP_TIME, HandCopier, HandDriven, instance_config, request
from tests.tuning.searches import CALIBRATION
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache import CachePlan, CachePolicy, CacheView
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.catalog import make_policy, policies, policy_name
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.machine import fitted_machine, with_host_link
from xllm_lab.tiering import Tiering
from xllm_lab.tiering_of import tiering_of

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


@pytest.mark.parametrize("name", [name for name in policies("cache") if name != "device-only"])
def test_tiers_are_refused_where_nothing_can_be_copied(name: str) -> None:
    """By every policy that copies, with what is accepted."""
    policy = make_policy("cache", name)
    known: dict[str, Any] = {"step_time": STEP_TIME, "copy_time": COPY_TIME}
    for changes, told in (
        ({"kv_layout": "virtual"}, "kv_layout is 'virtual', whose pages are not copied; accepted: 'paged'"),
        ({"enable_prefix_cache": False}, "enable_prefix_cache is false; accepted: true"),
        ({}, "is not served here; accepted: device-only"),
    ):
        with pytest.raises(ConfigError, match=f"^cache policy {name}.* {told}"):
            tiering_of(policy, instance_config(**changes), None, **known)
    assert tiering_of(policy, instance_config(), HandCopier(4), **known) is not None


def test_a_machine_that_never_copied_does_not_simulate_copies() -> None:
    """Its calibration knows steps alone; a link's rate is enough, where it is known how large a token's KV is."""
    machine, with_tiers = fitted_machine(CALIBRATION), Policies(Fcfs(), cache=Lru())
    with pytest.raises(
        ConfigError, match="cache is 'lru', and what a copy to the host and back takes is not known; acc"
    ):
        machine.refuse_if_not_priced(with_tiers, instance_config())
    sized = replace(machine, model={**machine.model, "kv_bytes_per_token": 1000})
    with_host_link(sized, 1e9).refuse_if_not_priced(with_tiers, instance_config())
    with pytest.raises(ConfigError, match="does not say how many bytes of KV a token takes"):
        with_host_link(replace(machine, model={}), 1e9)
    machine.refuse_if_not_priced(Policies(Fcfs()), instance_config())
