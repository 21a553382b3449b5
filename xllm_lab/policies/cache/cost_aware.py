"""Fetches blocks where that costs less than computing them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, refuse_below
from xllm_lab.policies.cache import CachedBlock, CachePlan, CacheView, Copies, HostBlocksFactor, MostBlocks, WaitingView
from xllm_lab.policies.cache.restoring import next_in_line
from xllm_lab.policies.cache.storing import Storing

# Of a long run of blocks so many lengths are weighed, evenly spread.
_MOST_LENGTHS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CostAware(Storing):
    """Of each waiting request as many blocks are fetched as bring its first token soonest for the least of the device.

        without         |-- those before it --|---- its whole prompt ----|
        with n blocks   |-- those before it --|-- the rest --|
                        |-- link's backlog --|-- n blocks --|               the later of the two, and then the rest

    What the device computes delays those behind, and what the link brings delays nobody, so a microsecond of the device
    counts as several of waiting. Offloads as `lru` does, but no block that an idle link would bring for more than
    computing it costs: while it is copied, nobody else can have it.

    Attributes:
        device_cost: so many microseconds of a request's waiting are worth one of the device's.
        max_offloading_blocks: blocks on their way to the host at once.
        max_restoring_blocks: blocks on their way back at once.
        host_blocks_factor: room in the host, in times of the device's blocks.
        others: what is given to a store and asked of it, as in `Storing`; asked only for what would come for less.
    """

    decides: ClassVar[str] = "cache"
    needs_step_time: ClassVar[bool] = True
    needs_copy_time: ClassVar[bool] = True

    device_cost: Annotated[float, Knob(1.0, 8.0, log=True)] = 3.0
    max_offloading_blocks: MostBlocks = 32
    max_restoring_blocks: MostBlocks = 64
    host_blocks_factor: HostBlocksFactor = 4.0

    def __post_init__(self) -> None:
        Storing.__post_init__(self)
        refuse_below(
            1,
            device_cost=self.device_cost,
            max_offloading_blocks=self.max_offloading_blocks,
            max_restoring_blocks=self.max_restoring_blocks,
        )

    def decide(self, view: CacheView) -> CachePlan:
        copies = Copies(view)
        self.save(view, copies)
        room = max(0, self.max_offloading_blocks - view.num_offloading)
        weighing = _Weighing(view, self.device_cost)
        copies.offload(filter(weighing.pays, view.idle()), most=room)
        self.prefetch(view, copies, weighing.asks_for)
        left = self.max_restoring_blocks - view.num_restoring
        for request in next_in_line(view):
            may_restore = left > 0 and request.num_host_blocks and not copies.is_prefetching(request)
            num = min(left, weighing.best(request)) if may_restore else 0
            num = copies.restore(request, num)
            left -= num
            weighing.passes(request, num)
        return copies.plan("fetched for less than computed" if left < self.max_restoring_blocks else "nothing to fetch")


class _Weighing:
    """What device and link have to do, request by request."""

    def __init__(self, view: CacheView, device_cost: float) -> None:
        assert view.step_time is not None, "the policy says that it needs step times"
        assert view.copy_time is not None, "the policy says that it needs copy times"
        self._size, self._step_time, self._copy_time = view.block_size, view.step_time, view.copy_time
        self._device_cost = device_cost
        self._device_us = self._computes_us(0, view.num_outstanding_tokens)
        self._link_us = self._fetch_us(view.num_restoring)

    def pays(self, block: CachedBlock) -> bool:
        """Whether fetching it alone would cost less than computing it."""
        start = block.depth * self._size
        return self._fetch_us(1) < self._device_cost * self._computes_us(start, start + self._size)

    def asks_for(self, request: WaitingView) -> int:
        """How many blocks to ask the store for: all, if they would come for less than computing them costs, or none.

        A store that has nothing says so at once.
        """
        num, start = request.num_unasked_blocks, request.num_device_blocks + request.num_host_blocks
        comes_us = self._copy_time.copy_us("prefetch", num * self._size) + self._fetch_us(num)
        computes_us = self._computes_us(start * self._size, (start + num) * self._size)
        return num if comes_us < self._device_cost * computes_us else 0

    def best(self, request: WaitingView) -> int:
        """How many blocks to fetch; 0 is none."""
        num = request.num_host_blocks
        step = max(1, num // _MOST_LENGTHS)
        lengths: list[int] = [*range(num, 0, -step), 0]
        return min(lengths, key=lambda n: (self._costs_us(request, n), -n))

    def passes(self, request: WaitingView, num_blocks: int) -> None:
        """It was decided, and is before those that come."""
        self._device_us += self._rest_us(request, num_blocks)
        self._link_us += self._fetch_us(num_blocks)

    def _costs_us(self, request: WaitingView, num_blocks: int) -> float:
        """Until its first token, and what the device does for it more than once."""
        more = (self._device_cost - 1) * self._rest_us(request, num_blocks)
        return self._first_token_us(request, num_blocks) + more

    def _first_token_us(self, request: WaitingView, num_blocks: int) -> float:
        begins_us = self._device_us
        if num_blocks:
            begins_us = max(begins_us, self._link_us + self._fetch_us(num_blocks))
        return begins_us + self._rest_us(request, num_blocks)

    def _rest_us(self, request: WaitingView, num_blocks: int) -> float:
        return self._computes_us((request.num_device_blocks + num_blocks) * self._size, request.num_tokens)

    def _computes_us(self, num_computed_tokens: int, num_tokens: int) -> float:
        num_new = num_tokens - num_computed_tokens
        return self._step_time.request_us(num_new, num_computed_tokens) if num_new > 0 else 0.0

    def _fetch_us(self, num_blocks: int) -> float:
        return self._copy_time.copy_us("restore", num_blocks * self._size) if num_blocks else 0.0
