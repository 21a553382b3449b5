"""Routing policies: what each is for, xLLM's score by hand, and who wins where a queue can tell."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.drawn_fleet_views import DrawnFleetRequest, DrawnInstance, DrawnRouteView, drawn_route_view
from xllm_lab.policies.api import RequestId
from xllm_lab.policies.route.cache_aware import CacheAware
from xllm_lab.policies.route.cache_aware_corrected import CacheAwareCorrected
from xllm_lab.policies.route.least_loaded import LeastLoaded
from xllm_lab.policies.route.prefix_affinity import PrefixAffinity
from xllm_lab.policies.route.round_robin import RoundRobin
from xllm_lab.policies.routing import InstanceId, RoutePlan, RoutePolicy, RouteView, by_id, num_outstanding
from xllm_lab.workload import stream

VIEWS = st.builds(drawn_route_view, st.integers(0, 10**6))


def instance(
    number: int,
    *,
    running: int = 0,
    waiting: int = 0,
    sent: int = 0,
    tokens: int | None = None,
    sent_tokens: int = 0,
    kv: float = 0.0,
    matched: int = 0,
    seats: int = 8,
) -> DrawnInstance:
    """An instance whose figures are those given."""
    return DrawnInstance(
        id=InstanceId(number),
        as_of_us=0,
        num_running=running,
        num_waiting=waiting,
        num_outstanding_tokens=running + waiting if tokens is None else tokens,
        kv_used_frac=kv,
        num_matched_tokens=matched,
        max_seqs_per_batch=seats,
        num_sent_since=sent,
        num_sent_tokens_since=sent_tokens,
    )


def view(*instances: DrawnInstance, prompt: int = 100, routed: int = 0, block_size: int = 10) -> DrawnRouteView:
    """A fleet that has a prompt to place."""
    request = DrawnFleetRequest(
        id=RequestId(0),
        arrival_us=0,
        priority=2,
        ttft_slo_us=None,
        tpot_slo_us=None,
        num_prompt_tokens=prompt,
        num_output_tokens=0,
        num_failovers=0,
    )
    return DrawnRouteView(
        number=0, now_us=0, request=request, num_routed=routed, block_size=block_size, instances=list(instances)
    )


def chosen(policy: RoutePolicy, *instances: DrawnInstance, prompt: int = 100, routed: int = 0) -> int:
    return policy.decide(view(*instances, prompt=prompt, routed=routed)).instance


@given(VIEWS)
def test_round_robin_serves_all_equally(shown: DrawnRouteView) -> None:
    """Over as many turns as there are instances each has one, in order of id."""
    turns = range(shown.num_routed, shown.num_routed + len(shown.instances))
    order = [RoundRobin().decide(replace(shown, num_routed=n)).instance for n in turns]
    ids = sorted(i.id for i in shown.instances)
    start = ids.index(order[0])
    assert order == ids[start:] + ids[:start]


@given(VIEWS, st.integers(0, 60))
def test_between_two_heartbeats_least_loaded_fills_up_from_below(shown: DrawnRouteView, num_requests: int) -> None:
    """Like water: whoever got a request stands at most one above whoever did not, however stale the figures."""
    sent = Counter[int]()
    for _ in range(num_requests):
        target = by_number(shown, LeastLoaded().decide(shown).instance)
        target.num_sent_since += 1
        sent[target.id] += 1
        shown.num_routed += 1
    least = min(map(num_outstanding, shown.instances))
    assert all(num_outstanding(i) <= least + 1 for i in shown.instances if sent[i.id])


def test_least_loaded_counts_running_waiting_and_sent() -> None:
    """A full batch with an empty queue is a load."""
    assert chosen(LeastLoaded(), instance(0, running=3), instance(1, waiting=2), instance(2, running=1, sent=2)) == 1
    assert chosen(LeastLoaded(), instance(0, running=7), instance(1, waiting=4, running=2)) == 1


def test_what_a_load_is_can_be_chosen() -> None:
    """Two requests of an instance for four are more than three of one for thirty-two; and prompts differ."""
    small, large = instance(0, running=2, seats=4, tokens=2), instance(1, running=3, seats=32, tokens=900)
    assert chosen(LeastLoaded(load="requests"), small, large) == 0
    assert chosen(LeastLoaded(load="seats"), small, large) == 1
    assert chosen(LeastLoaded(load="tokens"), small, large) == 0
    assert chosen(LeastLoaded(load="tokens"), replace(small, num_sent_tokens_since=1000), large) == 1
    with pytest.raises(ValueError, match="accepted: requests, seats, tokens"):
        LeastLoaded(load="weight")


def test_equals_take_turns() -> None:
    """An idle fleet is used evenly by whoever looks at loads."""
    idle = [instance(n) for n in (4, 7, 9)]
    for policy in (LeastLoaded(), PrefixAffinity(), CacheAwareCorrected()):
        assert [chosen(policy, *idle, routed=n) for n in range(4)] == [4, 7, 9, 4]


@given(VIEWS, st.floats(1, 4))
def test_affinity_is_bounded(shown: DrawnRouteView, max_load_factor: float) -> None:
    """The chosen one has less than its bound, and nobody under the bound has a longer match."""
    target = by_number(shown, PrefixAffinity(max_load_factor=max_load_factor).decide(shown).instance)
    bound = max_load_factor * (1 + sum(map(num_outstanding, shown.instances))) / len(shown.instances)
    assert num_outstanding(target) < bound
    able = [i for i in shown.instances if num_outstanding(i) < bound]
    assert target.num_matched_tokens == max(i.num_matched_tokens for i in able)


def test_affinity_gives_way_to_balance() -> None:
    """The only holder of a prefix takes one and a half times its share, and the others the rest by turns."""
    fleet = [instance(n, matched=100 * (n == 2)) for n in range(4)]
    for number in range(400):
        fleet[chosen(PrefixAffinity(max_load_factor=1.5), *fleet, routed=number)].num_sent_since += 1
    assert [i.num_sent_since for i in fleet] == [pytest.approx(84, abs=1)] * 2 + [150, pytest.approx(83, abs=1)]


def test_xllm_counts_whole_prompts_only() -> None:
    """99 of 100 blocks are worth nothing, all of them 1: the emptier instance wins, then the holder."""
    fleet = (instance(0, matched=990, kv=0.4), instance(1, matched=10, kv=0.3))
    assert chosen(CacheAware(), *fleet, prompt=1000) == 1
    assert chosen(CacheAware(), instance(0, matched=1000, kv=0.9), fleet[1], prompt=1000) == 0
    assert chosen(CacheAwareCorrected(), *fleet, prompt=1000) == 0


def test_xllm_counts_the_tokens_of_full_blocks_only() -> None:
    """A prompt of 105 tokens in blocks of 10 is cached whole with 100."""
    fleet = (instance(0, matched=100, kv=0.9), instance(1, matched=90, kv=0.0))
    assert chosen(CacheAware(), *fleet, prompt=105) == 0


def test_xllm_sees_the_longest_queue_and_no_other() -> None:
    """Nine waiting are as good as none beside ten, which cost 1."""
    nine, ten, none = (
        instance(n, matched=10, waiting=w, kv=kv) for n, w, kv in ((0, 9, 0.1), (1, 10, 0.0), (2, 0, 0.2))
    )
    assert chosen(CacheAware(), nine, ten, none) == 0
    assert chosen(CacheAwareCorrected(), nine, ten, none) == 2


def test_xllm_keeps_idle_instances_out() -> None:
    """One cached block is enough to be the only candidate, however busy."""
    busy, idle = instance(0, matched=10, running=8, waiting=50, kv=0.99), instance(1)
    assert chosen(CacheAware(), busy, idle) == 0
    assert chosen(CacheAwareCorrected(), busy, idle) == 1


def test_xllm_without_matches_looks_at_kv_alone() -> None:
    """A queue of fifty does not count; nor does any match, when engines do not tell."""
    queue, used = instance(0, waiting=50, kv=0.1), instance(1, kv=0.2)
    assert chosen(CacheAware(), queue, used) == 0
    matched = replace(used, num_matched_tokens=100)
    assert chosen(CacheAware(), queue, matched) == 1
    assert chosen(CacheAware(enable_cache_upload=False), queue, matched) == 0


def test_xllm_sends_a_whole_heartbeat_period_to_one_instance() -> None:
    """Its figures are those of the heartbeat; corrected, what was sent since counts."""
    fleet = (instance(0, kv=0.1, sent=40), instance(1, kv=0.2))
    assert chosen(CacheAware(), *fleet) == 0
    assert chosen(CacheAwareCorrected(), *fleet) == 1


def test_xllm_with_nowhere_to_go() -> None:
    """Where it refuses the request, the first takes it."""
    full = [instance(n, matched=10, waiting=5, kv=1.0) for n in (3, 5)]
    assert chosen(CacheAware(), *full) == 3
    assert chosen(CacheAware(), instance(6, kv=1.0), instance(2, kv=1.0)) == 2


def test_weights_decide_what_matters() -> None:
    """Each term alone finds its own instance."""
    fleet = (instance(0, matched=100, kv=0.9, waiting=3), instance(1, kv=0.1, waiting=2), instance(2, kv=0.5))
    for alone, best in (("match_weight", 0), ("usage_weight", 1), ("waiting_weight", 2)):
        weights = {**dict.fromkeys(("match_weight", "usage_weight", "waiting_weight"), 0.0), alone: 1.0}
        assert chosen(CacheAwareCorrected(**weights), *fleet) == best


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortestQueue:
    """Looks at the waiting requests alone, as Vidur's LOR at 7d47513 does, to prove that a queue can tell."""

    decides: ClassVar[str] = "route"

    def decide(self, view: RouteView) -> RoutePlan:
        shortest = min(by_id(view.instances), key=lambda i: i.num_waiting + i.num_sent_since)
        return RoutePlan(instance=shortest.id, reason="shortest queue")


SERVICE_US = 1000


@pytest.mark.parametrize("heartbeat_us", [1, SERVICE_US, 10 * SERVICE_US])
@pytest.mark.parametrize("load_frac", [0.4, 0.7, 0.9])
def test_least_loaded_beats_round_robin(load_frac: float, heartbeat_us: int) -> None:
    """On the same requests, however stale the figures are, and at any load of the fleet."""
    assert mean_stay_us(LeastLoaded(), load_frac, heartbeat_us) < mean_stay_us(RoundRobin(), load_frac, heartbeat_us)


def test_a_router_that_sees_queues_alone_loses() -> None:
    """It takes a batch that is not full for idle."""
    assert mean_stay_us(ShortestQueue(), 0.4, 1) > 1.5 * mean_stay_us(RoundRobin(), 0.4, 1)


def mean_stay_us(policy: RoutePolicy, load_frac: float, heartbeat_us: int, num_requests: int = 4000) -> float:
    """Mean time in four exponential servers with Poisson arrivals, which show up to eight requests as running."""
    rng = stream(0, f"queues at {load_frac}")
    arrivals_us = np.cumsum(rng.exponential(SERVICE_US / (4 * load_frac), num_requests))
    services_us = rng.exponential(SERVICE_US, num_requests)
    came_us, left_us = [list[float]() for _ in range(4)], [list[float]() for _ in range(4)]  # first come, first served
    for number, (now_us, service_us) in enumerate(zip(arrivals_us, services_us, strict=True)):
        as_of_us = now_us // heartbeat_us * heartbeat_us
        fleet = []
        for i, (came, left) in enumerate(zip(came_us, left_us, strict=True)):
            num_come = bisect_right(came, as_of_us)
            inside = num_come - bisect_right(left, as_of_us)
            sent = len(came) - num_come
            fleet.append(instance(i, running=min(8, inside), waiting=max(0, inside - 8), sent=sent))
        target = policy.decide(view(*fleet, routed=number)).instance
        start_us = max([now_us, *left_us[target][-1:]])
        came_us[target].append(now_us)
        left_us[target].append(start_us + service_us)
    return (sum(map(sum, left_us)) - sum(map(sum, came_us))) / num_requests


def by_number(shown: DrawnRouteView, number: int) -> DrawnInstance:
    return next(i for i in shown.instances if i.id == number)
