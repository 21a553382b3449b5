"""The engine's time. The only place in the package that reads a clock for a decision or a record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

from xllm_lab.errors import ConfigError

T = TypeVar("T")

CLOCKS = ("wall", "virtual")
TIMERS = ("wall", "cpu")


class Clock(Protocol):
    def now_us(self) -> int:
        """Microseconds since the run's start."""
        ...

    def wait_until(self, until_us: int) -> int:
        """Let time pass up to `until_us`; returns the time then."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether all threads read the same time: what another has not done yet, it will have done later than now."""
        ...

    def times(self, work: Callable[[], T], *, not_before_us: int) -> Timed[T]:
        """Do a device's work, on whatever thread, and say when it began and ended.

        Args:
            not_before_us: when it was launched, or the work before it was done.
        """
        ...


class Timed(NamedTuple, Generic[T]):
    """What came of some work, and the time it took, [start_us, end_us)."""

    result: T
    start_us: int
    end_us: int


class WallClock:
    """Real time: waiting sleeps.

    Args:
        start_ns: of the run, as `machine_ns` reads it; None is now.
    """

    is_shared = True

    def __init__(self, start_ns: int | None = None) -> None:
        self._start_ns = machine_ns() if start_ns is None else start_ns

    def now_us(self) -> int:
        return (machine_ns() - self._start_ns) // 1000

    def wait_until(self, until_us: int) -> int:
        while (now_us := self.now_us()) < until_us:
            time.sleep((until_us - now_us) / 1e6)
        return now_us

    def times(self, work: Callable[[], T], *, not_before_us: int) -> Timed[T]:
        start_us = self.now_us()
        result = work()
        return Timed(result, start_us, self.now_us())


class VirtualClock:
    """Work takes the time it takes, waiting takes none: an hour of light load costs only its compute.

    `timer="cpu"` counts processor time instead of wall time, which other processes on a shared machine disturb much
    less: each thread's own, so that host and device that work side by side are not added up. It is the time the work
    takes only while one thread computes.
    """

    def __init__(self, timer: str = "wall") -> None:
        self._read_ns = timer_ns(timer)
        self.is_shared = timer == "wall"
        self._zero_ns = self._read_ns()

    def now_us(self) -> int:
        return (self._read_ns() - self._zero_ns) // 1000

    def wait_until(self, until_us: int) -> int:
        self._zero_ns -= max(0, until_us - self.now_us()) * 1000
        return self.now_us()

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """What happens inside takes no time: it is no work of this engine's. Nothing may run beside it on wall time."""
        before_ns = self._read_ns()
        try:
            yield
        finally:
            self._zero_ns += self._read_ns() - before_ns

    def times(self, work: Callable[[], T], *, not_before_us: int) -> Timed[T]:
        start_us = self.now_us() if self.is_shared else not_before_us
        before_ns = self._read_ns()
        result = work()
        return Timed(result, start_us, start_us + (self._read_ns() - before_ns) // 1000)


def machine_ns() -> int:
    """Nanoseconds of the machine's one monotonic clock, which all of its processes read alike; its zero is anywhere."""
    return time.monotonic_ns()


def timer_ns(timer: str) -> Callable[[], int]:
    """What a timer of `TIMERS` reads, in nanoseconds."""
    return time.thread_time_ns if timer == "cpu" else time.perf_counter_ns


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
