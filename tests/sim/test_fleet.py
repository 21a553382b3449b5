"""A fleet: nothing is lost between clients, links and instances, and skipping steps changes nothing there either."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.laws import VOCAB_SIZE, fleet_obeys_the_laws
from tests.sim.test_fast_forward import Uneven, long_answers
from tests.small_runs import (
    COPY_TIME,
    STEP_TIME,
    TIERED,
    batch_policies,
    busy_workloads,
    instance_config,
    request,
    tight_configs,
)
from xllm_lab.copies import CopyRecord
from xllm_lab.errors import PolicyError
from xllm_lab.expert_records import ExpertLoadRecord, ExpertsRecord
from xllm_lab.fleet_config import FleetConfig, LinkConfig
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.outages import Outage
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.cache.device_only import DEVICE_ONLY
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.failover.requeue import Requeue
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.roles import ROLES, RolesPlan, RolesPolicy, RolesView, changes
from xllm_lab.policies.roles.colocated import Colocated
from xllm_lab.policies.roles.slo_flip import SloFlip
from xllm_lab.policies.roles.static import Static
from xllm_lab.policies.route.prefix_affinity import PrefixAffinity
from xllm_lab.policies.routing import InstanceId, RoutePlan, RouteView
from xllm_lab.records import FinishReason, Records, RequestRecord
from xllm_lab.request_state import RequestState
from xllm_lab.sim.fleet import Fleet
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.links import Transfer
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.sim.store import SimulatedStore
from xllm_lab.step import Step
from xllm_lab.workload import ClosedLoop, Workload


def served(
    work: Workload,
    fleet: FleetConfig,
    config: InstanceConfig,
    policy: BatchPolicy,
    *,
    fast_forward: bool = True,
    cache: CachePolicy = DEVICE_ONLY,
    store: SimulatedStore | None = None,
) -> tuple[Records, list[Transfer]]:
    """Records and transfers of the fleet that serves the workload."""
    records, transfers = Records(), list[Transfer]()
    timing = Predicted(Uneven(), fast_forward=fast_forward, copy_time=COPY_TIME, store=store)
    Fleet(
        work,
        fleet,
        config,
        Policies(policy, cache=cache),
        timing,
        recorder=records,
        vocab_size=VOCAB_SIZE,
        step_time=STEP_TIME,
        copy_time=COPY_TIME,
        on_transfer=transfers.append,
    ).run()
    return records.sort(), transfers


@st.composite
def fleets(draw: st.DrawFn, *, outages: bool = True) -> FleetConfig:
    """One to three instances, any routing and failover policy, fresh or stale loads, slow links, outages."""
    num_instances = draw(st.integers(1, 3))
    route = draw(st.sampled_from(sorted(policies("route"))))
    failover = draw(st.sampled_from(sorted(policies("failover"))))
    down = [
        Outage(instance=InstanceId(k), start_us=start, end_us=start + draw(st.sampled_from((1, 40, 700))))
        for k in range(num_instances)
        if (start := draw(st.sampled_from((0, 0, 0, 35, 90, 500)))) and outages
    ]
    return FleetConfig(
        num_instances=num_instances,
        heartbeat_us=draw(st.sampled_from((0, 7, 50))),
        link=LinkConfig(
            latency_us=draw(st.sampled_from((0, 0, 5))), bytes_per_s=draw(st.sampled_from((None, 10_000_000)))
        ),
        outages=tuple(down),
        route=make_policy("route", route, {}),
        failover=make_policy("failover", failover, {}),
        roles=draw(roles()),
        role_interval_us=draw(st.sampled_from((1, 30, 400))),
        role_window_us=draw(st.sampled_from((1, 100))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WildRoles:
    """Somebody does something else each time: a roles policy to find what a fleet gets wrong."""

    decides: ClassVar[str] = "roles"

    def decide(self, view: RolesView) -> RolesPlan:
        num = 5 * (view.now_us // 7) + view.heard.num_ends + sum(i.num_running for i in view.instances)
        wild = {i.id: ROLES[(num + 2 * i.id) % 3] for i in view.instances}
        if {"prefill"} == {*wild.values()} or {"decode"} == {*wild.values()}:
            wild[view.instances[num % len(view.instances)].id] = "mixed"
        return changes(view, wild, "wild")


def roles() -> st.SearchStrategy[RolesPolicy]:
    """Whatever there is, with short memories, and a wild one."""
    flips = SloFlip(min_dwell_us=20, min_return_us=60, min_requests=1)
    return st.sampled_from((Colocated(), Colocated(), Static(), Static(num_prefill=2), flips, WildRoles()))


@given(
    work=busy_workloads() | long_answers(),
    fleet=fleets(),
    config=tight_configs(),
    policy=batch_policies(),
    mode=st.sampled_from(ASYNC_SCHEDULING),
)
def test_skipping_steps_changes_nothing(
    work: Workload, fleet: FleetConfig, config: InstanceConfig, policy: BatchPolicy, mode: str
) -> None:
    """Arrivals that nobody foresaw, heartbeats in the middle of a stretch, failures: records and transfers agree."""
    config = replace(config, async_scheduling=mode)
    stepped, slow = served(work, fleet, config, policy, fast_forward=False)
    skipped, fast = served(work, fleet, config, policy)
    event(f"{sum(r.num_failovers for r in stepped.requests)} failovers")
    event(f"{sum(r.handed_over_us is not None for r in stepped.requests)} handovers")
    assert skipped.requests == stepped.requests
    assert skipped.steps == stepped.steps
    assert fast == slow
    fleet_obeys_the_laws(work, fleet, config, skipped)


@given(
    work=busy_workloads(),
    fleet=fleets(),
    config=st.builds(
        *(replace, tight_configs()),
        async_scheduling=st.sampled_from(ASYNC_SCHEDULING),
        enable_prefix_cache=st.just(True),
    ),
    each=st.builds(Policies, batch_policies(), cache=st.sampled_from(TIERED)),
    room=st.sampled_from((0, 2, None)),
)
def test_tiers_are_lost_with_their_instance_and_nothing_else_is(
    work: Workload, fleet: FleetConfig, config: InstanceConfig, each: Policies, room: int | None
) -> None:
    """Copies under way when an instance fails never end, whatever is in the store stays; skipping steps still changes
    nothing."""

    def store() -> SimulatedStore | None:
        return None if room == 0 else SimulatedStore(room)

    stepped, _ = served(work, fleet, config, each.batch, fast_forward=False, cache=each.cache, store=store())
    skipped, _ = served(work, fleet, config, each.batch, cache=each.cache, store=store())
    assert skipped.requests == stepped.requests
    assert skipped.steps == stepped.steps
    assert skipped.copies == stepped.copies
    fleet_obeys_the_laws(work, fleet, config, skipped)


@given(work=busy_workloads(), config=tight_configs(), policy=batch_policies(), mode=st.sampled_from(ASYNC_SCHEDULING))
def test_a_fleet_of_one_is_that_one(work: Workload, config: InstanceConfig, policy: BatchPolicy, mode: str) -> None:
    """The router and a link without delay add nothing."""
    config = replace(config, async_scheduling=mode)
    records, _ = served(work, FleetConfig(num_instances=1, heartbeat_us=0), config, policy)
    timing = Predicted(Uneven())
    assert records == run_simulation(work, config, Policies(policy), timing, vocab_size=VOCAB_SIZE, step_time=STEP_TIME)


def test_requests_take_turns() -> None:
    """The default router."""
    work = Workload(requests=tuple(request(k, 10 * k) for k in range(6)))
    records, _ = served(work, FleetConfig(num_instances=3), instance_config(), Fcfs())
    assert [r.instance for r in records.requests] == [0, 1, 2, 0, 1, 2]


def test_a_link_delays_a_prompt_and_keeps_the_order() -> None:
    """Four tokens are 16 bytes, at 1 MB/s 16 us, and 5 us on the way; the second prompt waits for the first."""
    work = Workload(requests=(request(0, prompt=4), request(1, prompt=4)))
    link = LinkConfig(latency_us=5, bytes_per_s=1_000_000)
    records, transfers = served(work, FleetConfig(num_instances=1, link=link), instance_config(), Fcfs())
    assert [(t.start_us, t.end_us) for t in transfers] == [(0, 21), (16, 37)]
    assert records.requests[0].first_scheduled_us == 21


def test_a_stale_router_sends_everything_to_who_was_idle() -> None:
    """Between heartbeats it knows what it sent itself, but not what has ended."""

    class SeesOnlyHeartbeats:
        decides: ClassVar[str] = "route"

        def decide(self, view: RouteView) -> RoutePlan:
            least = min(view.instances, key=lambda i: (i.num_running + i.num_waiting, i.id))
            return RoutePlan(instance=least.id, reason="fewest at the last heartbeat")

    work = Workload(requests=tuple(request(k, 20 * k, prompt=12, output=9) for k in range(4)))
    placed = {}
    for heartbeat_us in (0, 10_000):
        fleet = FleetConfig(num_instances=2, heartbeat_us=heartbeat_us, route=SeesOnlyHeartbeats())
        records, _ = served(work, fleet, instance_config(), Fcfs())
        placed[heartbeat_us] = [r.instance for r in records.requests]
    assert placed == {0: [0, 1, 0, 1], 10_000: [0, 0, 0, 0]}


def test_a_request_outlives_its_instance_if_policy_says_so() -> None:
    """It starts again elsewhere, from its prompt and the tokens it has, and its client keeps those."""
    work = Workload(requests=(request(0, prompt=8, output=12),))
    down = (Outage(instance=InstanceId(0), start_us=60, end_us=1000),)
    fleet = FleetConfig(num_instances=2, outages=down, failover=Requeue())
    records, _ = served(work, fleet, instance_config(max_tokens_per_batch=32), Fcfs())
    (record,) = records.requests
    assert (record.finish_reason, record.instance, record.num_failovers) == (FinishReason.LENGTH, 1, 1)
    before = [t for t in record.token_times_us if t <= 60]
    again = next(s for s in records.steps if s.instance == 1)
    assert before
    assert again.num_tokens == [8 + len(before)]


def test_a_request_dies_with_its_instance_by_default() -> None:
    """As in xllm-service; its record says why."""
    work = Workload(requests=(request(0, prompt=8, output=12), request(1, prompt=8, output=3)))
    down = (Outage(instance=InstanceId(0), start_us=60, end_us=70),)
    records, _ = served(work, FleetConfig(num_instances=2, outages=down), instance_config(), Fcfs())
    assert [r.finish_reason for r in records.requests] == [FinishReason.FAILED, FinishReason.LENGTH]
    assert records.requests[0].finish_us == 60


def test_requests_wait_while_nobody_is_up() -> None:
    """And go to the first that comes back."""
    work = Workload(requests=(request(0, 10, prompt=8, output=2),))
    down = (Outage(instance=InstanceId(0), start_us=5, end_us=300),)
    records, _ = served(work, FleetConfig(num_instances=1, outages=down), instance_config(), Fcfs())
    assert records.requests[0].first_scheduled_us == 300


def test_prefixes_are_found_where_they_were_computed() -> None:
    """Requests of two conversations: affinity brings each back to its own instance, turns do not."""
    work = Workload(
        requests=tuple(
            request(k, 400 * k, prompt=13, output=1, hashes=(10, 11, 12) if k % 3 else (20, 21, 22)) for k in range(9)
        )
    )
    hits = {}
    for name, route in (("turns", make_policy("route", "round-robin", {})), ("affinity", PrefixAffinity())):
        fleet = FleetConfig(num_instances=2, heartbeat_us=50, route=route)
        records, _ = served(work, fleet, instance_config(num_kv_blocks=8), Fcfs())
        hits[name] = sum(r.cached_tokens for r in records.requests)
    assert hits["affinity"] > hits["turns"] > 0


def test_clients_in_a_closed_loop_go_on_after_a_failure() -> None:
    """Two clients, one instance that fails: every request is sent, whatever became of the one before."""
    work = Workload(requests=tuple(request(k, output=6) for k in range(6)), closed_loop=ClosedLoop(num_clients=2))
    down = (Outage(instance=InstanceId(0), start_us=25, end_us=40),)
    records, _ = served(work, FleetConfig(num_instances=1, outages=down), instance_config(), Fcfs())
    assert len(records.requests) == 6
    assert [r.finish_reason for r in records.requests].count(FinishReason.FAILED) == 2


def test_a_router_that_names_nobody_is_told() -> None:
    """In one line, with the policy's name."""

    class Lost:
        decides: ClassVar[str] = "route"

        def decide(self, view: RouteView) -> RoutePlan:
            return RoutePlan(instance=InstanceId(7), reason="")

    with pytest.raises(PolicyError, match=r"sends request 0 to instance 7, up are 0, 1"):
        served(Workload(requests=(request(0),)), FleetConfig(num_instances=2, route=Lost()), instance_config(), Fcfs())


def num_states() -> int:
    """Live requests that somebody can still reach, their records with them."""
    gc.collect()
    return sum(type(o) is RequestState for o in gc.get_objects())


class Forgetful:
    """A `Recorder` that keeps nothing, and counts what the fleet still holds whenever a request ends."""

    def __init__(self) -> None:
        self.num_held: list[int] = []

    def span(self, span: Step) -> None: ...
    def copy(self, record: CopyRecord) -> None: ...
    def experts(self, record: ExpertsRecord) -> None: ...
    def expert_load(self, record: ExpertLoadRecord) -> None: ...
    def request(self, record: RequestRecord) -> None:
        self.num_held.append(num_states())


def test_what_ended_is_not_held() -> None:
    """Memory does not grow with requests that ended, whether or not their clients would have gone away later."""
    sent = tuple(
        request(k, arrival_us=k * 1000, prompt=8, output=3, cancel_us=k * 1000 + 900 if k % 2 else None)
        for k in range(30)
    )
    fleet, forgetful, num_before = FleetConfig(num_instances=3, heartbeat_us=0), Forgetful(), num_states()
    Fleet(
        Workload(requests=sent),
        fleet,
        instance_config(),
        Policies(Fcfs()),
        Predicted(Uneven()),
        recorder=forgetful,
        vocab_size=VOCAB_SIZE,
        step_time=STEP_TIME,
    ).run()
    assert len(forgetful.num_held) == len(sent)
    # Each instance may still have its last one at hand.
    assert max(forgetful.num_held) - num_before <= fleet.num_instances


def test_what_a_prompt_computed_goes_ahead_of_it() -> None:
    """With a store, who goes on finds all full blocks of the prompt, and its second token comes sooner."""
    work = Workload(requests=tuple(request(k, 400 * k, prompt=41, output=6, hashes=(50 * k,)) for k in range(4)))
    fleet = FleetConfig(num_instances=2, heartbeat_us=0, roles=Static(num_prefill=1))
    config = instance_config(num_kv_blocks=64, max_tokens_per_batch=64)
    cache = TIERED[0]
    alone, _ = served(work, fleet, config, Fcfs(), cache=cache)
    shared, _ = served(work, fleet, config, Fcfs(), cache=cache, store=SimulatedStore())
    for one, other in zip(alone.requests, shared.requests, strict=True):
        assert (one.prefill_instance, one.instance) == (other.prefill_instance, other.instance) == (0, 1)
    chunks = [(s.instance, n) for s in shared.steps for i, n in zip(s.ids, s.num_tokens, strict=True) if i == 2]
    assert chunks[:2] == [(0, 41), (1, 2)], "the last token of the prompt, and the first one behind it"
    pushed = [c for c in shared.copies if c.kind == "push"]
    assert [c.num_moved_tokens for c in pushed] == [40] * 4


def test_what_an_instance_did_not_finish_giving_is_not_there() -> None:
    store, owner, other = SimulatedStore(), object(), object()
    store.put([b"a", b"b"], 10, owner=owner)
    store.put([b"c"], 30, owner=owner)
    store.put([b"d"], 30, owner=other)
    store.forget(owner, 20)
    assert store.num_leading([b"a", b"b", b"c"], 50) == 2
    assert store.num_leading([b"d"], 29) == 0
    assert store.num_leading([b"d"], 30) == 1


def test_a_full_store_forgets_ends_before_beginnings() -> None:
    store = SimulatedStore(2)
    store.put([b"a", b"b", b"c"], 10, owner=None)
    assert (len(store), store.num_leading([b"a", b"b", b"c"], 10)) == (2, 2)
    store.put([b"d"], 20, owner=None)
    assert store.num_leading([b"a", b"b"], 20) == 1
