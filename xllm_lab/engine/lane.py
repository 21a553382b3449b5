"""The device's side of the engine: steps run one after another, in order of launch, beside the host or in its place.

beside the host    host     plan k | plan k+1 |  ...  | take k | plan k+2
                   device          |------ k ------|------ k+1 ------|
in its place       host     plan k |------ k ------| take k | plan k+1 |------ k+1 ------|
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

from xllm_lab.engine.clock import Clock, Timed

T = TypeVar("T")


class Done(NamedTuple, Generic[T]):
    """What came of a launch.

    Attributes:
        end_us: when the device had done it.
        device_us: how long it took.
        idle_us: how long the device had nothing to do before it; None for the first launch, and after a rest.
    """

    result: T
    end_us: int
    device_us: int
    idle_us: int | None


class Lane:
    """Runs what is launched. Close it, or use it with `with`.

    Args:
        begins: called first on the thread beside the host.

    Attributes:
        is_beside: on a thread of its own, while the host goes on. PyTorch and our kernels let go of Python's lock while
            they compute.
        latest: what was launched last.
    """

    def __init__(self, clock: Clock, *, beside: bool, begins: Callable[[], None] | None = None) -> None:
        self._clock = clock
        self.is_beside = beside
        self._thread = ThreadPoolExecutor(1, "device", begins) if beside else None
        self._free_us: int | None = None  # when the last launch was done; the device's own
        self.latest: Future[Done[Any]] | None = None

    def launch(self, work: Callable[[], T]) -> Future[Done[T]]:
        """Queue work; in the host's place, do it now."""
        now_us = self._clock.now_us()
        if self._thread is not None:
            done = self._thread.submit(self._do, work, now_us)
        else:
            done = Future()
            done.set_result(self._do(work, now_us))
        self.latest = done
        return done

    def rest(self) -> None:
        """The host has nothing to launch for a while: what the device idles then is nobody's fault."""
        self._free_us = None

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _do(self, work: Callable[[], T], launched_us: int) -> Done[T]:
        timed: Timed[T] = self._clock.times(work, not_before_us=max(launched_us, self._free_us or 0))
        idle_us = None if self._free_us is None else max(0, timed.start_us - self._free_us)
        self._free_us = timed.end_us
        return Done(timed.result, timed.end_us, timed.end_us - timed.start_us, idle_us)
