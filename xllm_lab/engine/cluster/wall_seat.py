"""An instance in real time: its engine goes on, and the router hears of it."""

from __future__ import annotations

import contextlib

from xllm_lab.dispatch import Lost
from xllm_lab.engine.cluster.calendar import WallCalendar
from xllm_lab.engine.cluster.messages import apply_index, load_from
from xllm_lab.engine.cluster.seats import LOOK_S, ProcessSeat, Surroundings
from xllm_lab.policies.routing import InstanceId
from xllm_lab.router import Load
from xllm_lab.serving import Event
from xllm_lab.wire import GoneError
from xllm_lab.workload import RequestId


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
        """It begins to warm up. InstanceError: it does not come up."""
        self._come()

    def await_warm(self) -> None:
        """It is warm when this returns. GoneError, InstanceError: it does not come up."""
        if not self.is_up:
            self._come()
        while (message := self.channel.hear(LOOK_S)) is None or "warm" not in message:
            if message is not None:
                self._refuse_error(message)
            elif self._shared.processes.is_lost(self.id):
                raise GoneError("its lease is lost")
        self._is_warm = True

    def _begin(self) -> None:
        if not self._is_warm:
            self.await_warm()
        self._is_warm = False
        self._unseen.clear()
        self.channel.tell({"start_ns": self._calendar.start_ns})

    def put(self, event: Event) -> None:
        self._inbox.append(event)
        if event.arrives:
            self._unseen[event.request.id] = event.request.prompt.num_tokens
        calls = self._shared.call(self.id) if event.arrives else {}
        with contextlib.suppress(GoneError):  # which the next look finds out
            self.channel.tell({"us": self._calendar.now_us, "events": self._pass_on(), **calls})

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
            while (message := self.channel.hear(LOOK_S)) is not None:
                if "served" in message:
                    self._served(message)
                    return
                self._refuse_error(message)
                self._commit(message)  # a step that was planned ahead, for requests that ended
            if self._shared.processes.is_lost(self.id):
                raise GoneError("its lease is lost")
