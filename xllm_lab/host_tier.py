"""The host's KV blocks: which keys lie where. Ids and counts, no tensors; as `ledger.py` for the device.

free --fill--> filling --filled--> ready --read--> being read --release--> ready --evict--> free
                       --not_filled--> free
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from xllm_lab.ledger import BlockKey


class HostTier:
    """Blocks of the host's memory, ids [0, num_slots).

    Attributes:
        version: changes whenever a lookup may answer differently.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.version = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}
        self._filling: set[int] = set()
        # Ready ones: how many copies read them; those that none does, least recently used first.
        self._num_readers: dict[int, int] = {}
        self._unread: OrderedDict[int, None] = OrderedDict()
        # Ready ones that nobody gave to the store, nor had from there, in the order in which they came.
        self._unsaved: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    def __contains__(self, key: BlockKey) -> bool:
        """Whether it is here, or on its way."""
        return key in self._slot_of

    def num_leading(self, keys: Sequence[BlockKey]) -> int:
        """Length of the longest ready run of `keys` from the start."""
        for count, key in enumerate(keys):
            if self._slot_of.get(key) not in self._num_readers:
                return count
        return len(keys)

    def unread(self) -> Iterator[tuple[int, BlockKey]]:
        """Blocks in no copy and their keys, least recently used first."""
        return ((slot, self._key_of[slot]) for slot in self._unread)

    def is_unread(self, slot: int) -> bool:
        """Whether it holds a block, and is in no copy."""
        return slot in self._unread

    def unsaved(self) -> Iterator[tuple[int, BlockKey]]:
        """Those of `unread` that the store was not given, in the order in which they came."""
        return ((slot, self._key_of[slot]) for slot in self._unsaved if slot in self._unread)

    def is_unsaved(self, slot: int) -> bool:
        """Whether `unsaved` has it."""
        return slot in self._unsaved and slot in self._unread

    def saves(self, slots: Sequence[int]) -> None:
        """The store is given them; whether it takes them or not, once is enough."""
        for slot in slots:
            del self._unsaved[slot]
        self.version += 1

    def fill(self, key: BlockKey) -> int:
        """A free block, for a copy of that key. The caller has checked that there is one."""
        assert key not in self._slot_of, "a copy of what is there"
        slot = self._free.pop()
        self._slot_of[key], self._key_of[slot] = slot, key
        self._filling.add(slot)
        return slot

    def filled(self, slots: Sequence[int], *, is_saved: bool = False) -> None:
        """The copy is done.

        Args:
            slots: in order of their tokens.
            is_saved: they are in the store, too.
        """
        for slot in reversed(slots):
            self._filling.remove(slot)
            self._num_readers[slot] = 0
            self._unread[slot] = None
        if not is_saved:
            self._unsaved.update(dict.fromkeys(slots))
        self.version += 1

    def not_filled(self, slots: Sequence[int]) -> None:
        """The copy is done, and brought nothing for them."""
        for slot in reversed(slots):
            self._filling.remove(slot)
            del self._slot_of[self._key_of.pop(slot)]
            self._free.append(slot)
        self.version += 1

    def read(self, keys: Sequence[BlockKey]) -> tuple[int, ...]:
        """Their blocks, which stay until they are unread."""
        slots = tuple([self._slot_of[key] for key in keys])
        for slot in slots:
            self._unread.pop(slot, None)
            self._num_readers[slot] += 1
        return slots

    def read_slots(self, slots: Sequence[int]) -> tuple[BlockKey, ...]:
        """As `read`, by block; returns their keys."""
        keys = tuple([self._key_of[slot] for slot in slots])
        self.read(keys)
        return keys

    def release(self, slots: Sequence[int]) -> None:
        """The copy is done; they are the ones used most recently, their beginnings last."""
        for slot in reversed(slots):
            self._num_readers[slot] -= 1
            if not self._num_readers[slot]:
                self._unread[slot] = None

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """A request uses blocks on the device that are here, too."""
        for key in reversed(keys):
            slot = self._slot_of.get(key)
            if slot is not None and slot in self._unread:
                self._unread.move_to_end(slot)

    def evict(self, slot: int) -> bool:
        """Give up a block; False if a copy reads it."""
        if slot not in self._unread:
            return False
        del self._unread[slot], self._num_readers[slot]
        self._unsaved.pop(slot, None)
        del self._slot_of[self._key_of.pop(slot)]
        self._free.append(slot)
        self.version += 1
        return True

    def audit(self) -> None:
        """Assert that every block is in exactly one state."""
        free, filling, ready = set(self._free), self._filling, set(self._num_readers)
        assert len(free) == len(self._free), "a free block is listed twice"
        assert free | filling | ready == set(range(self.num_slots)), "a block is in no state"
        assert len(free) + len(filling) + len(ready) == self.num_slots, "a block is in two states"
        assert set(self._unread) == {s for s, n in self._num_readers.items() if n == 0}, "readers are miscounted"
        assert self._key_of == {s: k for k, s in self._slot_of.items()}, "the index is torn"
        assert set(self._key_of) == filling | ready, "a block without a key holds something"
        assert ready.issuperset(self._unsaved), "a block that is not there waits to be saved"
