"""Copies between tiers in simulated time: each kind has a link of its own, and they queue for it.

offload    |-- copy 0 --|-- copy 2 --|
restore        |---- copy 1 ----|
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import simpy

from xllm_lab.copies import Copy, CopyEnd
from xllm_lab.copy_time import CopyTime
from xllm_lab.policies.cache import CopyKind

# When a copy that is asked for now ends; None: never.
EndsAt = Callable[[Copy, int], int | None]


class SimulatedCopies:
    """A `Copier` of one instance.

    Args:
        env: the run's.
        new_links: what says when copies end, anew each time the instance begins.
    """

    def __init__(self, env: simpy.Environment, new_links: Callable[[], EndsAt]) -> None:
        self._env, self._new_links = env, new_links
        self._ends_us = new_links()
        self._under_way: list[tuple[int, int]] = []  # (end, number), a heap

    @property
    def next_us(self) -> int | None:
        """End of the copy that is done next."""
        return self._under_way[0][0] if self._under_way else None

    def launch(self, copy: Copy) -> None:
        end_us = self._ends_us(copy, int(self._env.now))
        if end_us is not None:
            heapq.heappush(self._under_way, (end_us, copy.number))

    def over(self) -> list[CopyEnd]:
        """Copies that ended by now, each told once, in order of their ends."""
        ends: list[CopyEnd] = []
        while self._under_way and self._under_way[0][0] <= self._env.now:
            end_us, number = heapq.heappop(self._under_way)
            ends.append(CopyEnd(number, end_us))
        return ends

    def stop(self) -> None:
        """The instance fails: what is under way never ends, and is in nobody's way."""
        self._under_way.clear()
        self._ends_us = self._new_links()


def priced_by(copy_time: CopyTime, block_size: int) -> EndsAt:
    """Ends by a machine's times, one copy of a kind after another."""
    free_us: dict[CopyKind, int] = {}

    def ends_us(copy: Copy, now_us: int) -> int:
        begins_us = max(now_us, free_us.get(copy.kind, 0))
        took_us = copy_time.copy_us(copy.kind, len(copy.blocks) * block_size)
        free_us[copy.kind] = begins_us + max(1, round(took_us))
        return free_us[copy.kind]

    return ends_us
