"""The KV block ledger: who holds which block, and what the prefix cache knows. Ids and counts, no tensors.

A block is in exactly one of three states:

    clean      content worthless                          handed out first
    idle       content indexed by its key, nobody uses it   evicted least recently used first, and copied ones first
    held       in a block table, or in a copy between tiers    never taken away

    clean --take--> held --release, no key--> clean
                    held --release, key--> idle --take by key--> held
                                           idle --evict--> held

A copy from here pins blocks that have a key; a copy to here reserves blocks, which get one when it is done.

A key names the tokens of a block and of all blocks before it, as xLLM does (xllm/core/framework/prefix_cache at
3906f5a): key[i] = XXH3-128(seed 1024, key[i-1] || int32 tokens of block i).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
import xxhash

from xllm_lab.policies.api import RequestId, ceil_div
from xllm_lab.workload import TokenIds

BlockKey = bytes
# `xxh3_128bits_seed`, which must equal the one of xllm-service.
KEY_SEED = 1024


def block_key(previous: BlockKey, token_ids: TokenIds) -> BlockKey:
    """Key of a full block that follows the block of key `previous` (empty for the first)."""
    return xxhash.xxh3_128_digest(previous + np.ascontiguousarray(token_ids, dtype="<i4").tobytes(), seed=KEY_SEED)


class Ledger:
    """KV blocks of one instance.

    Attributes:
        num_blocks: blocks in the pool, ids [0, num_blocks).
        block_size: tokens per block.
        enable_prefix_cache: without it no block is ever indexed.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self.version = 0  # changes whenever a lookup may answer differently
        self._clean = list(range(num_blocks - 1, -1, -1))
        self._copied: OrderedDict[int, None] = OrderedDict()  # idle, and evicted before others that are
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Of indexed blocks only: any other has one user, the table that lists it, or none.
        self._num_users: dict[int, int] = {}
        self._tables: dict[RequestId, list[int]] = {}
        self._block_of: dict[BlockKey, int] = {}
        self._key_of: list[BlockKey | None] = [None] * num_blocks
        # Of tables that changed: from which place on. For who follows them, and forgets what it has seen.
        self.changed: dict[RequestId, int] | None = None
        # In copies between tiers.
        self._num_pins: Counter[int] = Counter()
        self._reserved: set[int] = set()

    @property
    def num_free_blocks(self) -> int:
        return len(self._clean) + len(self._copied) + len(self._idle)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    @property
    def num_idle_blocks(self) -> int:
        return len(self._copied) + len(self._idle)

    @property
    def num_clean_blocks(self) -> int:
        return len(self._clean)

    def keys(self) -> frozenset[BlockKey]:
        """What the prefix cache knows, at this moment."""
        return frozenset(self._block_of)

    def block_table(self, request: RequestId) -> Sequence[int]:
        """Block ids in token order; empty for a request that holds none."""
        return self._tables.get(request, ())

    def num_private_blocks(self, request: RequestId) -> int:
        """Blocks that nobody else uses."""
        users = self._num_users
        return sum(users.get(b, 1) == 1 for b in self.block_table(request))

    def lookup(self, keys: Sequence[BlockKey]) -> tuple[int, int]:
        """(length of the longest cached run of `keys` from the start, how many of its blocks are idle). No effect."""
        num_cached = num_idle = 0
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            num_cached += 1
            num_idle += self._num_users[block] == 0
        return num_cached, num_idle

    def next_blocks(self, num_blocks: int) -> list[int]:
        """The blocks that would be taken next, in order, if nobody gave any back before; at most all free ones."""
        found = self._clean[: -num_blocks - 1 : -1]
        return found + list(islice(self._idle, num_blocks - len(found)))

    def attach(self, request: RequestId, keys: Sequence[BlockKey]) -> Sequence[int]:
        """Open a table with the longest cached run of `keys`, and return it; it grows as the request does."""
        assert request not in self._tables, f"request {request} holds blocks already"
        table = [self._block_of[key] for key in keys[: self.lookup(keys)[0]]] if keys else []
        for block in table:
            if self._num_users[block] == 0:
                self._leave_idle(block)
            self._num_users[block] += 1
        self._tables[request] = table
        self.version += 1
        if self.changed is not None:
            self.changed[request] = 0
        return table

    def grow(self, request: RequestId, num_tokens: int) -> None:
        """Make the request's table hold `num_tokens` tokens. The caller has checked that the blocks are there."""
        missing = ceil_div(num_tokens, self.block_size) - len(self._tables[request])
        if missing > 0:
            self.extend(request, missing)

    def extend(self, request: RequestId, num_blocks: int) -> None:
        """Give a request more blocks, clean ones first. The caller has checked that they are there."""
        table, clean = self._tables[request], self._clean
        if self.changed is not None:
            self.changed.setdefault(request, len(table))
        if num_blocks <= len(clean):
            table += clean[: -num_blocks - 1 : -1]
            del clean[len(clean) - num_blocks :]
            return
        for _ in range(num_blocks):
            table.append(clean.pop() if clean else self._evict())

    def trim(self, request: RequestId, num_tokens: int) -> None:
        """Take blocks back that the request's first `num_tokens` tokens do not need; none of them was published."""
        table = self._tables[request]
        while len(table) > ceil_div(num_tokens, self.block_size):
            block = table.pop()
            assert self._key_of[block] is None, f"request {request} gives up block {block}, which is indexed"
            self._clean.append(block)
            if self.changed is not None:
                self.changed[request] = min(len(table), self.changed.get(request, len(table)))

    def extend_each(self, requests: Iterable[RequestId]) -> None:
        """As `extend`, by one block each."""
        tables, clean = self._tables, self._clean
        for request in requests:
            if self.changed is not None:
                self.changed.setdefault(request, len(tables[request]))
            tables[request].append(clean.pop() if clean else self._evict())

    def publish(self, request: RequestId, first_block: int, keys: Sequence[BlockKey]) -> None:
        """Index computed blocks [first_block, first_block + len(keys)) of the request.

        A key that is indexed already stays with its block: tables are append-only, equal blocks are not merged.
        """
        if not self.enable_prefix_cache:
            return
        table = self._tables[request]
        for position, key in enumerate(keys, start=first_block):
            block = table[position]
            if key not in self._block_of and self._key_of[block] is None:
                self._block_of[key] = block
                self._key_of[block] = key
                self._num_users[block] = 1
                self.version += 1

    def release(self, request: RequestId) -> None:
        """Give all blocks of a request back, the last first, so that leaves are evicted before their roots."""
        self.version += 1
        table = self._tables.pop(request, [])
        table.reverse()
        if not self._block_of:
            self._clean += table
            return
        for block in table:
            if block not in self._num_users:
                self._clean.append(block)
                continue
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._idle[block] = None

    def find(self, key: BlockKey) -> int | None:
        """The block of that key."""
        return self._block_of.get(key)

    def idle(self) -> Iterator[tuple[int, BlockKey]]:
        """Blocks that nobody uses and their keys, the next to be evicted first."""
        return chain(((block, self._name(block)) for block in self._copied), self.uncopied())

    def uncopied(self) -> Iterator[tuple[int, BlockKey]]:
        """Of these, those that were not copied since somebody used them last."""
        return ((block, self._name(block)) for block in self._idle)

    def uncopied_key(self, block: int) -> BlockKey | None:
        """The key of such a block; None of any other."""
        return self._key_of[block] if block in self._idle else None

    def _name(self, block: int) -> BlockKey:
        key = self._key_of[block]
        assert key is not None, f"block {block} is idle and has no key"
        return key

    def pin(self, blocks: Iterable[int]) -> None:
        """Blocks that have a key stay until they are unpinned as often."""
        for block in blocks:
            if self._num_users[block] == 0:
                self._leave_idle(block)
            self._num_users[block] += 1
            self._num_pins[block] += 1
        self.version += 1

    def unpin(self, blocks: Iterable[int], *, goes_first: bool) -> None:
        """A copy is done, or not made; whom nobody else uses is idle.

        Args:
            blocks: pinned, in order of their tokens.
            goes_first: they are evicted before those that are not copied.
        """
        for block in reversed(list(blocks)):
            self._num_pins[block] -= 1
            if not self._num_pins[block]:
                del self._num_pins[block]
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                (self._copied if goes_first else self._idle)[block] = None
        self.version += 1

    def touch(self, blocks: Sequence[int]) -> None:
        """Those of them that are idle are the last to be evicted, and the first of them the very last."""
        for block in reversed(blocks):
            if self._num_users[block] == 0:
                self._leave_idle(block)
                self._idle[block] = None

    def reserve(self, num_blocks: int) -> list[int]:
        """Blocks that a copy will fill. The caller has checked that they are there."""
        blocks = [self._clean.pop() if self._clean else self._evict() for _ in range(num_blocks)]
        self._reserved.update(blocks)
        return blocks

    def keep(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """Reserved blocks hold what their keys name, in order of their tokens, and nobody uses them yet.

        What came to be known by another block meanwhile is clean again.
        """
        self._reserved.difference_update(blocks)
        for block, key in zip(reversed(blocks), reversed(keys), strict=True):
            if key in self._block_of:
                self._clean.append(block)
                continue
            self._block_of[key], self._key_of[block], self._num_users[block] = block, key, 0
            self._idle[block] = None
        self.version += 1

    def audit(self) -> None:
        """Assert that every block is in exactly one state and every count is right."""
        users = [0] * self.num_blocks
        for table in self._tables.values():
            for block in table:
                users[block] += 1
        for block, count in self._num_pins.items():
            users[block] += count
        assert {b: users[b] for b in self._num_users} == self._num_users, "a block's users are not its tables"
        assert set(self._num_users) == set(self._block_of.values()), "users are counted of blocks that are not indexed"
        assert all(n <= 1 for b, n in enumerate(users) if b not in self._num_users), "a block without a key is shared"
        clean, idle = set(self._clean), {*self._copied, *self._idle}
        held = {b for b in range(self.num_blocks) if users[b]} | self._reserved
        assert not any(users[b] for b in self._reserved), "a reserved block is in a table"
        assert len(idle) == self.num_idle_blocks, "an idle block is listed twice"
        assert len(clean) == len(self._clean), "a clean block is listed twice"
        assert clean | idle | held == set(range(self.num_blocks)), "a block is in no state"
        assert len(clean) + len(idle) + len(held) == self.num_blocks, "a block is in two states"
        assert {k: b for b, k in enumerate(self._key_of) if k is not None} == self._block_of, "the index is torn"
        assert not any(self._key_of[b] for b in clean), "a clean block is indexed"

    def _leave_idle(self, block: int) -> None:
        del (self._copied if block in self._copied else self._idle)[block]

    def _evict(self) -> int:
        queue = self._copied or self._idle
        assert queue, "a block is taken and none is free"
        block, _ = queue.popitem(last=False)
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key], self._num_users[block]
        self._key_of[block] = None
        self.version += 1
        return block
