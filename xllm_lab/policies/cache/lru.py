"""Every cached block has a copy below, and what was used least recently goes first; as xLLM's write-back does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.api import refuse_below
from xllm_lab.policies.cache import CachePlan, CacheView, Copies, HostBlocksFactor, MostBlocks
from xllm_lab.policies.cache.restoring import everything, restore_by_arrival
from xllm_lab.policies.cache.storing import Storing


@dataclass(frozen=True, slots=True, kw_only=True)
class Lru(Storing):
    """Blocks are offloaded as soon as nobody uses them, and fetched whenever a waiting request has some.

    xLLM's: pairs of a freed device block and a host block are queued when a sequence ends
    (`hierarchy_block_manager_pool.cpp` at its commit of 2026-08-21), and what the host has beyond the device is
    restored.

    Attributes:
        max_offloading_blocks: blocks on their way to the host at once.
        max_restoring_blocks: blocks on their way back at once.
        host_blocks_factor: room in the host, in times of the device's blocks.
        others: what is given to a store and asked of it, as in `Storing`.
    """

    decides: ClassVar[str] = "cache"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {}

    max_offloading_blocks: MostBlocks = 32
    max_restoring_blocks: MostBlocks = 64
    host_blocks_factor: HostBlocksFactor = 4.0

    def __post_init__(self) -> None:
        Storing.__post_init__(self)
        refuse_below(
            1, max_offloading_blocks=self.max_offloading_blocks, max_restoring_blocks=self.max_restoring_blocks
        )

    def decide(self, view: CacheView) -> CachePlan:
        copies = Copies(view)
        self.save(view, copies)
        room = max(0, self.max_offloading_blocks - view.num_offloading)
        copies.offload(view.idle(), most=room)
        self.prefetch(view, copies)
        restore_by_arrival(view, copies, self.max_restoring_blocks, everything)
        return copies.plan("least recently used")
