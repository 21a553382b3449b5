"""Copies between tiers in simulated time: each kind has a link of its own, and they queue for it.

offload    |-- copy 0 --|-- copy 2 --|
restore        |---- copy 1 ----|
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import simpy

from xllm_lab.copies import Copy, CopyEnd
from xllm_lab.copy_time import STORE_KINDS, CopyTime
from xllm_lab.policies.cache import CopyKind
from xllm_lab.sim.store import SimulatedStore

# What becomes of a copy that is asked for now; None: it never ends.
EndOf = Callable[[Copy, int], CopyEnd | None]


class SimulatedCopies:
    """A `Copier` of one instance.

    Args:
        env: the run's.
        new_links: what says when copies end, anew each time the instance begins.
    """

    def __init__(self, env: simpy.Environment, new_links: Callable[[], EndOf], *, has_store: bool) -> None:
        self._env, self._new_links, self.has_store = env, new_links, has_store
        self._end_of = new_links()
        self._under_way: list[tuple[int, int, int]] = []  # (end, number, blocks), a heap

    @property
    def next_us(self) -> int | None:
        """End of the copy that is done next."""
        return self._under_way[0][0] if self._under_way else None

    def launch(self, copy: Copy) -> None:
        end = self._end_of(copy, int(self._env.now))
        if end is not None:
            heapq.heappush(self._under_way, (end.end_us, end.number, end.num_blocks))

    def over(self) -> list[CopyEnd]:
        """Copies that ended by now, each told once, in order of their ends."""
        ends: list[CopyEnd] = []
        while self._under_way and self._under_way[0][0] <= self._env.now:
            end_us, number, num_blocks = heapq.heappop(self._under_way)
            ends.append(CopyEnd(number, end_us, num_blocks))
        return ends

    def stop(self) -> None:
        """The instance fails: what is under way never ends, and is in nobody's way."""
        self._under_way.clear()
        self._end_of = self._new_links()


def priced_by(copy_time: CopyTime, block_size: int, store: SimulatedStore | None = None) -> EndOf:
    """Ends by a machine's times, one copy of a kind after another; those of the store when it is free, too."""
    free_us: dict[CopyKind, int] = {}

    def took_us(kind: CopyKind, num_blocks: int) -> int:
        return max(1, round(copy_time.copy_us(kind, num_blocks * block_size)))

    def end_of(copy: Copy, now_us: int) -> CopyEnd:
        begins_us = max(now_us, free_us.get(copy.kind, 0))
        if copy.kind in STORE_KINDS:
            assert store is not None, f"a {copy.kind} without a store"
            end = _at_store(store, copy, begins_us, took_us)
        else:
            end = CopyEnd(copy.number, begins_us + took_us(copy.kind, len(copy.keys)), len(copy.keys))
        free_us[copy.kind] = end.end_us
        return end

    return end_of


def _at_store(store: SimulatedStore, copy: Copy, ready_us: int, took_us: Callable[[CopyKind, int], int]) -> CopyEnd:
    """As much of it as is there, and done by its deadline."""
    assert copy.timeout_us is not None, f"a {copy.kind} without a deadline"
    begins_us = store.begins_us(ready_us)
    deadline_us = max(copy.asked_us + copy.timeout_us, begins_us + 1)
    num_blocks = len(copy.keys)
    if copy.kind == "prefetch":
        num_blocks = store.num_leading(copy.keys, begins_us)
    num_done = num_blocks
    while num_done and begins_us + took_us(copy.kind, num_done) > deadline_us:
        num_done -= 1
    end_us = min(deadline_us, begins_us + took_us(copy.kind, num_blocks))
    store.ends(end_us)
    if copy.kind != "prefetch":
        store.put(copy.keys[:num_done], end_us)
    return CopyEnd(copy.number, end_us, num_done)
