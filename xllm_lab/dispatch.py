"""What happens to a fleet, and in which order: clients, links, heartbeats, outages. Both fleets are driven by this.

    clients --> router --> link 0 --> seat 0        an instance with a scheduler and KV of its own
                  |    --> link 1 --> seat 1
                  ^------- heartbeats ---'          load and prefix index, as stale as their period
                  ^------- handovers ----'          requests with their first token, where instances have roles

The host brings a calendar, which is time, and the seats, which are the instances: simulated ones, or processes.

At equal times, failures and repairs come first, then heartbeats, then roles, then arrivals and departures of clients,
then the instances' steps in order of instance: no order depends on when an event was put on the calendar, and so none
on whether steps were skipped. For the same reason a request that is handed over is routed a microsecond later: at the
time itself some instances have begun their next steps, and others have not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from xllm_lab.fleet_config import TOKEN_ID_BYTES, FleetConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import BlockKey, block_key
from xllm_lab.outages import Outage
from xllm_lab.policies.routing import InstanceId
from xllm_lab.records import FinishReason, Recorder, RequestRecord, RoleChange
from xllm_lab.request_state import new_record
from xllm_lab.router import Known, Load, OnDecision, Router
from xllm_lab.serving import Event, WorkloadFeed
from xllm_lab.transfers import Transfer, Wire
from xllm_lab.workload import Request, RequestId, TokenIds, Workload, prompt_token_ids

# At equal times, in this order.
OUTAGES, HEARTBEATS, ROLES, FROM_OUTSIDE, FIRST_INSTANCE = -3, -2, -1, 0, 1
_NEVER_US = 2**62
_NO_TOKENS = np.empty(0, dtype=np.int32)


class Calendar(Protocol):
    """Time, and what is to happen when."""

    @property
    def now_us(self) -> int: ...
    @property
    def has_more(self) -> bool:
        """Whether anything is to happen yet."""
        ...

    def call(self, when_us: int, priority: int, action: Callable[[], None]) -> None:
        """Have something done; of several things at one time, the lower priority first."""
        ...


# What an instance had when it failed, by arrival.
Lost = Sequence[tuple[Request, RequestRecord]]


class Seat(Protocol):
    """One instance, as its host has it."""

    @property
    def is_up(self) -> bool: ...
    @property
    def is_at_rest(self) -> bool:
        """It is up, and runs no step."""
        ...

    def begin(self) -> None:
        """It comes up, empty; if it can, as `is_up` says."""
        ...

    def fail(self) -> Lost:
        """It goes down; steps that are over count, the one under way never was."""
        ...

    def put(self, event: Event) -> None:
        """Something arrives there."""
        ...

    def load(self) -> Load:
        """The instance as it is now."""
        ...


class Dispatch:
    """Brings a workload to a fleet, and sees every request to its end.

    Args:
        on_role: told of every change of a role.
        asks_for_loads: heartbeats are taken at each period; else instances send theirs, and go on without a calendar.

    Attributes:
        router: what it knows and decides.
        num_open: requests that have not ended.
    """

    def __init__(
        self,
        workload: Workload,
        config: FleetConfig,
        instance: InstanceConfig,
        calendar: Calendar,
        *,
        recorder: Recorder,
        vocab_size: int,
        on_transfer: Callable[[Transfer], None] | None = None,
        on_decision: OnDecision | None = None,
        on_role: Callable[[RoleChange], None] | None = None,
        asks_for_loads: bool = True,
    ) -> None:
        self.config = config
        self.calendar = calendar
        self.num_open = len(workload.requests)
        self._instance = instance
        self._recorder = recorder
        self._workload, self._vocab_size = workload, vocab_size
        self._feed = WorkloadFeed(workload)
        self._looks_at_us: int | None = None
        self._asks_for_loads = asks_for_loads
        self._on_role = on_role
        self._next_beat_us = self._next_roles_us = _NEVER_US
        # Whose clients went away, and whose instances have not said so yet.
        self._withdrawn: set[RequestId] = set()
        self._seats: Sequence[Seat] = ()
        self._links = [Wire(config.link, InstanceId(k), on_transfer) for k in range(config.num_instances)]
        self.router = Router(config, instance, self._load_now, self._prompt_keys, on_decision)

    def begin(self, seats: Sequence[Seat]) -> None:
        """All instances come up, and everything that is known to happen is put on the calendar."""
        self._seats = seats
        for seat, known in zip(seats, self.router.known, strict=True):
            seat.begin()
            if not seat.is_up:
                self.router.goes_down(known)
        for outage in self.config.outages:
            self.calendar.call(outage.start_us, OUTAGES, self._outage(outage))
        if self.config.heartbeat_us and self._asks_for_loads:
            self._next_beat_us = self.calendar.now_us
        if self.router.has_roles:
            self._next_roles_us = self.calendar.now_us
        self._look_around()
        self._look_for_clients()

    def on_end(self, request: RequestId, now_us: int) -> None:
        """A request ended, on whatever instance."""
        self._withdrawn.discard(request)
        self.router.forget(request, now_us)
        self.num_open -= 1
        self._feed.on_end(request, now_us)
        self._look_for_clients()

    def on_handover(self, request: Request, record: RequestRecord, now_us: int) -> None:
        """A request left its instance with its first token, and goes on elsewhere."""
        record.prefill_instance, record.handed_over_us = record.instance, now_us
        self.router.hand_over(record, now_us)
        if request.id in self._withdrawn:  # its instance would have heard of it next
            self._end(record, FinishReason.CANCELLED)
            return
        later_us = max(now_us, self.calendar.now_us) + 1
        self.calendar.call(later_us, FROM_OUTSIDE, lambda: self._go_on(request, record))

    def _go_on(self, request: Request, record: RequestRecord) -> None:
        if self.router.is_on_its_way(record):
            self._route(request, record)

    def fail(self, instance: InstanceId) -> None:
        """An instance fails, and with it, or elsewhere, its requests go on."""
        known, seat = self.router.known[instance], self._seats[instance]
        lost = seat.fail()
        self.router.goes_down(known)
        for _, record in lost:
            self.router.place(record.id, record)
        for request, record in lost:
            if not self.router.is_on_its_way(record):
                continue  # the end of another made its client's departure known
            if request.id in self._withdrawn:
                self._end(record, FinishReason.CANCELLED)
            else:
                self._lose(request, record)

    def repair(self, instance: InstanceId) -> None:
        """An instance comes back, and takes what was held."""
        seat = self._seats[instance]
        if seat.is_up:
            return
        seat.begin()
        if not seat.is_up:
            return
        for request, record in self.router.comes_up(self.router.known[instance], seat.load()):
            self._route(request, record)

    def give_up(self) -> None:
        """Nobody will ever come up again: what is held ends."""
        for _, record in self.router.release():
            self._end(record, FinishReason.FAILED)

    def prompt_ids(self, request: Request) -> TokenIds:
        """The prompt's tokens, shape [prompt tokens]; none where only block keys would read them and there are none."""
        if not self._instance.enable_prefix_cache:
            return _NO_TOKENS
        return prompt_token_ids(request, vocab_size=self._vocab_size, seed=self._workload.seed)

    def _load_now(self, instance: InstanceId) -> Load:
        return self._seats[instance].load()

    def _outage(self, outage: Outage) -> Callable[[], None]:
        return lambda: self._go_out(outage)

    def _go_out(self, outage: Outage) -> None:
        seat = self._seats[outage.instance]
        if not self.num_open and (seat.is_at_rest or not seat.is_up):
            return  # all is over, and nobody would notice
        # On the calendar first: who is lost may wait for it.
        self.calendar.call(outage.end_us, OUTAGES, lambda: self.repair(outage.instance))
        if seat.is_up:
            self.fail(outage.instance)

    def _look_for_clients(self) -> None:
        """Be there when the next client comes or goes, which may be sooner than it was."""
        next_us = self._feed.next_us
        if next_us is None:
            return
        if next_us <= self.calendar.now_us:
            self._serve_clients()
        elif self._looks_at_us is None or next_us < self._looks_at_us:
            self._looks_at_us = next_us
            self.calendar.call(next_us, FROM_OUTSIDE, self._serve_clients)

    def _serve_clients(self) -> None:
        self._looks_at_us = None
        while (event := self._feed.pop_due(self.calendar.now_us)) is not None:
            if event.arrives:
                self._route(event.request, new_record(event.request))
            else:
                self._withdraw(event.request)
        self._look_for_clients()

    def _route(self, request: Request, record: RequestRecord) -> None:
        known = self.router.route(request, record, self.calendar.now_us)
        if known is None:
            return
        now_us = self.calendar.now_us
        hands_over = known.role == "prefill" and not record.output_tokens
        num_tokens = request.prompt.num_tokens + record.output_tokens
        arrives_us = self._links[known.id].send_at(now_us, request.id, TOKEN_ID_BYTES * num_tokens).end_us
        if arrives_us > now_us:
            self.calendar.call(arrives_us, FROM_OUTSIDE, lambda: self._deliver(known, request, record, hands_over))
        else:
            self._deliver(known, request, record, hands_over)

    def _deliver(self, known: Known, request: Request, record: RequestRecord, hands_over: bool) -> None:
        known.arrive(request)
        if not self.router.is_on_its_way(record):
            return
        seat = self._seats[known.id]
        if not seat.is_up:
            self._lose(request, record)
            return
        self.router.place(request.id, known)
        seat.put(Event(True, request, record, hands_over))

    def _withdraw(self, request: Request) -> None:
        """A client goes away."""
        place = self.router.where(request.id)
        if isinstance(place, Known):
            seat = self._seats[place.id]
            assert seat.is_up, "a request is on an instance that is down"
            self._withdrawn.add(request.id)
            seat.put(Event(False, request))
        elif place is not None:
            self.router.drop(place)
            self._end(place, FinishReason.CANCELLED)

    def _end(self, record: RequestRecord, reason: FinishReason) -> None:
        """A request ends that no scheduler has."""
        record.finish_us, record.finish_reason = self.calendar.now_us, reason
        self._recorder.request(record)
        self.on_end(record.id, self.calendar.now_us)

    def _lose(self, request: Request, record: RequestRecord) -> None:
        """The instance of a request failed, or was down when it came."""
        if self.router.requeues(record, self.calendar.now_us):
            record.num_failovers += 1
            self._route(request, record)
        else:
            self._end(record, FinishReason.FAILED)

    def _look_around(self) -> None:
        """Heartbeats of all instances, and roles, whichever is due; the last when nothing is left that could happen.

        One entry of the calendar for both, or each would take the other for something that happens.
        """
        now_us = self.calendar.now_us
        if self._next_beat_us <= now_us:
            self._next_beat_us = now_us + self.config.heartbeat_us
            for known in self.router.up:
                known.beat(self._seats[known.id].load())
        if self._next_roles_us <= now_us:
            self._next_roles_us = now_us + self.config.role_interval_us
            for change in self.router.decide_roles(now_us):
                if self._on_role is not None:
                    self._on_role(change)
        next_us = min(self._next_beat_us, self._next_roles_us)
        goes_on = self.calendar.has_more or not self._asks_for_loads
        if next_us < _NEVER_US and self.num_open and goes_on:
            order = HEARTBEATS if self._next_beat_us == next_us else ROLES
            self.calendar.call(next_us, order, self._look_around)

    def _prompt_keys(self, request: Request) -> list[BlockKey]:
        ids, size = self.prompt_ids(request), self._instance.block_size
        keys: list[BlockKey] = []
        for start in range(0, len(ids) - size, size):
            keys.append(block_key(keys[-1] if keys else b"", ids[start : start + size]))
        return keys
