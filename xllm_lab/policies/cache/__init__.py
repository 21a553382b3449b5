"""Which cached KV blocks lie where: what is copied from the device to the host, what is fetched back, and what the host
gives up; one file a policy beside it.

    device    idle block --offload--> block in the host's memory --restore--> idle block of the device
                                      --evict--> gone from it
    store                             --save--> block in the store --prefetch--> block in the host's memory

A cached block is one that the prefix cache can name: full, computed, and never written again. Copies run beside the
steps. A request whose blocks are being restored or prefetched waits for them; it is not shown to the batch policy until
they are there, and then it finds them in the prefix cache, or in the host. What nobody restores is computed again.

The store is shared with other instances, forgets what it likes, and what it has is known by asking for it: a request
has its blocks asked for once, and waits for the answer until a deadline at most.

The cache policy is asked before the batch policy, whenever something could be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

from xllm_lab.policies.api import Flag, Knob, RequestId, StepTimeView

CopyKind = Literal["offload", "restore", "save", "prefetch", "push"]
# Fields that several policies have. The host has room for so many times the device's blocks.
HostBlocksFactor = Annotated[float, Knob(0.25, 16.0, log=True), Flag("host_blocks_factor")]
MostBlocks = Annotated[int, Knob(1, 256, log=True)]


class CachedBlock(NamedTuple):
    """A block that the prefix cache can name.

    Attributes:
        id: of the device, its KV block; of the host, its block there.
        num_uses: requests that had it: the one that computed it, and those that found it.
        last_used_us: when the last of them began to.
        depth: blocks before it in its prompt.
    """

    id: int
    num_uses: int
    last_used_us: int
    depth: int


class CopyTimeView(Protocol):
    """What the host knows of this machine's copies."""

    def copy_us(self, kind: CopyKind, num_tokens: int) -> float:
        """Microseconds of one copy of so many tokens' KV, which nobody else's is in the way of."""
        ...


class WaitingView(Protocol):
    """A waiting request that no copy is under way for."""

    @property
    def id(self) -> RequestId: ...
    @property
    def arrival_us(self) -> int: ...
    @property
    def priority(self) -> int:
        """1 is high, 2 normal, 3 low."""
        ...

    @property
    def num_tokens(self) -> int:
        """Known ones; all must be in KV before the next can be drawn."""
        ...

    @property
    def num_device_blocks(self) -> int:
        """Full blocks, from the first on, that the device's prefix cache holds."""
        ...

    @property
    def num_idle_blocks(self) -> int:
        """How many of those nobody uses; they are kept, and so not free, while blocks behind them are restored."""
        ...

    @property
    def num_host_blocks(self) -> int:
        """Further full blocks, right behind them, that the host holds."""
        ...

    @property
    def num_unasked_blocks(self) -> int:
        """Further full blocks, right behind those, that the store was not asked for yet; 0 without a store."""
        ...


class CacheView(Protocol):
    """The tiers of one instance, before a step is planned.

    Requests come in no promised order: sort by a key that ends in the id.
    """

    @property
    def now_us(self) -> int: ...
    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        ...

    @property
    def num_blocks(self) -> int:
        """KV blocks of the device."""
        ...

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, cached ones that nobody uses included."""
        ...

    @property
    def num_clean_blocks(self) -> int:
        """Blocks that can be handed out, and hold nothing."""
        ...

    @property
    def num_host_blocks(self) -> int:
        """Blocks that the host has room for."""
        ...

    @property
    def num_free_host_blocks(self) -> int: ...
    @property
    def num_offloading(self) -> int:
        """Blocks on their way to the host."""
        ...

    @property
    def num_restoring(self) -> int:
        """Blocks on their way back."""
        ...

    @property
    def has_store(self) -> bool: ...
    @property
    def num_saving(self) -> int:
        """Blocks on their way to the store."""
        ...

    @property
    def num_prefetching(self) -> int:
        """Blocks on their way from it, if it has them; the host keeps room for them."""
        ...

    @property
    def num_outstanding_tokens(self) -> int:
        """Known tokens of running requests that are not in KV: what the device has to compute before any other."""
        ...

    @property
    def waiting(self) -> Sequence[WaitingView]: ...
    @property
    def step_time(self) -> StepTimeView | None: ...
    @property
    def copy_time(self) -> CopyTimeView | None: ...
    def idle(self) -> Iterable[CachedBlock]:
        """Cached blocks of the device that nobody uses and the host lacks, least recently used first.

        Without those that were copied since they were used last: what the host gave up since is not worth its place.
        """
        ...

    def is_idle(self, block: int) -> bool:
        """Whether `idle` has a block of that id."""
        ...

    def hosted(self) -> Iterable[CachedBlock]:
        """Blocks of the host that are in no copy, least recently used first."""
        ...

    def is_hosted(self, block: int) -> bool:
        """Whether `hosted` has a block of that id."""
        ...

    def unsaved(self) -> Iterable[CachedBlock]:
        """Of those that were not given to the store, nor came from it, in the order in which they came to the host."""
        ...

    def is_unsaved(self, block: int) -> bool:
        """Whether `unsaved` has a block of that id."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """What is copied now.

    Attributes:
        offload: idle blocks of the device to copy to the host, in this order.
        evict: blocks of the host to give up for them, and for what is prefetched; no more than that takes.
        restore: of waiting requests, how many of their `num_host_blocks` to fetch, from the first on.
        save: blocks of the host to give to the store, in this order.
        prefetch: of other waiting requests, for how many of their `num_unasked_blocks` to ask the store.
        prefetch_timeout_us: how long they wait for its answer at most.
        reason: one phrase for the log.
    """

    offload: tuple[int, ...] = ()
    evict: tuple[int, ...] = ()
    restore: Mapping[RequestId, int] = field(default_factory=dict)
    save: tuple[int, ...] = ()
    prefetch: Mapping[RequestId, int] = field(default_factory=dict)
    prefetch_timeout_us: int = 0
    reason: str

    @property
    def is_empty(self) -> bool:
        return not (self.offload or self.restore or self.save or self.prefetch)


class CachePolicy(Protocol):
    """Which cached blocks lie where. It may have `needs_step_time` and `needs_copy_time`.

    One that uses the host has a field `host_blocks_factor`. A host refuses one whose copies leave no room for any step,
    once they have moved all blocks ten times: it has to come to rest while nothing runs.
    """

    decides: ClassVar[str]  # "cache"

    def decide(self, view: CacheView) -> CachePlan:
        """A legal plan (see `cache_checks.cache_violations`). Pure."""
        ...


def waiting_key(request: WaitingView) -> tuple[int, int]:
    """An order of requests: by arrival, then id."""
    return (request.arrival_us, request.id)


# What a block in the host is kept by.
Worth = Callable[[CachedBlock], tuple[float, int]]


def recency(block: CachedBlock) -> tuple[float, int]:
    """Used last; of those used at once, beginnings: nothing behind a block can be found without it."""
    return block.last_used_us, -block.depth


class Copies:
    """A plan in the making: what the tiers still have room for."""

    __slots__ = (
        "_blocks_left",
        "_evict",
        "_next_victim",
        "_offload",
        "_prefetch",
        "_prefetch_timeout_us",
        "_restore",
        "_room",
        "_save",
        "_saved",
        "_victims",
        "_view",
    )

    def __init__(self, view: CacheView) -> None:
        self._view = view
        self._offload: list[int] = []
        self._evict: list[int] = []
        self._restore: dict[RequestId, int] = {}
        self._save: list[int] = []
        self._saved: frozenset[int] = frozenset()
        self._prefetch: dict[RequestId, int] = {}
        self._prefetch_timeout_us = 0
        self._victims: Iterator[CachedBlock] | None = None
        self._next_victim: CachedBlock | None = None
        self._room = view.num_free_host_blocks
        self._blocks_left = view.num_free_blocks

    def offload(self, blocks: Iterable[CachedBlock], worth: Worth = recency, *, most: int | None = None) -> None:
        """Copy up to `most` blocks to the host, as there is room; for others go those that are worth least there.

        Only for what is worth more, or two blocks would take each other's place for ever; what is not is passed over.
        """
        left = self._blocks_left if most is None else most
        for block in blocks if left > 0 else ():
            if self._room:
                self._room -= 1
            else:
                victim = self._victim(worth)
                if victim is None:
                    return
                if worth(victim) >= worth(block):
                    continue
                self._take(victim)
            self._offload.append(block.id)
            self._blocks_left -= 1  # until it is copied
            left -= 1
            if not left:
                return

    def _victim(self, worth: Worth) -> CachedBlock | None:
        """Of the host's blocks that are left the one that is worth least."""
        if self._victims is None:
            hosted = (b for b in self._view.hosted() if b.id not in self._saved)
            self._victims = iter(hosted if worth is recency else sorted(hosted, key=worth))
            self._next_victim = next(self._victims, None)
        return self._next_victim

    def _take(self, victim: CachedBlock) -> None:
        assert self._victims is not None, "it was asked for"
        self._evict.append(victim.id)
        self._next_victim = next(self._victims, None)

    def save(self, blocks: Iterable[CachedBlock]) -> None:
        """Give blocks of the host to the store; they stay meanwhile. Before anything that evicts."""
        self._save += [block.id for block in blocks]
        self._saved = frozenset(self._save)

    def prefetch(self, request: WaitingView, num_blocks: int, timeout_us: int, worth: Worth = recency) -> int:
        """Ask the store for up to so many of a request's blocks, as far as the host has room; returns for how many."""
        num = min(num_blocks, request.num_unasked_blocks)
        while self._room < num and (victim := self._victim(worth)) is not None:
            self._take(victim)
            self._room += 1
        num = min(num, self._room)
        if num < 1:
            return 0
        self._room -= num
        self._prefetch[request.id], self._prefetch_timeout_us = num, timeout_us
        return num

    def is_prefetching(self, request: WaitingView) -> bool:
        """Whether the store is asked for its blocks: what the host has of it is fetched once it has all."""
        return request.id in self._prefetch

    def restore(self, request: WaitingView, num_blocks: int) -> int:
        """Fetch up to so many of a request's blocks, as far as they fit on the device; returns how many.

        Its blocks that are there are kept for it, fetched or not: of requests that cannot run yet, those that come
        later must not take them, or they would take each other's for ever. So ask in order, for all.
        """
        self._blocks_left -= request.num_idle_blocks
        num = min(num_blocks, request.num_host_blocks, self._blocks_left)
        if num < 1:
            return 0
        self._restore[request.id] = num
        self._blocks_left -= num
        return num

    def plan(self, reason: str) -> CachePlan:
        return CachePlan(
            offload=tuple(self._offload),
            evict=tuple(self._evict),
            restore=self._restore,
            save=tuple(self._save),
            prefetch=self._prefetch,
            prefetch_timeout_us=self._prefetch_timeout_us,
            reason=reason,
        )
