"""The instances of an engine's fleet as its router has them: each a process, and what is known of its requests.

The router keeps a copy of every record. It follows what the engine says of each step, so that nothing is lost with a
process but the step it was at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from xllm_lab.copies import CopyRecord
from xllm_lab.decisions import DOWN, UP, Delivery
from xllm_lab.dispatch import Dispatch, Lost
from xllm_lab.engine.cluster.calendar import VirtualCalendar
from xllm_lab.engine.cluster.messages import apply_changes, event_cells
from xllm_lab.engine.cluster.processes import Processes
from xllm_lab.errors import ConfigError, InstanceError, PolicyError, RankError
from xllm_lab.ledger import BlockKey
from xllm_lab.policies.routing import InstanceId
from xllm_lab.progress import tell
from xllm_lab.records import Records, RequestRecord, StepRecord
from xllm_lab.router import Load
from xllm_lab.serving import Event
from xllm_lab.wire import Channel, GoneError
from xllm_lab.workload import Request, RequestId

LOOK_S = 0.05  # between looks at whether a process that is waited for still has its lease
_NOTHING = Load(0, 0, 0, 0, 0.0, None)


class Surroundings(NamedTuple):
    """What the seats of a fleet share.

    Attributes:
        opening: what the engines are to serve on, as they are told.
        comes_back: whether an instance that fails at this time was said to come back.
        call: tells all others that a request came to an instance, if they share experts; returns what it is to be told.
    """

    processes: Processes
    records: Records
    deliveries: list[Delivery]
    opening: Mapping[str, Any]
    comes_back: Callable[[InstanceId, int], bool]
    call: Callable[[InstanceId], Mapping[str, Any]]


class ProcessSeat(ABC):
    """A `Seat`.

    Attributes:
        graphs: what became of its steps' graphs, once it has served.
        store: and of its blocks in the store, if there is one.
    """

    def __init__(self, instance: InstanceId, shared: Surroundings) -> None:
        self.id = instance
        self.dispatch: Dispatch  # which needs the calendar first
        self.graphs: dict[str, Any] | None = None
        self._shared = shared
        self._channel: Channel | None = None
        self._num_steps = 0
        self._num_copies = self._num_copies_before = 0  # in all, and in lives before this one
        self.store: dict[str, Any] | None = None
        self._was_up = False
        self._forget()

    def _forget(self) -> None:
        """Nothing is there."""
        self._inbox: deque[Event] = deque()
        self._live: dict[RequestId, tuple[Request, RequestRecord]] = {}
        self._keys: set[BlockKey] = set()
        self._load = _NOTHING
        self._copying: dict[int, CopyRecord] = {}

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
            self._shared.deliveries.append(Delivery(self.calendar.now_us, self.id, UP))

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
        self._shared.deliveries.append(Delivery(now_us, self.id, DOWN))
        lost = sorted(self._live.values(), key=lambda pair: (pair[1].arrival_us, pair[1].id))
        lost += [(e.request, e.record) for e in self._inbox if e.arrives and e.record is not None]
        self._forget()
        self._num_copies_before = self._num_copies
        return lost

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

    def _pass_on(self) -> list[dict[str, Any]]:
        """What came for the engine, as it is told."""
        events = []
        while self._inbox:
            event = self._inbox.popleft()
            events.append(event_cells(event))
            if event.record is not None:
                event.record.instance = self.id
                self._live[event.request.id] = (event.request, event.record)
        return events

    def _commit(self, report: Mapping[str, Any]) -> None:
        """What an engine said it has done counts."""
        for us, kind, request in report.get("took", ()):
            self._shared.deliveries.append(Delivery(us, self.id, kind, RequestId(request)))
        self._commit_copies(report)
        drawn_us = None
        if "step" in report:
            told = report["step"]
            numbers = {"step": self._num_steps, "num_copies": told["num_copies"] + self._num_copies_before}
            step = StepRecord(**{**told, **numbers})
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
            self._shared.records.request(record)
            self.dispatch.on_end(record.id, end_us)
        for request, left_us in report.get("handed_over", ()):
            self.dispatch.on_handover(*self._live.pop(RequestId(request)), left_us)

    def _commit_copies(self, report: Mapping[str, Any]) -> None:
        for cells in report.get("copies", ()):
            record = CopyRecord(**{**cells, "copy": self._num_copies})
            self._copying[cells["copy"]] = record
            self._num_copies += 1
            self._shared.records.copy(record)
        for number, end_us, num_moved_tokens in report.get("copied", ()):
            record = self._copying.pop(number)
            record.end_us, record.num_moved_tokens = end_us, num_moved_tokens

    def _served(self, message: Mapping[str, Any]) -> None:
        """It has, and is ready for another serving."""
        self.graphs, self.store = message["graphs"], message["store"]

    def _refuse_error(self, message: Mapping[str, Any]) -> None:
        """An engine that cannot go on for reasons of its own ends the run."""
        if message.get("error") == RankError.__name__:
            self._shared.processes.refuse_lost(f"instance {self.id}: {message['says']}")
        if "error" in message:
            error = PolicyError if message["error"] == "PolicyError" else ConfigError
            raise error(f"instance {self.id}: {message['says']}")
