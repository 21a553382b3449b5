"""Which waiting requests have their blocks fetched; shared by policies."""

from __future__ import annotations

from collections.abc import Callable

from xllm_lab.policies.cache import CacheView, Copies, WaitingView, waiting_key

# Blocks that a request's restore takes, at most all that the host has of it.
Wanted = Callable[[WaitingView], int]


def restore_by_arrival(view: CacheView, copies: Copies, most_blocks: int, wanted: Wanted) -> None:
    """In order of arrival, while fewer than `most_blocks` are on their way."""
    left = most_blocks - view.num_restoring
    for request in sorted(view.waiting, key=waiting_key):
        if left < 1:
            return
        left -= copies.restore(request, min(left, wanted(request)))


def everything(request: WaitingView) -> int:
    """What the host has of a request."""
    return request.num_host_blocks
