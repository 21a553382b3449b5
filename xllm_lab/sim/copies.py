"""Copies between tiers in simulated time: each kind has a link of its own, and they queue for it.

offload    |-- copy 0 --|-- copy 2 --|
restore        |---- copy 1 ----|
"""

from __future__ import annotations

import heapq
from typing import Protocol

import simpy

from xllm_lab.copies import Copy, CopyEnd
from xllm_lab.copy_time import STORE_KINDS, CopyTime
from xllm_lab.policies.cache import CopyKind
from xllm_lab.sim.store import SimulatedStore


class Links(Protocol):
    """What becomes of the copies of one instance."""

    def end_of(self, copy: Copy, now_us: int) -> CopyEnd | None:
        """Of one that is asked for now; None: it never ends."""
        ...

    def fail(self, now_us: int) -> None:
        """The instance is gone: what is under way never ends, and is in nobody's way."""
        ...


class SimulatedCopies:
    """A `Copier` of one instance.

    Args:
        env: the run's.
        links: what says when they end.
    """

    def __init__(self, env: simpy.Environment, links: Links, *, has_store: bool) -> None:
        self._env, self._links, self.has_store = env, links, has_store
        self._under_way: list[tuple[int, int, int]] = []  # (end, number, blocks), a heap

    @property
    def next_us(self) -> int | None:
        """End of the copy that is done next."""
        return self._under_way[0][0] if self._under_way else None

    def launch(self, copy: Copy) -> None:
        end = self._links.end_of(copy, int(self._env.now))
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
        """The instance fails."""
        self._under_way.clear()
        self._links.fail(int(self._env.now))


class PricedLinks:
    """Copies end by a machine's times, one of a kind after another; those of the store when it is free, too."""

    def __init__(self, copy_time: CopyTime, block_size: int, store: SimulatedStore | None = None) -> None:
        self._copy_time, self._block_size, self._store = copy_time, block_size, store
        self._free_us: dict[CopyKind, int] = {}

    def end_of(self, copy: Copy, now_us: int) -> CopyEnd:
        begins_us = max(now_us, self._free_us.get(copy.kind, 0))
        if copy.kind in STORE_KINDS:
            end = self._at_store(copy, begins_us)
        else:
            end = CopyEnd(copy.number, begins_us + self._took_us(copy.kind, len(copy.keys)), len(copy.keys))
        self._free_us[copy.kind] = end.end_us
        return end

    def fail(self, now_us: int) -> None:
        self._free_us.clear()
        if self._store is not None:
            self._store.forget(self, now_us)

    def _took_us(self, kind: CopyKind, num_blocks: int) -> int:
        return max(1, round(self._copy_time.copy_us(kind, num_blocks * self._block_size)))

    def _at_store(self, copy: Copy, ready_us: int) -> CopyEnd:
        """As much of it as is there, and done by its deadline."""
        assert self._store is not None, f"a {copy.kind} without a store"
        assert copy.timeout_us is not None, f"a {copy.kind} without a deadline"
        begins_us = self._store.begins_us(ready_us)
        deadline_us = max(copy.asked_us + copy.timeout_us, begins_us + 1)
        is_read = copy.kind == "prefetch"
        num_blocks = self._store.num_leading(copy.keys, begins_us) if is_read else len(copy.keys)
        num_done = num_blocks
        while num_done and begins_us + self._took_us(copy.kind, num_done) > deadline_us:
            num_done -= 1
        end_us = min(deadline_us, begins_us + self._took_us(copy.kind, num_blocks))
        self._store.ends(end_us)
        if not is_read:
            self._store.put(copy.keys[:num_done], end_us, owner=self)
        return CopyEnd(copy.number, end_us, num_done)
