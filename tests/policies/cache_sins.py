"""Bad cache policies, kept on purpose: each breaks one law of the contract. See `sins`."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

from xllm_lab.policies.api import RequestId
from xllm_lab.policies.cache import CachePlan, CacheView, Copies, WaitingView, waiting_key
from xllm_lab.policies.cache.lru import Lru


def ids(blocks: Iterable[Any], num: int = 1) -> tuple[int, ...]:
    return tuple(b.id for b in islice(blocks, num))


def with_blocks_in_host(view: CacheView) -> list[WaitingView]:
    return [r for r in sorted(view.waiting, key=waiting_key) if r.num_host_blocks]


def fetched(view: CacheView, requests: Iterable[WaitingView], most: int = 64) -> CachePlan:
    """As many blocks as there is room for, of those requests in this order."""
    copies = Copies(view)
    left = most
    for request in requests:
        left -= copies.restore(request, left)
    return copies.plan("so be it")


@dataclass(frozen=True, slots=True, kw_only=True)
class _CacheSin:
    decides: ClassVar[str] = "cache"
    host_blocks_factor: float = 1.0

    def decide(self, view: CacheView) -> CachePlan:
        """As `lru`, where there is no chance to sin."""
        plan = Lru().decide(view)
        return self.spoil(view, plan) or plan

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadsWhatIsUsed(_CacheSin):
    """Takes blocks by number, whoever has them. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        taken = [b for b in range(view.num_blocks) if not view.is_idle(b)]
        return CachePlan(offload=tuple(taken[:1]), reason="greed") if view.num_free_host_blocks and taken else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadsTwice(_CacheSin):
    """To be on the safe side. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        return CachePlan(offload=2 * ids(view.idle()), reason="care") if view.num_free_host_blocks > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadsAgain(_CacheSin):
    """Begins with whatever it offloaded last, though the host has that now. Broken law: legal."""

    before: list[int] = field(default_factory=list)

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        again = [b for b in self.before if not view.is_idle(b)]
        self.before[:] = plan.offload
        return CachePlan(offload=tuple(again[:1]), reason="again") if view.num_free_host_blocks and again else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadsWithoutRoom(_CacheSin):
    """Offloads into a full host, and evicts nothing. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        idle = ids(view.idle(), view.num_free_host_blocks + 1)
        return CachePlan(offload=idle, reason="hope") if len(idle) > view.num_free_host_blocks else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictsForNothing(_CacheSin):
    """Keeps the host tidy, though there is room. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        return replace(plan, evict=ids(view.hosted())) if len(plan.offload) < view.num_free_host_blocks else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictsTooMuch(_CacheSin):
    """One block more than it takes. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        more = ids(view.hosted(), len(plan.evict) + 1)
        return replace(plan, evict=more) if plan.evict and len(more) > len(plan.evict) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictsTheUnknown(_CacheSin):
    """By number, whatever lies there. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        unknown = [s for s in range(view.num_host_blocks) if not view.is_hosted(s)]
        return replace(plan, evict=tuple(unknown[: len(plan.evict)])) if plan.evict and unknown else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictsTwice(_CacheSin):
    """Counts one victim for two. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        return replace(plan, evict=2 * plan.evict[:1] + plan.evict[2:]) if len(plan.evict) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoresMoreThanThereIs(_CacheSin):
    """One block more than the host has. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        wanted = {r.id: r.num_host_blocks + 1 for r in with_blocks_in_host(view)[:1]}
        return CachePlan(restore=wanted, reason="hope") if wanted else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoresForNobody(_CacheSin):
    """Of a request that does not wait. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        return replace(plan, restore={**plan.restore, RequestId(999): 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoresNothing(_CacheSin):
    """Names a request, and no block. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        wanted = {r.id: 0 for r in with_blocks_in_host(view)[:1]}
        return CachePlan(restore=wanted, reason="busy") if wanted else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TakesMoreThanIsFree(_CacheSin):
    """Fetches everything for everybody, as if the device were empty. Broken law: legal."""

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        wanted = {r.id: r.num_host_blocks for r in with_blocks_in_host(view)}
        return CachePlan(restore=wanted, reason="greed") if wanted else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DividesByTheLink(_CacheSin):
    """Forgets that a copy may take no time. Broken law: legal."""

    def decide(self, view: CacheView) -> CachePlan:
        assert view.copy_time is not None
        rates = [1 / view.copy_time.copy_us("restore", view.block_size) for _ in with_blocks_in_host(view)]
        return CachePlan(reason=f"{len(rates)} rates")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternates(_CacheSin):
    """Offloads every second time, by its own count. Broken law: repeatable."""

    times: list[int] = field(default_factory=list)

    def spoil(self, view: CacheView, plan: CachePlan) -> CachePlan | None:
        self.times.append(view.now_us)
        return CachePlan(reason="not now") if len(self.times) % 2 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstListedFirst(_CacheSin):
    """Fetches for requests as they are listed until there is no room. Broken law: order-free."""

    def decide(self, view: CacheView) -> CachePlan:
        return fetched(view, view.waiting, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoTieBreak(_CacheSin):
    """Sorts by arrival, and leaves equals as they are listed. Broken law: order-free."""

    def decide(self, view: CacheView) -> CachePlan:
        return fetched(view, sorted(view.waiting, key=lambda r: r.arrival_us), 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenBlocksOnly(_CacheSin):
    """Offloads by halves. Broken law: identity-free."""

    def decide(self, view: CacheView) -> CachePlan:
        copies = Copies(view)
        copies.offload(b for b in view.idle() if b.id % 2 == 0)
        return copies.plan("halves")


@dataclass(frozen=True, slots=True, kw_only=True)
class SortsTheView(_CacheSin):
    """Sorts in place what it was shown. Broken law: pure."""

    def decide(self, view: CacheView) -> CachePlan:
        waiting: Any = view.waiting
        waiting.sort(key=waiting_key, reverse=True)
        return Lru().decide(view)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictsByDice(_CacheSin):
    """As the textbook on caches has it. Broken law: clockless."""

    def decide(self, view: CacheView) -> CachePlan:
        copies = Copies(view)
        copies.offload(view.idle(), lambda block: (random.random(), block.id))
        return copies.plan("any")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOfNames(_CacheSin):
    """Fetches for whom a set of names has first. Broken law: hash-free."""

    def decide(self, view: CacheView) -> CachePlan:
        named = {f"request {r.id}": r for r in view.waiting}
        return fetched(view, [named[name] for name in set(named)], 4)
