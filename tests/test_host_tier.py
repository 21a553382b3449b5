"""The host's blocks: a machine that fills, reads and gives up in any order, beside a model of three sets."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm_lab.host_tier import HostTier
from xllm_lab.ledger import BlockKey

NUM_SLOTS = 5
KEYS = [bytes([name]) for name in range(8)]


class AnyUse(RuleBasedStateMachine):
    """Keys on their way, keys that are there, and copies that read some."""

    def __init__(self) -> None:
        super().__init__()
        self.host = HostTier(NUM_SLOTS)
        self.slot_of: dict[BlockKey, int] = {}
        self.filling: list[BlockKey] = []
        self.reading: list[list[BlockKey]] = []

    @property
    def read(self) -> set[BlockKey]:
        return {key for keys in self.reading for key in keys}

    @rule(key=st.sampled_from(KEYS))
    def fill(self, key: BlockKey) -> None:
        if key not in self.host and self.host.num_free_slots:
            self.slot_of[key] = self.host.fill(key)
            self.filling.append(key)

    @precondition(lambda self: self.filling)
    @rule()
    def filled(self) -> None:
        version = self.host.version
        self.host.filled([self.slot_of[self.filling.pop(0)]])
        assert self.host.version != version

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def read_some(self, keys: list[BlockKey]) -> None:
        found = keys[: self.host.num_leading(keys)]
        if found:
            assert self.host.read(found) == tuple(self.slot_of[key] for key in found)
            self.reading.append(found)

    @precondition(lambda self: self.reading)
    @rule()
    def release(self) -> None:
        self.host.release([self.slot_of[key] for key in self.reading.pop(0)])

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def touch(self, keys: list[BlockKey]) -> None:
        """Those that nobody reads are the last to go, the first of them the very last."""
        self.host.touch(keys)
        mine = [key for _, key in self.host.unread() if key in keys]
        assert mine == [key for key in reversed(keys) if key in mine]
        assert [key for _, key in self.host.unread()][-len(mine) :] == mine if mine else True

    @rule(key=st.sampled_from(KEYS))
    def evict(self, key: BlockKey) -> None:
        """Only what is there and nobody reads."""
        if key in self.slot_of:
            may_go = key not in self.filling and key not in self.read
            assert self.host.evict(self.slot_of[key]) == may_go
            if may_go:
                del self.slot_of[key]

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        """And each is what the model says."""
        self.host.audit()
        assert {key for key in KEYS if key in self.host} == set(self.slot_of)
        assert self.host.num_free_slots == NUM_SLOTS - len(self.slot_of)
        ready = set(self.slot_of) - set(self.filling)
        assert {key for key in KEYS if self.host.num_leading([key])} == ready
        assert {key for _, key in self.host.unread()} == ready - self.read


TestAnyUse = AnyUse.TestCase


def test_a_run_of_blocks_ends_where_one_is_missing() -> None:
    """Or is not there yet."""
    host = HostTier(3)
    slots = [host.fill(key) for key in KEYS[:3]]
    host.filled(slots[:1] + slots[2:])
    assert host.num_leading(KEYS) == 1
    host.filled(slots[1:2])
    assert host.num_leading(KEYS) == 3
