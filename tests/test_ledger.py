"""The block ledger: a machine that does anything, audited after every move, and the stories of eviction."""

from __future__ import annotations

import numpy as np
import xxhash
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from xllm_lab.ledger import BlockKey, Ledger, block_key
from xllm_lab.policies.api import RequestId, ceil_div

SIZE = 2
NUM_BLOCKS = 7


def keys_of(*blocks: int) -> list[BlockKey]:
    """Keys of a chain of blocks, each named by the token that fills it."""
    keys: list[BlockKey] = []
    for token in blocks:
        keys.append(block_key(keys[-1] if keys else b"", np.full(SIZE, token, dtype=np.int32)))
    return keys


def held(ledger: Ledger, request_id: int, *blocks: int) -> RequestId:
    """A request that has computed and published these blocks."""
    request = RequestId(request_id)
    keys = keys_of(*blocks)
    cached = len(ledger.attach(request, keys))
    ledger.grow(request, len(blocks) * SIZE)
    ledger.publish(request, cached, keys[cached:])
    return request


class AnyUse(RuleBasedStateMachine):
    """Requests come, grow, publish and leave in any order; each is a chain of blocks over an alphabet of two."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(NUM_BLOCKS, SIZE)
        self.chain: dict[RequestId, list[int]] = {}
        self.num_published: dict[RequestId, int] = {}
        self.num_tokens: dict[RequestId, int] = {}
        self.pinned: list[list[int]] = []
        self.reserved: list[tuple[list[int], list[BlockKey]]] = []

    @rule(target=requests, chain=st.lists(st.integers(0, 1), max_size=5))
    def attach(self, chain: list[int]) -> RequestId:
        """A request opens its table with the blocks the cache has."""
        request = RequestId(len(self.chain))
        keys = keys_of(*chain)
        told = self.ledger.lookup(keys)
        free = self.ledger.num_free_blocks
        cached = len(self.ledger.attach(request, keys))
        assert told == (cached, free - self.ledger.num_free_blocks), "lookup told otherwise than attach did"
        self.chain[request] = chain
        self.num_published[request], self.num_tokens[request] = cached, cached * SIZE
        return request

    @rule(request=requests, num_tokens=st.integers(1, 5))
    def grow(self, request: RequestId, num_tokens: int) -> None:
        """It needs more blocks; the ones it has stay."""
        before = list(self.ledger.block_table(request))
        target = self.num_tokens[request] + num_tokens
        if ceil_div(target, SIZE) - len(before) > self.ledger.num_free_blocks:
            return
        self.ledger.grow(request, target)
        self.num_tokens[request] = target
        after = list(self.ledger.block_table(request))
        assert after[: len(before)] == before, "a held block was taken away"
        assert len(after) == ceil_div(target, SIZE)

    @rule(request=requests)
    def publish(self, request: RequestId) -> None:
        """What it has computed of its chain becomes known."""
        chain, first = self.chain[request], self.num_published[request]
        last = min(len(chain), self.num_tokens[request] // SIZE)
        keys = keys_of(*chain)[first:last]
        self.ledger.publish(request, first, keys)
        self.num_published[request] = max(first, last)
        # Of what was published before, an equal block of another request may have been indexed, and evicted since.
        assert self.ledger.keys() >= set(keys), "a published block is not found"

    @rule(request=consumes(requests))
    def release(self, request: RequestId) -> None:
        """It ends; exactly its private blocks become free."""
        private, free = self.ledger.num_private_blocks(request), self.ledger.num_free_blocks
        self.ledger.release(request)
        assert self.ledger.num_free_blocks == free + private
        assert not self.ledger.block_table(request)

    @rule(num_blocks=st.integers(1, 4))
    def pin(self, num_blocks: int) -> None:
        """Idle blocks begin to be copied, and are not free meanwhile."""
        blocks = [block for block, _ in self.ledger.idle()][:num_blocks]
        free = self.ledger.num_free_blocks
        self.ledger.pin(blocks)
        self.pinned.append(blocks)
        assert self.ledger.num_free_blocks == free - len(blocks)

    @precondition(lambda self: self.pinned)
    @rule(goes_first=st.booleans())
    def unpin(self, goes_first: bool) -> None:
        """The copy is done: whoever is idle now can be evicted, and every block can still be found."""
        keys, idle = self.ledger.keys(), {block for block, _ in self.ledger.idle()}
        blocks = self.pinned.pop(0)
        self.ledger.unpin(blocks, goes_first=goes_first)
        after = [block for block, _ in self.ledger.idle()]
        assert self.ledger.keys() == keys
        assert idle <= set(after) <= idle | set(blocks)

    @rule(chain=st.lists(st.integers(0, 1), min_size=1, max_size=5), num_blocks=st.integers(1, 3))
    def reserve(self, chain: list[int], num_blocks: int) -> None:
        """The end of a chain begins to come back, if there is room; nothing of it can be found meanwhile."""
        keys = keys_of(*chain)
        mine = keys[self.ledger.lookup(keys)[0] :][:num_blocks]
        if not mine or len(mine) > self.ledger.num_free_blocks:
            return
        free, known = self.ledger.num_free_blocks, self.ledger.keys()
        self.reserved.append((self.ledger.reserve(len(mine)), mine))
        assert self.ledger.num_free_blocks == free - len(mine)
        assert self.ledger.keys() <= known

    @precondition(lambda self: self.reserved)
    @rule()
    def keep(self) -> None:
        """It is back: its keys are known, whoever else came to hold some, and its blocks are free."""
        blocks, keys = self.reserved.pop(0)
        free = self.ledger.num_free_blocks
        self.ledger.keep(blocks, keys)
        assert self.ledger.keys() >= set(keys)
        assert self.ledger.num_free_blocks == free + len(blocks)

    @precondition(lambda self: self.ledger.num_free_blocks > 0)
    @rule()
    def evict(self) -> None:
        """A request takes all there is, and leaves nothing worth keeping."""
        request = RequestId(-1)
        self.ledger.attach(request, [])
        self.ledger.grow(request, self.ledger.num_free_blocks * SIZE)
        assert self.ledger.num_free_blocks == self.ledger.num_idle_blocks == 0
        self.ledger.release(request)

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        """The ledger's own books agree, and the counts a policy sees add up."""
        self.ledger.audit()
        assert self.ledger.num_used_blocks + self.ledger.num_free_blocks == NUM_BLOCKS

    @invariant()
    def a_lookup_changes_nothing(self) -> None:
        """Asking twice gives the same answer and no new version."""
        version = self.ledger.version
        keys = keys_of(0, 1, 0)
        assert self.ledger.lookup(keys) == self.ledger.lookup(keys)
        assert self.ledger.version == version


TestAnyUse = AnyUse.TestCase


def test_a_key_is_xllms_hash_of_its_predecessor_and_its_tokens() -> None:
    """XXH3-128 with seed 1024 over the previous key and the tokens as little-endian int32."""
    first = xxhash.xxh3_128(b"\x01\x00\x00\x00\x02\x01\x00\x00", seed=1024).digest()
    second = xxhash.xxh3_128(first + b"\x03\x00\x00\x00\x04\x00\x00\x00", seed=1024).digest()
    assert block_key(b"", np.array([1, 258], dtype=np.int32)) == first
    assert block_key(first, np.array([3, 4], dtype=np.int32)) == second


def test_a_key_does_not_depend_on_how_its_tokens_are_stored() -> None:
    """A strided view and another integer type name the same block."""
    plain = block_key(b"", np.array([1, 2], dtype=np.int32))
    assert block_key(b"", np.array([1, 9, 2, 9], dtype=np.int32)[::2]) == plain
    assert block_key(b"", np.array([1, 2], dtype=np.int64).astype(np.int32)) == plain


def test_leaves_are_evicted_before_their_roots() -> None:
    """A chain loses its end first, so that what remains can still be found."""
    ledger = Ledger(4, SIZE)
    ledger.release(held(ledger, 0, 1, 2, 3))
    lengths = []
    for request_id in range(1, 5):
        ledger.attach(RequestId(request_id), [])
        ledger.grow(RequestId(request_id), SIZE)
        lengths.append(ledger.lookup(keys_of(1, 2, 3)))
    assert lengths == [(3, 3), (2, 2), (1, 1), (0, 0)]


def test_the_least_recently_used_chain_goes_first() -> None:
    """Using a chain again makes it young."""
    ledger = Ledger(2, SIZE)
    ledger.release(held(ledger, 0, 1))
    ledger.release(held(ledger, 1, 2))
    ledger.release(held(ledger, 2, 1))
    ledger.attach(RequestId(3), [])
    ledger.grow(RequestId(3), SIZE)
    assert ledger.lookup(keys_of(1)) == (1, 1)
    assert ledger.lookup(keys_of(2)) == (0, 0)


def test_what_has_a_copy_goes_first_and_of_that_the_least_recently_used() -> None:
    """Three chains of two: the middle one is not copied, and stays longest."""
    ledger, chains = Ledger(6, SIZE), ((1, 2), (3, 4), (5, 6))
    for request_id, chain in enumerate(chains):
        ledger.release(held(ledger, request_id, *chain))
    for chain in chains[::2]:
        blocks = [block for key in keys_of(*chain) if (block := ledger.find(key)) is not None]
        ledger.pin(blocks)
        ledger.unpin(blocks, goes_first=True)
    gone: list[tuple[int, int]] = []
    while len(gone) < 3:
        ledger.reserve(1)
        gone += [c for c in chains if c not in gone and not ledger.lookup(keys_of(*c))[0]]
    assert gone == [(1, 2), (5, 6), (3, 4)]


def test_a_shared_block_is_nobodys_private_block() -> None:
    """Preempting one of its users would free nothing."""
    ledger = Ledger(4, SIZE)
    first, second = held(ledger, 0, 1, 2), held(ledger, 1, 1, 3)
    assert ledger.block_table(first)[0] == ledger.block_table(second)[0]
    assert (ledger.num_private_blocks(first), ledger.num_private_blocks(second), ledger.num_used_blocks) == (1, 1, 3)


def test_equal_blocks_computed_at_once_are_not_merged() -> None:
    """Tables are append-only: the key stays with the first, and the second's block is worthless once released."""
    ledger = Ledger(4, SIZE)
    first, second = RequestId(0), RequestId(1)
    for request in (first, second):
        ledger.attach(request, keys_of(1))
        ledger.grow(request, SIZE)
    for request in (first, second):
        ledger.publish(request, 0, keys_of(1))
    ledger.release(second)
    assert ledger.num_idle_blocks == 0
    ledger.release(first)
    assert ledger.num_idle_blocks == 1


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    """Publishing is silent, and released blocks are clean."""
    ledger = Ledger(4, SIZE, enable_prefix_cache=False)
    ledger.release(held(ledger, 0, 1, 2))
    assert (ledger.lookup(keys_of(1, 2)), ledger.num_idle_blocks, ledger.num_free_blocks) == ((0, 0), 0, 4)


def test_clean_blocks_are_handed_out_before_cached_ones() -> None:
    """Nothing is forgotten while there is a block without content."""
    ledger = Ledger(4, SIZE)
    ledger.release(held(ledger, 0, 1, 2))
    ledger.attach(RequestId(1), [])
    ledger.grow(RequestId(1), 2 * SIZE)
    assert ledger.lookup(keys_of(1, 2)) == (2, 2)


def test_whatever_may_change_a_lookup_changes_the_version() -> None:
    """Hosts keep answers by version: publishing, evicting, and taking or leaving idle blocks must be seen."""
    ledger = Ledger(2, SIZE)
    versions = [ledger.version]
    request = held(ledger, 0, 1)
    versions.append(ledger.version)
    ledger.release(request)
    versions.append(ledger.version)
    ledger.attach(RequestId(1), [])
    ledger.grow(RequestId(1), SIZE)
    versions.append(ledger.version)
    ledger.grow(RequestId(1), 2 * SIZE)
    versions.append(ledger.version)
    assert len(set(versions)) == len(versions)
