"""Several instances behind a router, in simulated time.

    clients --> router --> link 0 --> inbox 0 --> instance 0        each with a scheduler and KV of its own
                  |    --> link 1 --> inbox 1 --> instance 1
                  ^------- heartbeats -----------------'            load and prefix index, as stale as their period

At equal times, failures and repairs come first, then heartbeats, then arrivals and departures of clients, then the
instances' steps in order of instance: no order depends on when an event was put on the calendar, and so none on whether
steps were skipped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import simpy

from xllm_lab.copy_time import CopyTime
from xllm_lab.draft_time import DraftTime
from xllm_lab.drafting import drafting_of
from xllm_lab.errors import PolicyError
from xllm_lab.fleet_config import TOKEN_ID_BYTES, FleetConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import BlockKey, block_key
from xllm_lab.outages import Outage
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.fleet_checks import failover_violations, route_violations
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.routing import ById, InstanceId
from xllm_lab.records import FinishReason, Recorder, RequestRecord
from xllm_lab.request_state import new_record
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import Event, WorkloadFeed, serve
from xllm_lab.sim.collector import seldom_collecting
from xllm_lab.sim.copies import SimulatedCopies
from xllm_lab.sim.instance import FROM_OUTSIDE, Instance, Timing, at
from xllm_lab.sim.links import Link, Transfer
from xllm_lab.step_shape import shapes_of
from xllm_lab.step_time import StepTime
from xllm_lab.tiering import tiering_of
from xllm_lab.workload import Request, RequestId, TokenIds, Workload, prompt_token_ids

# Before what comes from clients, at equal times.
_OUTAGES, _HEARTBEATS = FROM_OUTSIDE - 2, FROM_OUTSIDE - 1
_NO_TOKENS = np.empty(0, dtype=np.int32)


class Inbox:
    """What the router sent to one instance: a `Feed` whose next event nobody knows."""

    def __init__(self, on_end: Callable[[RequestId, int], None]) -> None:
        self.events: deque[Event] = deque()
        self._on_end = on_end

    @property
    def next_us(self) -> int | None:
        return None

    @property
    def is_over(self) -> bool:
        return False

    @property
    def num_arrivals(self) -> int:
        """Requests that have arrived and were not looked at yet."""
        return sum(event.arrives for event in self.events)

    def pop_due(self, now_us: int) -> Event | None:
        return self.events.popleft() if self.events else None

    def on_end(self, request: RequestId, now_us: int) -> None:
        self._on_end(request, now_us)


class Load(NamedTuple):
    """What an instance tells the router of itself."""

    as_of_us: int
    num_running: int
    num_waiting: int
    num_outstanding_tokens: int
    kv_used_frac: float
    cached_keys: frozenset[BlockKey] | None


class Member:
    """An instance of the fleet, and what the router knows of it: an `InstanceView`.

    Attributes:
        num_under_way, num_tokens_under_way: requests on the link, and their prompt tokens.
        num_sent, num_sent_tokens: those sent since the last heartbeat, and those that were under way then.
    """

    def __init__(self, fleet: Fleet, scheduler: Scheduler, link: Link) -> None:
        self._fleet = fleet
        scheduler.is_index_watched = fleet.needs_index
        self.scheduler = scheduler
        self.link = link
        self.id = InstanceId(scheduler.instance)
        self.inbox = Inbox(fleet.on_end)
        self.instance: Instance | None = None
        self.max_seqs_per_batch = scheduler.config.max_seqs_per_batch
        self.num_under_way = self.num_tokens_under_way = 0
        self._num_sent = self._num_sent_tokens = 0
        self._last = Load(0, 0, 0, 0, 0.0, frozenset())
        self._seen_for = -1

    @property
    def as_of_us(self) -> int:
        return self._seen.as_of_us

    @property
    def num_running(self) -> int:
        return self._seen.num_running

    @property
    def num_waiting(self) -> int:
        return self._seen.num_waiting

    @property
    def num_outstanding_tokens(self) -> int:
        return self._seen.num_outstanding_tokens

    @property
    def kv_used_frac(self) -> float:
        return self._seen.kv_used_frac

    @property
    def num_matched_tokens(self) -> int:
        if not self.scheduler.config.enable_prefix_cache:
            return 0
        cached = self._seen.cached_keys
        assert cached is not None, "a policy asks for prefixes and says that it does not need them"
        keys = self._fleet.keys_of_the_request_in_hand()
        num_blocks = next((n for n, key in enumerate(keys) if key not in cached), len(keys))
        return num_blocks * self.scheduler.config.block_size

    @property
    def num_sent_since(self) -> int:
        return self._num_sent if self._fleet.config.heartbeat_us else self.num_under_way

    @property
    def num_sent_tokens_since(self) -> int:
        return self._num_sent_tokens if self._fleet.config.heartbeat_us else self.num_tokens_under_way

    @property
    def _seen(self) -> Load:
        if not self._fleet.config.heartbeat_us and self._seen_for != self._fleet.num_routed:
            self._last, self._seen_for = self.load(), self._fleet.num_routed
        return self._last

    def send(self, request: Request) -> None:
        """Count a request that leaves the router."""
        self._num_sent += 1
        self._num_sent_tokens += request.prompt.num_tokens
        self.num_under_way += 1
        self.num_tokens_under_way += request.prompt.num_tokens

    def arrive(self, request: Request) -> None:
        """Count a request that arrives at the instance."""
        self.num_under_way -= 1
        self.num_tokens_under_way -= request.prompt.num_tokens

    def beat(self) -> None:
        """A heartbeat arrives at the router."""
        self._last = self.load()
        self._num_sent, self._num_sent_tokens = self.num_under_way, self.num_tokens_under_way

    def load(self) -> Load:
        """The instance as it is now."""
        scheduler = self.scheduler
        num_over = 0 if self.instance is None else self.instance.num_steps_over()
        return Load(
            as_of_us=self._fleet.now_us,
            num_running=scheduler.num_live - scheduler.num_waiting,
            num_waiting=scheduler.num_waiting + self.inbox.num_arrivals,
            num_outstanding_tokens=scheduler.num_outstanding_tokens_after(num_over),
            kv_used_frac=scheduler.num_used_blocks_after(num_over) / scheduler.config.num_kv_blocks,
            cached_keys=scheduler.ledger.keys() if self._fleet.needs_index else None,
        )


class _RequestInHand:
    """An `ArrivedRequest`, and a `FailedRequest`."""

    __slots__ = (
        "arrival_us",
        "id",
        "num_failovers",
        "num_output_tokens",
        "num_prompt_tokens",
        "priority",
        "tpot_slo_us",
        "ttft_slo_us",
    )

    def __init__(self, record: RequestRecord) -> None:
        self.id = record.id
        self.arrival_us = record.arrival_us
        self.priority = record.priority
        self.ttft_slo_us = record.ttft_slo_us
        self.tpot_slo_us = record.tpot_slo_us
        self.num_prompt_tokens = record.prompt_tokens
        self.num_output_tokens = record.output_tokens
        self.num_failovers = record.num_failovers


class _RouteView(NamedTuple):
    """A `RouteView`."""

    now_us: int
    request: _RequestInHand
    num_routed: int
    block_size: int
    instances: ById[Member]


class _FailoverView(NamedTuple):
    """A `FailoverView`."""

    now_us: int
    request: _RequestInHand
    num_up_instances: int


class Fleet:
    """The router and what it knows. `run` serves the workload to its end.

    Attributes:
        num_routed: routing decisions so far.
        needs_index: whether the routing policy asks for cached prefixes.
        shapes: the shapes policy at work, which counts for all instances; None if every step is eager.
    """

    def __init__(
        self,
        workload: Workload,
        config: FleetConfig,
        instance: InstanceConfig,
        policies: Policies,
        timing: Timing,
        *,
        recorder: Recorder,
        vocab_size: int,
        step_time: StepTime | None = None,
        draft_time: DraftTime | None = None,
        copy_time: CopyTime | None = None,
        on_transfer: Callable[[Transfer], None] | None = None,
    ) -> None:
        self.config = config
        self.shapes = shapes_of(policies.shapes, instance)
        self.num_routed = 0
        self.needs_index = instance.enable_prefix_cache and getattr(config.route, "needs_prefix_index", True)
        self._env = simpy.Environment(initial_time=0)
        self._instance_config = instance
        self._timing = timing
        self._recorder = recorder
        self._workload, self._vocab_size = workload, vocab_size
        self._feed = WorkloadFeed(workload)
        self._looks_at_us: int | None = None
        self._block_size = instance.block_size
        self._num_open = len(workload.requests)
        self._keys: list[BlockKey] = []
        # Where a live request is; its record while it is on its way, or no instance is up.
        self._where: dict[RequestId, Member | RequestRecord] = {}
        self._held: deque[tuple[Request, RequestRecord]] = deque()
        links = [Link(self._env, config.link, InstanceId(k), on_transfer) for k in range(config.num_instances)]
        self._copies = [
            SimulatedCopies(self._env, partial(timing.links, instance.block_size)) for _ in range(config.num_instances)
        ]
        schedulers = (
            Scheduler(
                instance,
                policies.batch,
                recorder,
                step_time=step_time,
                shapes=self.shapes,
                drafting=drafting_of(policies.draft, timing.proposer, step_time=step_time, draft_time=draft_time),
                tiering=tiering_of(policies.cache, instance, copies, step_time=step_time, copy_time=copy_time),
                instance=k,
            )
            for k, copies in enumerate(self._copies)
        )
        self._members = [Member(self, s, link) for s, link in zip(schedulers, links, strict=True)]
        self._up: ById[Member] = ById(self._members)

    @property
    def now_us(self) -> int:
        return int(self._env.now)

    def low_water_us(self) -> int:
        """No step will be recorded that ended at or before this."""
        return min((m.instance.started_us for m in self._up if m.instance is not None), default=self.now_us)

    def run(self) -> None:
        """Serve.

        Raises:
            PolicyError: a policy planned something illegal, or starves a request.
        """
        for member in self._members:
            self._start(member)
        for outage in self.config.outages:
            self._call(outage.start_us, _OUTAGES, self._fail, outage)
        if self.config.heartbeat_us:
            self._beat()
        self._look_for_clients()
        with seldom_collecting():
            self._env.run()
        starved = sum(m.scheduler.num_live for m in self._members)
        if starved:
            name = policy_name(self._members[0].scheduler.policy)
            raise PolicyError(f"policy {name} leaves {starved} requests waiting for ever at {self.now_us} us")

    def on_end(self, request: RequestId, now_us: int) -> None:
        """A request ended, on whatever instance."""
        self._where.pop(request, None)
        self._num_open -= 1
        self._feed.on_end(request, now_us)
        self._look_for_clients()

    def keys_of_the_request_in_hand(self) -> list[BlockKey]:
        """Keys of its prompt's full blocks, but for the last token, which is always computed."""
        return self._keys

    def _call(self, when_us: int, priority: int, action: Callable[..., None], *args: object) -> None:
        event = at(self._env, when_us, priority)
        assert event.callbacks is not None, "an event that is new"
        event.callbacks.append(lambda _: action(*args))

    def _look_for_clients(self) -> None:
        """Be there when the next client comes or goes, which may be sooner than it was."""
        next_us = self._feed.next_us
        if next_us is None:
            return
        if next_us <= self.now_us:
            self._serve_clients()
        elif self._looks_at_us is None or next_us < self._looks_at_us:
            self._looks_at_us = next_us
            self._call(next_us, FROM_OUTSIDE, self._serve_clients)

    def _serve_clients(self) -> None:
        self._looks_at_us = None
        while (event := self._feed.pop_due(self.now_us)) is not None:
            if event.arrives:
                self._route(event.request, new_record(event.request))
            else:
                self._withdraw(event.request)
        self._look_for_clients()

    def _route(self, request: Request, record: RequestRecord) -> None:
        if not self._up:
            self._where[request.id] = record
            self._held.append((request, record))
            return
        self._keys = self._prompt_keys(request) if self.needs_index else []
        view = _RouteView(self.now_us, _RequestInHand(record), self.num_routed, self._block_size, self._up)
        plan = self.config.route.decide(view)
        if broken := route_violations(view, plan):
            raise PolicyError(f"policy {policy_name(self.config.route)} at {self.now_us} us: {'; '.join(broken)}")
        self.num_routed += 1
        self._send(self._members[plan.instance], request, record)

    def _send(self, member: Member, request: Request, record: RequestRecord) -> None:
        member.send(request)
        self._where[request.id] = record
        num_tokens = request.prompt.num_tokens + record.output_tokens
        arrives_us = member.link.send(request.id, TOKEN_ID_BYTES * num_tokens).end_us
        if arrives_us > self.now_us:
            self._call(arrives_us, FROM_OUTSIDE, self._deliver, member, request, record)
        else:
            self._deliver(member, request, record)

    def _deliver(self, member: Member, request: Request, record: RequestRecord) -> None:
        member.arrive(request)
        if self._where.get(request.id) is not record:
            return  # its client went away meanwhile
        if member.instance is None:
            self._lose(request, record)
            return
        self._where[request.id] = member
        member.inbox.events.append(Event(True, request, record))
        member.instance.notice()

    def _withdraw(self, request: Request) -> None:
        """A client goes away."""
        place = self._where.get(request.id)
        if isinstance(place, Member):
            assert place.instance is not None, "a request is on an instance that is down"
            place.inbox.events.append(Event(False, request))
            place.instance.notice()
        elif place is not None:
            self._held = deque(held for held in self._held if held[1] is not place)
            self._end(place, FinishReason.CANCELLED)

    def _end(self, record: RequestRecord, reason: FinishReason) -> None:
        """A request ends that no scheduler has."""
        record.finish_us, record.finish_reason = self.now_us, reason
        self._recorder.request(record)
        self.on_end(record.id, self.now_us)

    def _start(self, member: Member) -> None:
        conversation = serve(member.scheduler, member.inbox, self._prompt_ids, start_us=self.now_us)
        index = member.scheduler.instance
        copies = self._copies[index]
        member.instance = Instance(self._env, conversation, self._timing, member.inbox, copies=copies, index=index)

    def _fail(self, outage: Outage) -> None:
        member = self._members[outage.instance]
        assert member.instance is not None, "an instance fails that is down"
        if not self._num_open and member.instance.stretch is None:
            return  # all is over, and nobody would notice
        # What came during the step under way was never looked at.
        events = list(member.inbox.events)
        member.inbox.events.clear()
        member.instance.stop()
        member.instance = None
        self._up.remove(member)
        self._call(outage.end_us, _OUTAGES, self._repair, member)
        lost = [(state.request, state.record) for state in member.scheduler.fail()]
        lost += [(e.request, e.record) for e in events if e.arrives and e.record is not None]
        withdrawn = {e.request.id for e in events if not e.arrives}
        for request, record in lost:
            self._where[request.id] = record
        for request, record in lost:
            if self._where.get(request.id) is not record:
                continue  # the end of another made its client's departure known
            if request.id in withdrawn:
                self._end(record, FinishReason.CANCELLED)
            else:
                self._lose(request, record)

    def _repair(self, member: Member) -> None:
        self._up = ById(sorted([*self._up, member], key=lambda m: m.id))
        self._start(member)
        member.beat()
        held, self._held = self._held, deque()
        for request, record in held:
            self._route(request, record)

    def _lose(self, request: Request, record: RequestRecord) -> None:
        """The instance of a request failed, or was down when it came."""
        view = _FailoverView(self.now_us, _RequestInHand(record), len(self._up))
        plan = self.config.failover.decide(view)
        if broken := failover_violations(view, plan):
            raise PolicyError(f"policy {policy_name(self.config.failover)} at {self.now_us} us: {'; '.join(broken)}")
        if plan.action == "cancel":
            self._end(record, FinishReason.FAILED)
        else:
            record.num_failovers += 1
            self._route(request, record)

    def _beat(self) -> None:
        """Heartbeats of all instances; the last one when nothing is left that could happen."""
        for member in self._up:
            member.beat()
        if self._num_open and self._env.peek() < math.inf:
            self._call(self.now_us + self.config.heartbeat_us, _HEARTBEATS, self._beat)

    def _prompt_ids(self, request: Request) -> TokenIds:
        if not self._instance_config.enable_prefix_cache:
            return _NO_TOKENS  # only block keys ever read them
        return prompt_token_ids(request, vocab_size=self._vocab_size, seed=self._workload.seed)

    def _prompt_keys(self, request: Request) -> list[BlockKey]:
        ids, size = self._prompt_ids(request), self._block_size
        keys: list[BlockKey] = []
        for start in range(0, len(ids) - size, size):
            keys.append(block_key(keys[-1] if keys else b"", ids[start : start + size]))
        return keys
