"""Calls with a deadline into libraries that have none.

A lane is a thread with memory of its own, which alone the library reads and writes. Whoever takes a lane waits until
his deadline and no longer; a call that is still going on keeps its lane, memory included, and gives both back when it
returns. So a late answer is written where nobody looks, and as many calls can hang as there are lanes: then every
further one is late at once, or waits for a lane until its own deadline.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, LifoQueue, SimpleQueue
from typing import Any, TypeVar

import numpy as np

from xllm_lab.store.envelope import Bytes

T = TypeVar("T")


class LateError(Exception):
    """The deadline has passed; caught where deadlines are set."""


def now_us() -> int:
    """Of the clock by which deadlines are meant, which nobody sets."""
    return time.monotonic_ns() // 1000


class Lane:
    """One thread and its memory.

    Attributes:
        slots: [num_slots, slot_bytes], each an envelope.
    """

    def __init__(self, num_slots: int, slot_bytes: int, free: Callable[[Lane], None]) -> None:
        stride = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE  # no two slots on a page
        self.memory: Bytes = np.frombuffer(mmap.mmap(-1, num_slots * stride, flags=mmap.MAP_PRIVATE), np.uint8)
        self.slots: Bytes = self.memory.reshape(num_slots, stride)[:, :slot_bytes]
        self.is_left_behind = False
        self._free = free
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._settling = threading.Lock()  # whoever is first: the call that returns, or the deadline
        self._has_returned = threading.Semaphore(0)
        self._is_running = False
        self._result: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._serve, name="block-store", daemon=True).start()

    def run(self, call: Callable[[], T], deadline_us: int) -> T:
        """What `call` returns or raises, on this lane's thread.

        Raises:
            LateError: it goes on past the deadline; the lane is no longer the caller's.
        """
        self._is_running = True
        self._calls.put(call)
        if not self._has_returned.acquire(timeout=max(0, deadline_us - now_us()) / 1e6):
            with self._settling:
                self.is_left_behind = self._is_running
            if self.is_left_behind:
                raise LateError
            self._has_returned.acquire()
        error, self._error = self._error, None
        result, self._result = self._result, None
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def end(self) -> None:
        """Let the thread end."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._result = call()
            except BaseException as error:
                self._error = error
            del call
            with self._settling:
                self._is_running = False
                if self.is_left_behind:
                    self.is_left_behind = False
                    self._result = self._error = None
                    self._free(self)
                    continue
            self._has_returned.release()


class Lanes:
    """All lanes of a store, which threads share."""

    def __init__(self, num_lanes: int, num_slots: int, slot_bytes: int) -> None:
        self._free: LifoQueue[Lane] = LifoQueue()
        self.all = tuple(Lane(num_slots, slot_bytes, self._free.put) for _ in range(num_lanes))
        for lane in self.all:
            self._free.put(lane)

    @contextmanager
    def take(self, deadline_us: int) -> Iterator[Lane]:
        """A lane of one's own; a LateError within is its `run`'s.

        Raises:
            LateError: all are taken until the deadline.
        """
        try:
            lane = self._free.get(timeout=max(0, deadline_us - now_us()) / 1e6)
        except Empty:
            raise LateError from None
        is_mine = True
        try:
            yield lane
        except LateError:
            is_mine = False
            raise
        finally:
            if is_mine:
                self._free.put(lane)

    def drain(self, deadline_us: int) -> bool:
        """Take every lane for good; whether all came back by the deadline."""
        try:
            for _ in self.all:
                self._free.get(timeout=max(0, deadline_us - now_us()) / 1e6).end()
        except Empty:
            return False
        return True
