"""Offloads only when the device runs out of blocks that hold nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, refuse_below
from xllm_lab.policies.cache import CachePlan, CacheView, Copies, HostBlocksFactor, MostBlocks
from xllm_lab.policies.cache.restoring import everything, restore_by_arrival
from xllm_lab.policies.cache.storing import Storing


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark(Storing):
    """Blocks near their end are offloaded once few are clean; what a quiet device keeps is never copied.

    Attributes:
        low_frac: offloads while fewer of the device's blocks than this are clean, or copied already.
        max_offloading_blocks: blocks on their way to the host at once.
        max_restoring_blocks: blocks on their way back at once.
        host_blocks_factor: room in the host, in times of the device's blocks.
        others: what is given to a store and asked of it, as in `Storing`.
    """

    decides: ClassVar[str] = "cache"

    low_frac: Annotated[float, Knob(0.05, 1.0)] = 0.25
    max_offloading_blocks: MostBlocks = 32
    max_restoring_blocks: MostBlocks = 64
    host_blocks_factor: HostBlocksFactor = 4.0

    def __post_init__(self) -> None:
        Storing.__post_init__(self)
        refuse_below(0, low_frac=self.low_frac)
        refuse_below(
            1, max_offloading_blocks=self.max_offloading_blocks, max_restoring_blocks=self.max_restoring_blocks
        )

    def decide(self, view: CacheView) -> CachePlan:
        copies = Copies(view)
        self.save(view, copies)
        idle = list(view.idle())
        # Blocks that can be handed out and lose nothing: clean ones, and those of which the host has a copy.
        safe = view.num_free_blocks - len(idle)
        lacking = int(self.low_frac * view.num_blocks) - safe - view.num_offloading
        room = max(0, min(lacking, self.max_offloading_blocks - view.num_offloading))
        copies.offload(idle, most=room)
        self.prefetch(view, copies)
        restore_by_arrival(view, copies, self.max_restoring_blocks, everything)
        return copies.plan("below the watermark" if room else "enough clean blocks")
