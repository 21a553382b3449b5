"""The engine's time. The only place in the package that reads a clock for a decision or a record."""

from __future__ import annotations

import time
from typing import Protocol

from xllm_lab.errors import ConfigError

CLOCKS = ("wall", "virtual")
TIMERS = ("wall", "cpu")


class Clock(Protocol):
    def now_us(self) -> int:
        """Microseconds since the run's start."""
        ...

    def wait_until(self, until_us: int) -> int:
        """Let time pass up to `until_us`; returns the time then."""
        ...


class WallClock:
    """Real time: waiting sleeps."""

    def __init__(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def now_us(self) -> int:
        return (time.perf_counter_ns() - self._start_ns) // 1000

    def wait_until(self, until_us: int) -> int:
        while (now_us := self.now_us()) < until_us:
            time.sleep((until_us - now_us) / 1e6)
        return now_us


class VirtualClock:
    """Work takes the time it takes, waiting takes none: an hour of light load costs only its compute.

    `timer="cpu"` counts this process's processor time instead of wall time, which other processes on a shared
    machine disturb much less. It is the time the work takes only while one thread computes.
    """

    def __init__(self, timer: str = "wall") -> None:
        self._read_ns = time.process_time_ns if timer == "cpu" else time.perf_counter_ns
        self._zero_ns = self._read_ns()

    def now_us(self) -> int:
        return (self._read_ns() - self._zero_ns) // 1000

    def wait_until(self, until_us: int) -> int:
        self._zero_ns -= max(0, until_us - self.now_us()) * 1000
        return self.now_us()


def make_clock(clock: str, timer: str) -> Clock:
    """ConfigError for an unknown clock or timer, or for processor time on a real-time clock."""
    if clock not in CLOCKS:
        raise ConfigError(f"clock is {clock!r}, accepted: {', '.join(CLOCKS)}")
    if timer not in TIMERS:
        raise ConfigError(f"timer is {timer!r}, accepted: {', '.join(TIMERS)}")
    if clock == "wall":
        if timer == "cpu":
            raise ConfigError("timer 'cpu' cannot be kept on clock 'wall'; accepted: clock 'virtual'")
        return WallClock()
    return VirtualClock(timer)
