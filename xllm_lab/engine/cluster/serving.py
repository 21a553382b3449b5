"""One workload's way through an engine's fleet, in lockstep or in real time."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xllm_lab.decisions import DecisionLog, Delivery
from xllm_lab.dispatch import Dispatch
from xllm_lab.engine.cluster.calendar import VirtualCalendar, WallCalendar
from xllm_lab.engine.cluster.lockstep_seat import LockstepSeat
from xllm_lab.engine.cluster.processes import Processes
from xllm_lab.engine.cluster.seats import ProcessSeat, Surroundings
from xllm_lab.engine.cluster.wall_seat import WallSeat
from xllm_lab.errors import InstanceError, PolicyError
from xllm_lab.fleet_config import FleetConfig, LinkConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.routing import InstanceId
from xllm_lab.records import Records, RoleChange
from xllm_lab.transfers import Transfer
from xllm_lab.wire import GoneError
from xllm_lab.workload import Workload

_LOOK_S = 0.02  # at who is lost, in real time


@dataclass(slots=True, kw_only=True)
class Serving:
    """A workload, the fleet that serves it, and what was recorded on the way.

    Attributes:
        opening: what the engines are to serve on, as they are told.
    """

    processes: Processes
    workload: Workload
    fleet: FleetConfig
    config: InstanceConfig
    vocab_size: int
    records: Records
    opening: dict[str, Any]
    log: DecisionLog = field(default_factory=DecisionLog)
    deliveries: list[Delivery] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    roles: list[RoleChange] = field(default_factory=list)
    dispatch: Dispatch = field(init=False)
    _seats: Sequence[WallSeat] = ()
    _num_calls: int = 0

    def open_dispatch(self, calendar: VirtualCalendar, *, asks_for_loads: bool) -> None:
        self.dispatch = Dispatch(
            *(self.workload, self.fleet, self.config, calendar),
            recorder=self.records,
            vocab_size=self.vocab_size,
            on_transfer=None if self.fleet.link == LinkConfig() else self.transfers.append,
            on_decision=self.log.listener(),
            on_role=self.roles.append,
            asks_for_loads=asks_for_loads,
        )
        self.log.sees_index = self.opening["tells_index"] = self.dispatch.router.needs_index

    def in_lockstep(self) -> Sequence[ProcessSeat]:
        """The router's virtual time is everybody's."""
        calendar = VirtualCalendar()
        self.open_dispatch(calendar, asks_for_loads=True)
        seats = [LockstepSeat(calendar, i, self._surroundings()) for i in self.processes.instances]
        self._begin(seats)
        while self.dispatch.num_open or any(seat.is_up and not seat.is_at_rest for seat in seats):
            self._look_after(seats, calendar)
            if not calendar.has_more and self.dispatch.num_open:
                raise PolicyError(
                    f"the batch policy leaves {self.dispatch.num_open} requests waiting for ever "
                    f"at {calendar.now_us} us"
                )
            if calendar.has_more:
                calendar.run_next()
        self._end(seats)
        return seats

    def in_real_time(self) -> Sequence[ProcessSeat]:
        """All engines serve side by side, from the moment in which the last of them is warm."""
        calendar = WallCalendar()
        self.open_dispatch(calendar, asks_for_loads=False)
        seats = self._seats = [WallSeat(calendar, i, self._surroundings()) for i in self.processes.instances]
        for step in (WallSeat.prepare, WallSeat.await_warm):  # side by side: some wait for one another
            for seat in seats:
                seat.dispatch = self.dispatch
                _prepared(seat, step)
        calendar.start()
        self._begin(seats)
        while self.dispatch.num_open:
            calendar.run_due()
            self._look_after(seats, calendar)
            self._listen(seats, calendar)
        self._end(seats)
        return seats

    def _listen(self, seats: Sequence[WallSeat], calendar: WallCalendar) -> None:
        """Until somebody says something, or something is due."""
        wait_s = _LOOK_S if calendar.next_us is None else min(_LOOK_S, calendar.left_s())
        speaking = {seat.channel.fileno(): seat for seat in seats if seat.is_up}
        ready, _, _ = select.select(list(speaking), [], [], wait_s)
        calendar.run_due()
        for number in ready:
            seat = speaking[number]
            try:
                if seat.is_up:
                    seat.hear()
            except GoneError:
                self._fail(seat)

    def _fail(self, seat: ProcessSeat) -> None:
        if self.processes.share_experts:
            self.processes.refuse_lost(self.processes.how_it_ended(seat.id))
        self.dispatch.fail(seat.id)

    def _surroundings(self) -> Surroundings:
        return Surroundings(self.processes, self.records, self.deliveries, self.opening, self._comes_back, self._call)

    def _call(self, instance: InstanceId) -> dict[str, Any]:
        if not self.processes.share_experts:
            return {}
        self._num_calls += 1
        told = {"calls": self._num_calls}
        for seat in self._seats:
            if seat.id != instance and seat.is_up:
                with contextlib.suppress(GoneError):  # which the next look finds out
                    seat.channel.tell(told)
        return told

    def _comes_back(self, instance: InstanceId, now_us: int) -> bool:
        return any(o.instance == instance and o.start_us <= now_us < o.end_us for o in self.fleet.outages)

    def _begin(self, seats: Sequence[ProcessSeat]) -> None:
        for seat in seats:
            seat.dispatch = self.dispatch
        self.dispatch.begin(seats)

    def _look_after(self, seats: Sequence[ProcessSeat], calendar: VirtualCalendar) -> None:
        """Whoever is lost fails; when nobody is left and nobody comes back, what is held is given up."""
        for seat in seats:
            if seat.is_up and self.processes.is_lost(seat.id):
                self._fail(seat)
        comes = any(o.end_us > calendar.now_us for o in self.fleet.outages)
        if not self.dispatch.router.up and not comes:
            self.dispatch.give_up()

    def _end(self, seats: Sequence[ProcessSeat]) -> None:
        """They are ready for another serving."""
        for seat in seats:
            try:
                seat.end()
            except GoneError:
                self.processes.kill(seat.id)


def _prepared(seat: WallSeat, step: Callable[[WallSeat], None]) -> None:
    try:
        step(seat)
    except GoneError as error:
        raise InstanceError(f"instance {seat.id}: {error}") from None
