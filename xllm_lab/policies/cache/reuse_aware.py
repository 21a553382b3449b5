"""Keeps what was used again, and the beginnings of prompts before their ends."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, refuse_below
from xllm_lab.policies.cache import CachedBlock, CachePlan, CacheView, Copies, HostBlocksFactor, MostBlocks
from xllm_lab.policies.cache.restoring import everything, restore_by_arrival
from xllm_lab.policies.cache.storing import Storing


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseAware(Storing):
    """A block is worth its uses, halved for each half-life since the last; the host keeps what is worth most.

    Greedy-Dual's idea with a clock instead of an inflating base: frequency, aged. Of equals the deeper block goes
    first, since nothing behind it can be found without it.

    Attributes:
        min_uses: blocks that fewer requests had are not offloaded.
        half_life_us: in which a use loses half of its weight.
        max_offloading_blocks: blocks on their way to the host at once.
        max_restoring_blocks: blocks on their way back at once.
        host_blocks_factor: room in the host, in times of the device's blocks.
        others: what is given to a store and asked of it, as in `Storing`.
    """

    decides: ClassVar[str] = "cache"

    min_uses: Annotated[int, Knob(1, 4)] = 1
    half_life_us: Annotated[int, Knob(1_000_000, 3_600_000_000, log=True)] = 60_000_000
    max_offloading_blocks: MostBlocks = 32
    max_restoring_blocks: MostBlocks = 64
    host_blocks_factor: HostBlocksFactor = 4.0

    def __post_init__(self) -> None:
        Storing.__post_init__(self)
        refuse_below(
            1,
            min_uses=self.min_uses,
            half_life_us=self.half_life_us,
            max_offloading_blocks=self.max_offloading_blocks,
            max_restoring_blocks=self.max_restoring_blocks,
        )

    def decide(self, view: CacheView) -> CachePlan:
        copies = Copies(view)
        self.save(view, copies)

        def worth(block: CachedBlock) -> tuple[float, int]:
            # The logarithm, and without what all have lost by now: old ones differ still, and ranks never change.
            return math.log2(block.num_uses) + block.last_used_us / self.half_life_us, -block.depth

        room = max(0, self.max_offloading_blocks - view.num_offloading)
        wanted = heapq.nlargest(room, (b for b in view.idle() if b.num_uses >= self.min_uses), key=worth)
        copies.offload(wanted, worth)
        self.prefetch(view, copies)
        restore_by_arrival(view, copies, self.max_restoring_blocks, everything)
        return copies.plan("most used")
