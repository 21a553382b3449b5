"""The router's time: what is to happen when. Virtual time jumps to the next of it, real time waits for it."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from xllm_lab.engine.clock import WallClock, machine_ns


class VirtualCalendar:
    """A `Calendar` whose time is that of what happens."""

    def __init__(self) -> None:
        self.now_us = 0
        self._entries: list[tuple[int, int, int, Callable[[], None]]] = []
        self._num_made = 0

    @property
    def has_more(self) -> bool:
        return bool(self._entries)

    @property
    def next_us(self) -> int | None:
        return self._entries[0][0] if self._entries else None

    def call(self, when_us: int, priority: int, action: Callable[[], None]) -> None:
        assert when_us >= self.now_us, f"something is to happen at {when_us}, and it is {self.now_us}"
        self._num_made += 1
        heapq.heappush(self._entries, (when_us, priority, self._num_made, action))

    def run_next(self) -> None:
        """Do what comes next, at its time."""
        when_us, _, _, action = heapq.heappop(self._entries)
        self.now_us = max(self.now_us, when_us)
        action()


class WallCalendar(VirtualCalendar):
    """A `Calendar` of real time, which begins with `start`.

    Attributes:
        start_ns: time zero, on the clock that all processes of the machine share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start_ns = 0

    def start(self) -> None:
        """It is time zero."""
        self.start_ns = machine_ns()
        self._clock = WallClock(self.start_ns)

    def call(self, when_us: int, priority: int, action: Callable[[], None]) -> None:
        super().call(max(when_us, self.now_us), priority, action)

    def left_s(self) -> float:
        """Until something is to happen."""
        assert self.next_us is not None, "something is"
        return max(0.0, (self.next_us - self._clock.now_us()) / 1e6)

    def look(self) -> None:
        """It is as late as it is, whatever is due."""
        self.now_us = max(self.now_us, self._clock.now_us())

    def run_due(self) -> None:
        """Do what is due by now, and have the time be now."""
        now_us = self._clock.now_us()
        while self.next_us is not None and self.next_us <= now_us:
            self.run_next()
        self.now_us = max(self.now_us, now_us)
