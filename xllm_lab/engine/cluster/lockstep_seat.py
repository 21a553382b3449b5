"""An instance in virtual time: its engine and the router take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from xllm_lab.dispatch import FIRST_INSTANCE, Lost
from xllm_lab.engine.cluster.calendar import VirtualCalendar
from xllm_lab.engine.cluster.messages import apply_index, load_from
from xllm_lab.engine.cluster.seats import LOOK_S, ProcessSeat, Surroundings
from xllm_lab.policies.routing import InstanceId
from xllm_lab.serving import Event
from xllm_lab.wire import GoneError


class LockstepSeat(ProcessSeat):
    """One whose engine serves in virtual time: it says what it has done by `us`, and waits for what came until then."""

    def __init__(self, calendar: VirtualCalendar, instance: InstanceId, shared: Surroundings) -> None:
        self._calendar = calendar
        self._life = 0
        self._rests = self._is_woken = False
        self._num_rests = 0
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
        self._inbox.append(event)
        if self._rests and not self._is_woken:
            self._is_woken = True
            self._soon(self._calendar.now_us, self._wake)

    def end(self) -> None:
        while self.is_up:
            self.channel.tell({"over": True, "us": self._calendar.now_us})
            message = self._next_report()
            if "served" in message:
                self._served(message)
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

    def _wake_from(self, rest: int) -> None:
        """Unless it was woken, or rests again."""
        if self._rests and not self._is_woken and self._num_rests == rest:
            self._wake()

    def _over(self, report: Mapping[str, Any]) -> None:
        """What it did is over: it counts, and the engine hears what came meanwhile."""
        self._commit(report)
        self.channel.tell({"us": self._calendar.now_us, "events": self._pass_on()})
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
            self._num_rests += 1
            if self._inbox:
                self._is_woken = True
                self._soon(self._calendar.now_us, self._wake)
            elif report["until_us"] is not None:  # a copy is over then
                when_us = max(report["until_us"], self._calendar.now_us)
                self._soon(when_us, partial(self._wake_from, self._num_rests))
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
        while (message := self.channel.hear(LOOK_S)) is None:
            if self._shared.processes.is_lost(self.id):
                raise GoneError("its lease is lost")
        self._refuse_error(message)
        return message
