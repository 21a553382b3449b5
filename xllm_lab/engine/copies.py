"""The engine's copies of KV blocks between device, host and store: real bytes, beside the steps.

Each way has a thread, and where the device has a part in it and is an accelerator, a stream, of its own:

    steps      |---- k ----|---- k+1 ----|---- k+2 ----|
    offload    asked........|-- copy --|                       behind the steps that were launched before it: what they
    restore          asked..|------- copy -------|             write, or read, may be in its blocks
                                         ^ told with the first answer at or after the end, when the bytes are there

Steps launched after a copy was told of need not wait for it, and those launched before know nothing of its blocks.

A link may be emulated: a copy then ends no sooner than its bytes take at some rate. That moves its end, and holds up
nobody but those who wait for it and the copies behind it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

from xllm_lab.copies import Copy, CopyEnd
from xllm_lab.copy_time import HOST_KINDS, KINDS, STORE_KINDS, Copied, CopyTime, fit_copy_time
from xllm_lab.engine.clock import Clock, machine_ns
from xllm_lab.engine.device import Device
from xllm_lab.engine.host_pool import HostPool
from xllm_lab.engine.kv import LayerKv
from xllm_lab.engine.lane import Done, Lane
from xllm_lab.engine.store_ways import StoreWays
from xllm_lab.policies.cache import CopyKind
from xllm_lab.serving import Woke
from xllm_lab.store import BlockStore

# Copies that are timed at start: the most blocks of one.
_MOST_TIMED_BLOCKS = 64
_PATIENCE_US = 10_000_000


class _Launched(NamedTuple):
    """A copy in a queue.

    Attributes:
        behind: the step that was launched last before it.
        least_us: what it takes at the least.
        end: what became of it, and when.
    """

    number: int
    launched_us: int
    behind: Future[Done[Any]] | None
    least_us: int
    end: Future[CopyEnd]


class _OneWay:
    """Copies of one kind, one after another on a thread of their own."""

    def __init__(self, kind: CopyKind, clock: Clock) -> None:
        self._clock, self._kind = clock, kind
        self._thread = ThreadPoolExecutor(1, kind)
        self._queue: deque[_Launched] = deque()
        self._over_us = 0  # end of the copy that was taken last
        self._free_us = 0  # end of the copy that was done last; the thread's own

    @property
    def is_copying(self) -> bool:
        """Whether the bytes of the next copy are not there yet."""
        return bool(self._queue) and not self._queue[0].end.done()

    @property
    def is_busy(self) -> bool:
        """Whether there is a next copy."""
        return bool(self._queue)

    @property
    def next(self) -> Future[CopyEnd]:
        """End of the next copy."""
        return self._queue[0].end

    def launch(self, number: int, work: Callable[[], int], behind: Future[Done[Any]] | None, least_us: int) -> None:
        """Queue some work, which returns how many blocks it moved."""
        now_us = self._clock.now_us()
        end = self._thread.submit(self._do, number, work, now_us, behind, least_us)
        self._queue.append(_Launched(number, now_us, behind, least_us, end))

    def next_us(self, by_us: int | None) -> int | None:
        """End of the next copy; None if there is none, or if it is after `by_us` and not known.

        Where threads have times of their own, a copy that could end by then is waited for.
        """
        if not self._queue or (self.is_copying and (self._clock.is_shared or not self._may_end(by_us))):
            return None
        return self.next.result().end_us

    def take(self) -> CopyEnd:
        """The next copy is over, and told of."""
        end = self._queue.popleft().end.result()
        self._over_us = end.end_us
        return end

    def close(self) -> None:
        """What was not begun is forgotten."""
        self._thread.shutdown(cancel_futures=True)

    def _may_end(self, by_us: int | None) -> bool:
        copy = self._queue[0]
        begins_us = max(copy.launched_us, self._over_us)
        if copy.behind is not None:
            if not copy.behind.done():
                return False  # a step that is under way ends after all that was answered
            begins_us = max(begins_us, copy.behind.result().end_us)
        return by_us is None or begins_us + max(1, copy.least_us) <= by_us

    def _do(
        self, number: int, work: Callable[[], int], launched_us: int, behind: Future[Done[Any]] | None, least_us: int
    ) -> CopyEnd:
        if behind is not None:
            launched_us = max(launched_us, behind.result().end_us)
        before_ns = machine_ns()
        timed = self._clock.times(work, not_before_us=max(launched_us, self._free_us))
        took_us = timed.end_us - timed.start_us
        if self._kind in STORE_KINDS:
            took_us = max(took_us, (machine_ns() - before_ns) // 1000)  # others than this thread work, or wait, for it
        began_us = max(timed.start_us, self._free_us)
        self._free_us = began_us + max(1, least_us, took_us)
        return CopyEnd(number, self._free_us, timed.result)


class EngineCopies:
    """A `Copier` of one run. Open it when the run's memory is there; close it, or use it with `with`.

    Args:
        num_slots: blocks of the host.
        link_bytes_per_s: the rate of an emulated link between device and host, each way; None: what the machine does.
        store: for the KV blocks of this run, below the host; None: there is none.
    """

    def __init__(
        self, num_slots: int, *, link_bytes_per_s: float | None = None, store: BlockStore | None = None
    ) -> None:
        self._num_slots, self._link_bytes_per_s, self._store = num_slots, link_bytes_per_s, store
        self._told_us = 0  # of the answer before

    def open(self, clock: Clock, layers: Sequence[LayerKv], device: Device, lane: Lane | None = None) -> EngineCopies:
        """A run begins: its clock, the device's KV, and who runs its steps.

        Raises:
            ConfigError: the host's blocks do not fit.
        """
        self.pool = HostPool(layers, num_slots=self._num_slots, device=device)
        self._clock, self._lane = clock, lane
        self._sides = {kind: device.side(kind) for kind in HOST_KINDS}
        self._store_ways = None if self._store is None else StoreWays(self._store, self.pool, layers, device)
        self._ways = {kind: _OneWay(kind, clock) for kind in (KINDS if self.has_store else HOST_KINDS)}
        return self

    @property
    def has_store(self) -> bool:
        return self._store is not None

    @property
    def is_copying(self) -> bool:
        """Whether a copy is under way, or over and nobody was told."""
        return any(way.is_busy for way in self._ways.values())

    @property
    def next_us(self) -> int | None:
        """When the next copy is over; None if there is none, or if it is not known yet."""
        return self._next_us(None)

    @property
    def is_any_over(self) -> bool:
        """Whether a copy is over that nobody was told of."""
        return any(way.is_busy and not way.is_copying for way in self._ways.values())

    def launch(self, copy: Copy) -> None:
        least_us = 0
        if copy.kind in STORE_KINDS:
            assert self._store_ways is not None, f"a {copy.kind} without a store"
            work = self._store_ways.work(copy)
        else:
            work = partial(self._move, copy)
            if self._link_bytes_per_s is not None:
                least_us = round(len(copy.blocks) * self.pool.block_bytes / self._link_bytes_per_s * 1e6)
        behind = self._lane.latest if self._lane is not None and copy.blocks else None
        self._ways[copy.kind].launch(copy.number, work, behind, least_us)

    def over(self, now_us: int) -> list[CopyEnd]:
        """Copies that are over at the time of an answer, in order of their ends, each told once.

        One that ended before the answer before, and was not seen then, ended right after it.
        """
        ends: list[CopyEnd] = []
        for way in self._ways.values():
            while (end_us := self._next_of(way, now_us)) is not None and end_us <= now_us:
                ends.append(way.take()._replace(end_us=end_us))
        self._told_us = now_us
        return sorted(ends, key=lambda end: (end.end_us, end.number))

    def rest(self, until_us: int | None, rest: Callable[[int], int]) -> Woke:
        """Nothing is to be done before `until_us`, or the end of a copy: the host's answer.

        Args:
            rest: lets time pass up to a time, and returns the time then.
        """
        self._wait(until_us)
        known = [us for us in (until_us, self._next_us(until_us)) if us is not None]
        assert known, "the host rests, and nothing will come"
        return self.woke(rest(min(known)))

    def woke(self, now_us: int) -> Woke:
        """The host's answer after a rest. One that overslept the end of a copy looks at it all the same."""
        end_us = self._next_us(now_us)
        if end_us is not None:
            now_us = min(now_us, end_us)
        return Woke(now_us, self.over(now_us))

    def __enter__(self) -> EngineCopies:
        return self

    def __exit__(self, *_: object) -> None:
        for way in self._ways.values():
            way.close()

    def _move(self, copy: Copy) -> int:
        self._sides[copy.kind](partial(self.pool.move, copy.kind, copy.blocks, copy.slots))
        return len(copy.blocks)

    def _wait(self, until_us: int | None) -> None:
        """Where time passes for all threads alike, let it, while what ends next may be a copy under way."""
        while self._clock.is_shared and (copying := [w.next for w in self._ways.values() if w.is_copying]):
            known = [us for us in (until_us, self._next_us(until_us)) if us is not None]
            left_us = min(known) - self._clock.now_us() if known else None
            if left_us is not None and left_us <= 0:
                return
            wait(copying, None if left_us is None else left_us / 1e6, FIRST_COMPLETED)

    def _next_us(self, by_us: int | None) -> int | None:
        ends = [self._next_of(way, by_us) for way in self._ways.values()]
        return min((us for us in ends if us is not None), default=None)

    def _next_of(self, way: _OneWay, by_us: int | None) -> int | None:
        end_us = way.next_us(by_us)
        return None if end_us is None else max(end_us, self._told_us + 1)


def measure_copy_time(
    copies: EngineCopies, clock: Clock, layers: Sequence[LayerKv], device: Device, *, num_slots: int
) -> CopyTime:
    """Copy times fitted to copies of a block, of two, of four and so on, each way and three times, with nothing beside.

    Raises:
        ConfigError: the host's blocks do not fit.
    """
    most = min(_MOST_TIMED_BLOCKS, num_slots, len(layers[0].k_BPKH))
    block_size = layers[0].k_BPKH.shape[1]
    seen: list[Copied] = []
    with copies.open(clock, layers, device):
        for num_blocks in [most >> k for k in range(most.bit_length())] * 3:
            keys = tuple([os.urandom(16) for _ in range(num_blocks)])  # no store has them yet
            for kind in KINDS if copies.has_store else HOST_KINDS:
                blocks = tuple(range(num_blocks))
                if kind == "push":
                    keys = tuple([os.urandom(16) for _ in blocks])
                asked_us = clock.now_us()
                copies.launch(
                    Copy(
                        *(len(seen), kind, None, () if kind in ("save", "prefetch") else blocks),
                        *(() if kind == "push" else blocks, keys, asked_us, _PATIENCE_US),
                    )
                )
                (end,) = copies.rest(None, clock.wait_until).copied
                seen.append(Copied(kind, end.num_blocks * block_size, end.end_us - asked_us))
    return fit_copy_time(seen)
