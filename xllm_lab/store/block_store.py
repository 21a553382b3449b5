"""A store of KV blocks: names, envelopes, deadlines and counts around a shelf."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from xllm_lab.store.counters import StoreCounters
from xllm_lab.store.envelope import HEADER_BYTES, BlockIdentity, Bytes, Miss, miss_of, seal
from xllm_lab.store.lanes import Lane, Lanes, LateError, now_us
from xllm_lab.store.shelf import Shelf

T = TypeVar("T")
# A block's bytes where they are: contiguous buffers that follow one another, its layers for instance.
Parts = Sequence[bytes | bytearray | memoryview | np.ndarray[Any, Any]]
_CLOSING_US = 2_000_000
# Shelves with a call under way. Collected as garbage, Mooncake would wait for its master, and all of Python with it.
_LEFT_BEHIND: list[Shelf] = []
_MOST_REASONS = 32  # told apart; a shelf may put an address into each


class _Put(NamedTuple):
    """A block to put, and which of the call's blocks it is."""

    position: int
    name: str
    key: bytes
    parts: Parts


class BlockStore:
    """Blocks of one identity and size on one shelf.

    While a call is out past its deadline, further ones of its kind are late at once: nobody waits for what does not
    answer, and a library that spins meanwhile (Mooncake, a core for each read of an owner that is gone) spins once.

    Keys are the ledger's, in token order: every answer is about the longest beginning of them, since no block is of use
    without those before it. Any thread may call; whoever calls waits until his deadline and never longer, apart from
    the copy of one block. All that a shelf reads and writes is memory of the store's own (`lanes.py`): a block is
    proven there, where nobody changes it any more, and a late answer cannot hit memory that serves somebody else.

    Attributes:
        identity: whose blocks these are.
        block_bytes: of a block, without envelope.
        described: the shelf, in a few words; where it listens, if it does.
    """

    def __init__(
        self, shelf: Shelf, identity: BlockIdentity, block_bytes: int, *, batch_blocks: int, num_lanes: int
    ) -> None:
        """Makes `num_lanes` lanes of `batch_blocks` blocks of memory, which the system hands out as it is used."""
        assert min(block_bytes, batch_blocks, num_lanes) > 0, (block_bytes, batch_blocks, num_lanes)
        self.identity, self.block_bytes, self.described = identity, block_bytes, shelf.described
        self._shelf = shelf
        self._digest = identity.digest
        self._batch_blocks = batch_blocks
        self._lanes = Lanes(num_lanes, batch_blocks, HEADER_BYTES + block_bytes)
        self._counting = threading.Lock()
        self._out: dict[str, dict[object, int]] = defaultdict(dict)  # deadlines of calls under way, by kind
        self._counters = StoreCounters()
        self._is_closed = False
        for lane in self._lanes.all:
            shelf.prepare(lane.memory)

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def num_leading(self, keys: Sequence[bytes], timeout_us: int) -> int:
        """How many of the first blocks the shelf says it has: a hint, which `get_into` alone makes true."""
        return _num_true(self._has(self._names(keys), now_us() + timeout_us, time.time_ns()) or [])

    def put(self, keys: Sequence[bytes], blocks: Sequence[Parts], timeout_us: int) -> int:
        """Put blocks, unless they are there; how many of the first are there now.

        Give a chain from its first block on, whatever of it was put before: that is then kept longest. The first block
        that cannot be put ends the call: those behind it would be of no use.

        Args:
            blocks: the bytes of each key's block, read before this returns and not after.
        """
        assert len(keys) == len(blocks), f"{len(keys)} keys for {len(blocks)} blocks"
        deadline_us, used_ns, names = now_us() + timeout_us, time.time_ns(), self._names(keys)
        there = self._has(names, deadline_us, used_ns)
        given = enumerate(zip(names, keys, blocks, strict=True))
        missing = [_Put(k, *block) for k, block in given if there is None or not there[k]]
        with self._counting:
            self._counters.num_already_there += len(names) - len(missing)
        for start in range(0, len(missing), self._batch_blocks):
            batch = missing[start : start + self._batch_blocks]
            num_put = self._put_batch(batch, deadline_us, used_ns)
            if num_put < len(batch):
                return batch[num_put].position
        return len(names)

    def get_into(self, keys: Sequence[bytes], blocks: Sequence[Parts], timeout_us: int) -> int:
        """Copy the leading blocks that are there and proven right; how many these are.

        Args:
            blocks: memory for each key's block. That of a hit holds the block; behind the hits all is as it was.
        """
        assert len(keys) == len(blocks), f"{len(keys)} keys for {len(blocks)} blocks"
        deadline_us, used_ns, num_hits = now_us() + timeout_us, time.time_ns(), 0
        miss: Miss | None = None
        while num_hits < len(keys) and miss is None:
            batch = slice(num_hits, num_hits + self._batch_blocks)
            found, miss = self._get_batch(keys[batch], blocks[batch], deadline_us, used_ns - 1000 * num_hits)
            num_hits += found
        self._count_read(len(keys), num_hits, miss)
        return num_hits

    def counters(self) -> StoreCounters:
        """A copy, as of now."""
        with self._counting:
            reasons = dict(self._counters.reasons)
            return replace(self._counters, reasons=reasons, num_evictions=self._shelf.num_evictions())

    def close(self, timeout_us: int = _CLOSING_US) -> None:
        """Let the shelf go once no call is under way; if one is at the deadline, leave it to the process's end.

        The deadline is that of the calls: leaving Mooncake takes another second or two, in which nothing else runs.
        """
        if not self._is_closed:
            self._is_closed = True
            if self._lanes.drain(now_us() + timeout_us):
                self._shelf.close()
            else:
                _LEFT_BEHIND.append(self._shelf)

    def _names(self, keys: Sequence[bytes]) -> list[str]:
        folder = self._digest.hex()
        return [f"{folder}/{key.hex()}" for key in keys]

    def _run(self, kind: str, lane: Lane, call: Callable[[], T], deadline_us: int) -> T:
        """What the call returns, on the lane's thread.

        Raises:
            LateError: it does not return by the deadline.
        """
        token, out = object(), self._out[kind]

        def called() -> T:
            try:
                return call()
            finally:
                with self._counting:
                    del out[token]

        with self._counting:
            out[token] = deadline_us
        try:
            return lane.run(called, deadline_us)
        except LateError:
            with self._counting:
                self._counters.num_left_behind += 1
            raise

    def _answers(self, kind: str) -> bool:
        """Whether no call of this kind is out past its deadline."""
        with self._counting:
            return all(deadline_us > now_us() for deadline_us in self._out[kind].values())

    def _has(self, names: list[str], deadline_us: int, used_ns: int) -> list[bool] | None:
        """None if the shelf does not say by the deadline."""
        if not names:
            return []
        if not self._answers("has"):
            return None
        try:
            with self._lanes.take(deadline_us) as lane:
                return self._run("has", lane, lambda: self._shelf.has(names, used_ns), deadline_us)
        except LateError:
            return None

    def _put_batch(self, batch: Sequence[_Put], deadline_us: int, used_ns: int) -> int:
        """Put some of a call's blocks; how many of the first of these are there now."""
        done: list[str | None] = []
        try:
            with self._lanes.take(deadline_us) as lane:
                num_sealed = self._seal(lane, batch, deadline_us) if self._answers("write") else 0
                names, slots = [one.name for one in batch[:num_sealed]], lane.slots[:num_sealed]
                first_ns = used_ns - 1000 * batch[0].position
                if names:
                    done = self._run("write", lane, lambda: self._shelf.write(names, slots, first_ns), deadline_us)
        except LateError:
            pass
        num_put = _num_true([failure is None for failure in done])
        if num_put < len(batch):
            self._count_failed_put((done[num_put] if num_put < len(done) else None) or "late")
        with self._counting:
            self._counters.num_puts += num_put
            self._counters.written_bytes += num_put * (HEADER_BYTES + self.block_bytes)
        return num_put

    def _seal(self, lane: Lane, blocks: Sequence[_Put], deadline_us: int) -> int:
        """How many of them are in the lane's slots by the deadline."""
        for slot, block in enumerate(blocks):
            if now_us() >= deadline_us:
                return slot
            envelope = lane.slots[slot]
            _copy(block.parts, envelope[HEADER_BYTES:], into_parts=False)
            seal(envelope, self._digest, block.key)
        return len(blocks)

    def _get_batch(
        self, keys: Sequence[bytes], blocks: Sequence[Parts], deadline_us: int, used_ns: int
    ) -> tuple[int, Miss | None]:
        """(How many of the first are right and copied, why the next one is not)."""
        names = self._names(keys)
        if not self._answers("read"):
            return 0, "late"
        try:
            with self._lanes.take(deadline_us) as lane:
                num_right, miss = self._run("read", lane, lambda: self._read(lane, names, keys, used_ns), deadline_us)
                for slot in range(num_right):
                    if now_us() >= deadline_us:
                        return slot, "late"
                    _copy(blocks[slot], lane.slots[slot, HEADER_BYTES:], into_parts=True)
        except LateError:
            return 0, "late"
        if miss in ("short", "corrupted", "foreign"):
            self._forget(names[num_right], deadline_us)
        return num_right, miss

    def _read(self, lane: Lane, names: Sequence[str], keys: Sequence[bytes], used_ns: int) -> tuple[int, Miss | None]:
        """On the lane's thread: (how many of the first are right, why the next one is not)."""
        for slot, found in enumerate(self._shelf.read(names, lane.slots[: len(names)], used_ns)):
            if found is None:
                return slot, "absent"
            if isinstance(found, str):
                with self._counting:
                    self._tell(found)
                return slot, "failed"
            miss = miss_of(lane.slots[slot], found, self._digest, keys[slot])
            if miss is not None:
                return slot, miss
        return len(names), None

    def _forget(self, name: str, deadline_us: int) -> None:
        """Let go of a block that was not right, so that a put mends it; not at the cost of the deadline."""
        try:
            with self._lanes.take(deadline_us) as lane:
                self._run("forget", lane, lambda: self._shelf.forget(name), deadline_us)
        except LateError:
            pass

    def _count_read(self, num_asked: int, num_hits: int, miss: Miss | None) -> None:
        with self._counting:
            c = self._counters
            c.num_asked += num_asked
            c.num_hits += num_hits
            c.read_bytes += num_hits * (HEADER_BYTES + self.block_bytes)
            if miss is not None:
                setattr(c, f"num_{miss}", getattr(c, f"num_{miss}") + 1)
                c.num_behind_a_miss += num_asked - num_hits - 1

    def _count_failed_put(self, reason: str) -> None:
        with self._counting:
            self._counters.num_failed_puts += 1
            self._tell(reason)

    def _tell(self, reason: str) -> None:
        reasons = self._counters.reasons
        if reason not in reasons and len(reasons) >= _MOST_REASONS:
            reason = "other"
        reasons[reason] = reasons.get(reason, 0) + 1


def _num_true(answers: Sequence[bool]) -> int:
    """How many of the first."""
    return answers.index(False) if False in answers else len(answers)


def _copy(parts: Parts, payload: Bytes, *, into_parts: bool) -> None:
    """Copy parts to a payload of as many bytes, or back; numpy lets other threads run meanwhile."""
    start = 0
    for part in parts:
        flat = np.frombuffer(part, np.uint8)
        piece = payload[start : start + len(flat)]
        assert len(piece) == len(flat), f"parts of a block are more than its {len(payload)} bytes"
        np.copyto(*((flat, piece) if into_parts else (piece, flat)))
        start += len(flat)
    assert start == len(payload), f"parts of a block are {start} bytes, it has {len(payload)}"
