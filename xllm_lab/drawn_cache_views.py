"""Tiers as a cache policy meets them, drawn by number for `contract`.

Small and unkind: no room above or below, nothing idle, one or both tiers all in copies, equal arrivals and recencies,
a host that is younger than what comes next but older than what comes last, blocks with many uses, times that are free
or huge, prompts of which nothing or all but the last token is in reach.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from xllm_lab.copy_time import KINDS, CopyTime, CopyWeights
from xllm_lab.policies.api import RequestId
from xllm_lab.policies.cache import CachedBlock
from xllm_lab.step_time import TERMS, StepTime


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnWaiting:
    """A `WaitingView`."""

    id: RequestId
    arrival_us: int
    priority: int
    num_tokens: int
    num_device_blocks: int
    num_idle_blocks: int
    num_host_blocks: int
    num_unasked_blocks: int


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnCacheView:
    """A `CacheView`, and its number.

    Attributes:
        idle_blocks, hosted_blocks: what `idle` and `hosted` tell, each time anew.
    """

    number: int
    now_us: int
    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_clean_blocks: int
    num_host_blocks: int
    num_free_host_blocks: int
    num_offloading: int
    num_restoring: int
    has_store: bool
    num_saving: int
    num_prefetching: int
    num_outstanding_tokens: int
    step_time: StepTime
    copy_time: CopyTime
    waiting: list[DrawnWaiting] = field(default_factory=list)
    idle_blocks: list[CachedBlock] = field(default_factory=list)
    hosted_blocks: list[CachedBlock] = field(default_factory=list)
    unsaved_blocks: list[CachedBlock] = field(default_factory=list)

    def idle(self) -> Iterator[CachedBlock]:
        return iter(self.idle_blocks)

    def is_idle(self, block: int) -> bool:
        return any(b.id == block for b in self.idle_blocks)

    def hosted(self) -> Iterator[CachedBlock]:
        return iter(self.hosted_blocks)

    def is_hosted(self, block: int) -> bool:
        return any(b.id == block for b in self.hosted_blocks)

    def unsaved(self) -> Iterator[CachedBlock]:
        return iter(self.unsaved_blocks)

    def is_unsaved(self, block: int) -> bool:
        return any(b.id == block for b in self.unsaved_blocks)


def drawn_cache_view(number: int) -> DrawnCacheView:
    """The view of that number, at least 0: always the same one, in new objects."""
    rng = random.Random(f"cache view {number}")
    num_clean, num_idle, num_copied = rng.choice((0, 0, 20, 600)), rng.choice((0, 1, 3, 12)), rng.choice((0, 0, 4))
    num_offloading, num_restoring = rng.choice((0, 0, 2, 40)), rng.choice((0, 0, 62, 70))
    num_hosted, num_free_host = rng.choice((0, 1, 6, 15)), rng.choice((0, 0, 1, 5))
    has_store = rng.choice((False, True))
    num_saving, num_prefetching = (rng.choice((0, 0, 5, 80)) if has_store else 0 for _ in range(2))
    if rng.random() < 0.1:  # all that there is is on its way
        num_clean = num_idle = num_copied = num_hosted = num_free_host = 0
    num_held = num_offloading + num_restoring + rng.choice((0, 1, 30))
    now_us = rng.choice((5_000, 4 * 3_600_000_000))
    view = DrawnCacheView(
        number=number,
        now_us=now_us,
        block_size=rng.choice((1, 4, 128)),
        num_blocks=max(1, num_clean + num_idle + num_copied + num_held),
        num_free_blocks=num_clean + num_idle + num_copied,
        num_clean_blocks=num_clean,
        num_host_blocks=max(
            1, num_free_host + num_offloading + num_restoring + num_hosted + num_saving + num_prefetching
        ),
        num_free_host_blocks=num_free_host,
        num_offloading=num_offloading,
        num_restoring=num_restoring,
        has_store=has_store,
        num_saving=num_saving,
        num_prefetching=num_prefetching,
        num_outstanding_tokens=rng.choice((0, 0, 7, 5000)),
        step_time=_step_time(rng),
        copy_time=_copy_time(rng),
        idle_blocks=_blocks(rng, num_idle, now_us),
        hosted_blocks=_blocks(rng, num_hosted, now_us),
    )
    if has_store:
        view.unsaved_blocks = rng.sample(view.hosted_blocks, rng.choice((0, num_hosted // 2, num_hosted)))
    for request_id in rng.sample(range(50), rng.choice((0, 1, 2, 6))):
        view.waiting.append(_waiting(rng, view, RequestId(request_id)))
    return view


def _blocks(rng: random.Random, num: int, now_us: int) -> list[CachedBlock]:
    """Least recently used first; of chains that were used at once, in any order of depth."""
    times_us = rng.choice(([0], [0, now_us], *2 * [range(0, now_us, 1 + now_us // 7)]))
    used_us = sorted(rng.choice(times_us) for _ in range(num))
    ids = rng.sample(range(200), num)
    return [
        CachedBlock(block, rng.choice((1, 1, 2, 10**9)), us, rng.choice((0, 1, 2, 1000)))
        for block, us in zip(ids, used_us, strict=True)
    ]


def _waiting(rng: random.Random, view: DrawnCacheView, request_id: RequestId) -> DrawnWaiting:
    most_idle = view.num_free_blocks - view.num_clean_blocks
    num_idle = rng.choice((0, 0, most_idle, rng.randint(0, most_idle)))
    num_used = rng.randint(0, view.num_blocks - view.num_free_blocks)
    num_in_host = rng.choice((0, 0, len(view.hosted_blocks), view.num_restoring + len(view.hosted_blocks)))
    num_unasked = rng.choice((0, 1, 20)) if view.has_store else 0
    num_in_reach = (num_used + num_idle + num_in_host + num_unasked) * view.block_size
    return DrawnWaiting(
        id=request_id,
        arrival_us=rng.choice((0, 0, 100, 500)),
        priority=rng.choice((1, 2, 2, 3)),
        num_tokens=num_in_reach + rng.choice((1, 1, 50, 20 * view.block_size)),
        num_device_blocks=num_used + num_idle,
        num_idle_blocks=num_idle,
        num_host_blocks=num_in_host,
        num_unasked_blocks=num_unasked,
    )


def _step_time(rng: random.Random) -> StepTime:
    weights = {"eager_us": rng.choice((0.0, 100.0)), "token_us": rng.choice((0.0, 1.0, 1e6))}
    return StepTime(tuple(weights.get(t, 0.0) for t in TERMS))


def _copy_time(rng: random.Random) -> CopyTime:
    return CopyTime({kind: CopyWeights(rng.choice((0.0, 5.0, 1e9)), rng.choice((0.0, 1.0, 1e6))) for kind in KINDS})
