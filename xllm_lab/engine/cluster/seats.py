"""The instances of an engine's fleet as its router has them: each a process, and what is known of its requests.

The router keeps a copy of every record. It follows what the engine says of each step, so that nothing is lost with a
process but the step it was at.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from xllm_lab.decisions import Delivery
from xllm_lab.dispatch import FIRST_INSTANCE, Dispatch, Lost
from xllm_lab.engine.cluster.calendar import VirtualCalendar, WallCalendar
from xllm_lab.engine.cluster.messages import apply_changes, apply_index, event_cells, load_from
from xllm_lab.engine.cluster.processes import Processes
from xllm_lab.errors import ConfigError, InstanceError, PolicyError
from xllm_lab.ledger import BlockKey
from xllm_lab.policies.routing import InstanceId
from xllm_lab.progress import tell
from xllm_lab.records import Records, RequestRecord, StepRecord
from xllm_lab.router import Load
from xllm_lab.serving import Event
from xllm_lab.wire import Channel, GoneError
from xllm_lab.workload import Request, RequestId

_LOOK_S = 0.05  # between looks at whether a process that is waited for still has its lease
_NOTHING = Load(0, 0, 0, 0, 0.0, None)


class Surroundings(NamedTuple):
    """What the seats of a fleet share.

    Attributes:
        opening: what the engines are to serve on, as they are told.
        comes_back: whether an instance that fails at this time was said to come back.
    """

    processes: Processes
    records: Records
    deliveries: list[Delivery]
    opening: Mapping[str, Any]
    comes_back: Callable[[InstanceId, int], bool]


class ProcessSeat(ABC):
    """A `Seat`.

    Attributes:
        graphs: what became of its steps' graphs, once it has served.
    """

    def __init__(self, instance: InstanceId, shared: Surroundings) -> None:
        self.id = instance
        self.dispatch: Dispatch  # which needs the calendar first
        self.graphs: dict[str, Any] | None = None
        self._shared = shared
        self._channel: Channel | None = None
        self._num_steps = 0
        self._was_up = False
        self._forget()

    def _forget(self) -> None:
        """Nothing is there."""
        self._inbox: deque[Event] = deque()
        self._live: dict[RequestId, tuple[Request, RequestRecord]] = {}
        self._leaving: set[RequestId] = set()
        self._keys: set[BlockKey] = set()
        self._load = _NOTHING

    @property
    @abstractmethod
    def calendar(self) -> VirtualCalendar: ...
    @property
    def channel(self) -> Channel:
        assert self._channel is not None, f"instance {self.id} is down"
        return self._channel

    @property
    def is_up(self) -> bool:
        return self._channel is not None

    @property
    def is_at_rest(self) -> bool:
        return self.is_up and not self._live and not self._inbox

    def begin(self) -> None:
        try:
            self._begin()
        except (GoneError, InstanceError) as error:
            self._go()
            if not self._was_up:
                raise InstanceError(f"instance {self.id}: {error}") from None
        else:
            self._was_up = True
            self._shared.deliveries.append(Delivery(self.calendar.now_us, self.id, "up"))

    @abstractmethod
    def _begin(self) -> None: ...
    @abstractmethod
    def put(self, event: Event) -> None: ...
    @abstractmethod
    def end(self) -> None:
        """The router has nothing more; the engine is ready for another serving."""

    @property
    @abstractmethod
    def _num_arrivals(self) -> int:
        """Requests that were put there and not looked at."""

    def load(self) -> Load:
        arrivals = self._num_arrivals
        keys = self._keys.copy() if self.dispatch.router.needs_index else None
        return self._load._replace(
            as_of_us=self.calendar.now_us, num_waiting=self._load.num_waiting + arrivals, cached_keys=keys
        )

    def fail(self) -> Lost:
        now_us, comes_back = self.calendar.now_us, self._shared.comes_back(self.id, self.calendar.now_us)
        if not comes_back:
            tell(f"xllm-lab: {self._shared.processes.how_it_ended(self.id)}")
        self._go()
        if comes_back:
            self._shared.processes.start(self.id)  # it loads its model meanwhile
        self._shared.deliveries.append(Delivery(now_us, self.id, "down"))
        lost = sorted(self._live.values(), key=lambda pair: (pair[1].arrival_us, pair[1].id))
        lost += [(e.request, e.record) for e in self._inbox if e.arrives and e.record is not None]
        withdrawn = frozenset(self._leaving)
        self._forget()
        return Lost(lost, withdrawn)

    def _go(self) -> None:
        self._shared.processes.kill(self.id)
        self._channel = None

    def _come(self) -> Channel:
        """Its process is there, and told what to serve on."""
        processes = self._shared.processes
        if processes.is_lost(self.id):
            processes.kill(self.id)
        processes.start(self.id)
        self._channel = processes.await_up(self.id)
        self._channel.tell({"do": "serve", "start_us": self.calendar.now_us, **self._shared.opening})
        return self._channel

    def _hand_over(self) -> list[dict[str, Any]]:
        """What came for the engine, as it is told."""
        events = []
        while self._inbox:
            event = self._inbox.popleft()
            events.append(event_cells(event))
            if event.record is not None:
                event.record.instance = self.id
                self._live[event.request.id] = (event.request, event.record)
        return events

    def _noted(self, event: Event) -> Event:
        if not event.arrives:
            self._leaving.add(event.request.id)
        return event

    def _commit(self, report: Mapping[str, Any]) -> None:
        """What an engine said it has done counts."""
        for us, kind, request in report.get("took", ()):
            self._shared.deliveries.append(Delivery(us, self.id, kind, RequestId(request)))
        drawn_us = None
        if "step" in report:
            step = StepRecord(**{**report["step"], "step": self._num_steps})
            drawn_us = step.end_us
            self._num_steps += 1
            self._shared.records.steps.append(step)
        for request, tokens in report.get("drawn", ()):
            assert drawn_us is not None, "tokens are drawn in steps"
            record = self._live[RequestId(request)][1]
            record.output_token_ids.extend(tokens)
            record.token_times_us.extend([drawn_us] * len(tokens))
        for request, changes in report.get("changed", ()):
            apply_changes(self._live[RequestId(request)][1], changes)
        for request, end_us in report.get("ended", ()):
            _, record = self._live.pop(RequestId(request))
            self._leaving.discard(record.id)
            self._shared.records.request(record)
            self.dispatch.on_end(record.id, end_us)

    def _refuse_error(self, message: Mapping[str, Any]) -> None:
        """An engine that cannot go on for reasons of its own ends the run."""
        if "error" in message:
            error = PolicyError if message["error"] == "PolicyError" else ConfigError
            raise error(f"instance {self.id}: {message['says']}")


class LockstepSeat(ProcessSeat):
    """One whose engine serves in virtual time: it says what it has done by `us`, and waits for what came until then."""

    def __init__(self, calendar: VirtualCalendar, instance: InstanceId, shared: Surroundings) -> None:
        self._calendar = calendar
        self._life = 0
        self._rests = self._is_woken = False
        super().__init__(instance, shared)

    @property
    def calendar(self) -> VirtualCalendar:
        return self._calendar

    @property
    def is_at_rest(self) -> bool:
        return self.is_up and self._rests

    @property
    def _num_arrivals(self) -> int:
        return sum(event.arrives for event in self._inbox)

    def _begin(self) -> None:
        self._come()
        self._rests = self._is_woken = False
        self._take(self._next_report())

    def fail(self) -> Lost:
        self._life += 1
        return super().fail()

    def put(self, event: Event) -> None:
        self._inbox.append(self._noted(event))
        if self._rests and not self._is_woken:
            self._is_woken = True
            self._soon(self._calendar.now_us, self._wake)

    def end(self) -> None:
        while self.is_up:
            self.channel.tell({"over": True, "us": self._calendar.now_us})
            message = self._next_report()
            if "served" in message:
                self.graphs = message["graphs"]
                return

    def _soon(self, when_us: int, action: Callable[[], None]) -> None:
        self._calendar.call(when_us, FIRST_INSTANCE + self.id, partial(self._unless_failed, self._life, action))

    def _unless_failed(self, life: int, action: Callable[[], None]) -> None:
        if life != self._life:
            return
        try:
            action()
        except GoneError:
            if self.is_up and life == self._life:
                self.dispatch.fail(self.id)

    def _wake(self) -> None:
        self._rests = self._is_woken = False
        self.channel.tell({"us": self._calendar.now_us})
        self._take(self._next_report())

    def _over(self, report: Mapping[str, Any]) -> None:
        """What it did is over: it counts, and the engine hears what came meanwhile."""
        self._commit(report)
        self.channel.tell({"us": self._calendar.now_us, "events": self._hand_over()})
        self._take(self._next_report())

    def _take(self, report: dict[str, Any]) -> None:
        """It has been until `report["us"]`, and all that it did until then counts when it is that late."""
        if "load" in report:
            self._load = load_from(report["load"])
            apply_index(self._keys, report)
        self._end_early(report)
        if report.get("rests"):
            self._commit(report)
            self._rests = True
            if self._inbox:
                self._is_woken = True
                self._soon(self._calendar.now_us, self._wake)
        else:
            self._soon(report["us"], partial(self._over, report))

    def _end_early(self, report: dict[str, Any]) -> None:
        """Who ended as the engine looked, before its step, has ended now: its client went away."""
        now_us = self._calendar.now_us
        early = {request for request, end_us in report.get("ended", ()) if end_us <= now_us}
        if early:
            which = {name: report.pop(name, []) for name in ("changed", "ended")}
            for name, rows in which.items():
                report[name] = [row for row in rows if row[0] not in early]
            self._commit({name: [row for row in rows if row[0] in early] for name, rows in which.items()})

    def _next_report(self) -> dict[str, Any]:
        while (message := self.channel.hear(_LOOK_S)) is None:
            if self._shared.processes.is_lost(self.id):
                raise GoneError("its lease is lost")
        self._refuse_error(message)
        return message


class WallSeat(ProcessSeat):
    """One whose engine serves in real time, and says what it did as it is done."""

    def __init__(self, calendar: WallCalendar, instance: InstanceId, shared: Surroundings) -> None:
        self._calendar = calendar
        self._is_warm = False
        self._unseen: dict[RequestId, int] = {}  # their prompt tokens
        super().__init__(instance, shared)

    @property
    def calendar(self) -> WallCalendar:
        return self._calendar

    @property
    def _num_arrivals(self) -> int:
        return len(self._unseen)

    def prepare(self) -> None:
        """It is warm when this returns. GoneError, InstanceError: it does not come up."""
        self._come()
        while (message := self.channel.hear(_LOOK_S)) is None or "warm" not in message:
            if message is not None:
                self._refuse_error(message)
            elif self._shared.processes.is_lost(self.id):
                raise GoneError("its lease is lost")
        self._is_warm = True

    def _begin(self) -> None:
        if not self._is_warm:
            self.prepare()
        self._is_warm = False
        self._unseen.clear()
        self.channel.tell({"start_ns": self._calendar.start_ns})

    def put(self, event: Event) -> None:
        self._inbox.append(self._noted(event))
        if event.arrives:
            self._unseen[event.request.id] = event.request.prompt.num_tokens
        with contextlib.suppress(GoneError):  # which the next look finds out
            self.channel.tell({"us": self._calendar.now_us, "events": self._hand_over()})

    def fail(self) -> Lost:
        # A configured outage began when it was to begin: what was done since never was.
        if not self._shared.comes_back(self.id, self._calendar.now_us):
            with contextlib.suppress(GoneError):
                self.hear()  # what it said before it went
            self._calendar.look()
        return super().fail()

    def hear(self) -> None:
        """Take what it said. GoneError: it is not there any more."""
        for message in self.channel.heard():
            self._refuse_error(message)
            for _, _, request in message.get("took", ()):
                self._unseen.pop(request, None)
            self._commit(message)
            if "load" in message:
                self._load = load_from(message["load"])
                apply_index(self._keys, message)
                if self.dispatch.config.heartbeat_us:
                    self.dispatch.router.known[self.id].beat(self._told())

    def _told(self) -> Load:
        keys = self._keys.copy() if self.dispatch.router.needs_index else None
        unseen = {"num_unseen": len(self._unseen), "num_unseen_tokens": sum(self._unseen.values())}
        return self._load._replace(cached_keys=keys, **unseen)

    def end(self) -> None:
        while self.is_up:
            self.channel.tell({"over": True})
            while (message := self.channel.hear(_LOOK_S)) is not None:
                if "served" in message:
                    self.graphs = message["graphs"]
                    return
                self._refuse_error(message)
                self._commit(message)  # a step that was planned ahead, for requests that ended
            if self._shared.processes.is_lost(self.id):
                raise GoneError("its lease is lost")
