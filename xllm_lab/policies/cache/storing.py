"""What is given to a store and asked of it; shared by policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

from xllm_lab.policies.api import Knob, Needs, refuse_below
from xllm_lab.policies.cache import CacheView, Copies, WaitingView, waiting_key

# Of a request's blocks that nobody here has, for how many to ask.
Wanted = Callable[[WaitingView], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storing:
    """The store's part of a policy; without a store it does nothing.

    What comes to the host is given to the store at once, and what device and host lack of a prompt is asked of it when
    its request comes, whether it can begin soon or not: it waits either way. xLLM's: `prefetch_from_storage` when a
    request is queued, and `prefetch_timeout`, behind which what has come is used
    (`hierarchy_block_manager_pool.cpp` at its commit of 2026-08-21).

    Attributes:
        max_saving_blocks: blocks on their way to the store at once; 0: it only reads.
        prefetch_blocks: of one request, asked for at most; 0: it only writes.
        prefetch_timeout_us: how long a request waits for them at most.
    """

    max_saving_blocks: Annotated[int, Knob(1, 256, log=True), Needs("stores")] = 64
    prefetch_blocks: Annotated[int, Knob(1, 4096, log=True), Needs("stores")] = 1024
    prefetch_timeout_us: Annotated[int, Knob(1_000, 10_000_000, log=True), Needs("stores")] = 1_000_000

    def __post_init__(self) -> None:
        refuse_below(0, max_saving_blocks=self.max_saving_blocks, prefetch_blocks=self.prefetch_blocks)
        refuse_below(1, prefetch_timeout_us=self.prefetch_timeout_us)

    def save(self, view: CacheView, copies: Copies) -> None:
        """Before anything that evicts."""
        if view.has_store:
            copies.save(islice(view.unsaved(), max(0, self.max_saving_blocks - view.num_saving)))

    def prefetch(self, view: CacheView, copies: Copies, wanted: Wanted | None = None) -> None:
        """By arrival, as far as the host has room; before anything is restored.

        Args:
            wanted: by request; None: all that is to be had.
        """
        if not view.has_store:
            return
        for request in sorted((r for r in view.waiting if r.num_unasked_blocks), key=waiting_key):
            num_blocks = min(self.prefetch_blocks, request.num_unasked_blocks if wanted is None else wanted(request))
            copies.prefetch(request, num_blocks, self.prefetch_timeout_us)
