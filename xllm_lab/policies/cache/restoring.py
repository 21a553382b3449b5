"""Which waiting requests have their blocks fetched; shared by policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from xllm_lab.policies.api import ceil_div
from xllm_lab.policies.cache import CacheView, Copies, WaitingView, waiting_key

# Blocks that a request's restore takes, at most all that the host has of it.
Wanted = Callable[[WaitingView], int]


def next_in_line(view: CacheView) -> Iterator[WaitingView]:
    """Waiting requests by arrival, as long as the device has free blocks for all that they and those before them need.

    For others it is too soon: what is fetched would be evicted before they can begin.
    """
    left = view.num_free_blocks
    for request in sorted(view.waiting, key=waiting_key):
        in_use = request.num_device_blocks - request.num_idle_blocks
        left -= ceil_div(request.num_tokens, view.block_size) - in_use
        if left < 0:
            return
        yield request


def restore_by_arrival(view: CacheView, copies: Copies, most_blocks: int, wanted: Wanted) -> None:
    """For those who are next, while fewer than `most_blocks` are on their way."""
    left = most_blocks - view.num_restoring
    for request in next_in_line(view):
        num_blocks = 0 if copies.is_prefetching(request) else min(left, wanted(request))
        left -= copies.restore(request, num_blocks)


def everything(request: WaitingView) -> int:
    """What the host has of a request."""
    return request.num_host_blocks
