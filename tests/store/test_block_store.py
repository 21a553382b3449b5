"""What a store gives is what was put, or nothing, wherever its blocks lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.places import (
    IDENTITY,
    PATIENT_US,
    Place,
    content,
    key_of,
    name_of,
    room,
    store_at,
    told,
    untouched,
)  # fmt: skip
from xllm_lab.store import BlockStore, StoreCounters
from xllm_lab.store.envelope import HEADER_BYTES

# One store serves all examples of a law: each has keys of its own.
one_store = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
EXAMPLES = count()
BLOCK_BYTES = 1024


def chain(length: int) -> list[bytes]:
    """Keys that no example had before."""
    example = next(EXAMPLES)
    return [key_of(example, position) for position in range(length)]


@pytest.fixture
def store(place: Place) -> Iterator[BlockStore]:
    with store_at(place.spec) as one:
        yield one


class Counted:
    """What a store counts from here on."""

    def __init__(self, store: BlockStore) -> None:
        self._store, self._before = store, asdict(store.counters())

    def __call__(self) -> StoreCounters:
        now: dict[str, Any] = asdict(self._store.counters())
        assert not now.pop("reasons")
        return StoreCounters(**{name: value - self._before[name] for name, value in now.items()})


def put(store: BlockStore, keys: list[bytes]) -> int:
    return store.put(keys, [[content(key, BLOCK_BYTES)] for key in keys], PATIENT_US)


def assert_all_told(c: StoreCounters) -> None:
    assert c.num_asked == c.num_hits + c.num_misses + c.num_behind_a_miss, c


@given(cuts=st.lists(st.integers(0, BLOCK_BYTES), max_size=4), length=st.integers(0, 7))
@one_store
def test_blocks_come_back_as_they_were_put(store: BlockStore, cuts: list[int], length: int) -> None:
    """However their bytes lie in memory, in parts of any size."""
    keys, edges, counted = chain(length), [0, *sorted(cuts), BLOCK_BYTES], Counted(store)
    wanted = [content(key, BLOCK_BYTES) for key in keys]
    parts = [[memoryview(block)[a:b] for a, b in pairwise(edges)] for block in wanted]
    assert store.put(keys, parts, PATIENT_US) == length
    found = room(length)
    assert store.num_leading(keys, PATIENT_US) == store.get_into(keys, found, PATIENT_US) == length
    assert [told(block) for block in found] == wanted
    c = counted()
    assert (c.num_puts, c.num_hits, c.num_asked) == (length, length, length)
    assert c.read_bytes == c.written_bytes == length * (HEADER_BYTES + BLOCK_BYTES)


def damaged(draw: st.DrawFn, envelope: bytes, others: list[bytes]) -> bytes:
    """An envelope with bytes flipped, cut, added, of another block, or of none."""
    how = draw(st.sampled_from(("flip", "cut", "extend", "swap", "splice", "noise")))
    position = draw(st.integers(0, len(envelope) - 1))
    if how == "flip":
        return envelope[:position] + bytes([envelope[position] ^ draw(st.integers(1, 255))]) + envelope[position + 1 :]
    if how == "cut":
        return envelope[: max(1, position)]  # Mooncake keeps no object without bytes
    if how == "extend":
        return envelope + bytes(draw(st.integers(1, 99)))
    other = draw(st.sampled_from(others))
    if how == "swap":
        return other
    if how == "splice":
        return envelope[:position] + other[position:]
    return draw(st.binary(min_size=len(envelope), max_size=len(envelope)))


@given(data=st.data())
@one_store
def test_no_damage_gives_wrong_bytes(place: Place, store: BlockStore, data: st.DataObject) -> None:
    """Whatever happens to stored bytes, a get ends before them, says so, and the next put mends them."""
    keys, counted = chain(6), Counted(store)
    assert put(store, keys) == 6
    envelopes = [envelope for key in keys if (envelope := place.stored(name_of(key))) is not None]
    assert len(envelopes) == 6
    victims = sorted(data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=3)))
    wrong = []
    for victim in victims:
        others = [e for k, e in enumerate(envelopes) if k != victim]
        envelope = data.draw(st.composite(damaged)(envelopes[victim], others))
        place.replace(name_of(keys[victim]), envelope)
        if envelope != envelopes[victim]:
            wrong.append(victim)
    num_right = min(wrong, default=6)
    found = room(6)
    assert store.get_into(keys, found, PATIENT_US) == num_right
    assert [told(block) for block in found[:num_right]] == [content(key, BLOCK_BYTES) for key in keys[:num_right]]
    assert all(untouched(block) for block in found[num_right:])
    c = counted()
    assert c.num_short + c.num_corrupted + c.num_foreign == bool(wrong)
    assert_all_told(c)
    for _ in wrong:  # each get finds one more wrong block, and lets it go
        put(store, keys)
        store.get_into(keys, room(6), PATIENT_US)
    assert put(store, keys) == store.get_into(keys, room(6), PATIENT_US) == 6


@given(there=st.sets(st.integers(0, 7)), asked=st.integers(0, 8))
@one_store
def test_answers_are_about_the_longest_beginning(store: BlockStore, there: set[int], asked: int) -> None:
    """A block behind one that is missing is of no use."""
    keys, counted = chain(8), Counted(store)
    for k in sorted(there):
        assert put(store, [keys[k]]) == 1
    leading = min((k for k in range(asked) if k not in there), default=asked)
    assert store.num_leading(keys[:asked], PATIENT_US) == leading
    assert store.get_into(keys[:asked], room(asked), PATIENT_US) == leading
    c = counted()
    assert (c.num_hits, c.num_absent) == (leading, int(leading < asked))
    assert_all_told(c)
    assert put(store, keys) == 8
    assert counted().num_already_there == len(there)


def test_another_model_finds_nothing(place: Place) -> None:
    """Nor another part of the same one, even where a shelf mixes names up."""
    keys, other = chain(2), replace(IDENTITY, tp_rank=1, tp_size=2)
    with store_at(place.spec) as mine, store_at(place.spec, identity=other) as theirs:
        assert put(mine, keys) == 2
        assert theirs.get_into(keys, room(2), PATIENT_US) == 0
        envelope = place.stored(name_of(keys[0]))
        assert envelope is not None
        place.replace(name_of(keys[0], other), envelope)
        found = room(2)
        assert theirs.get_into(keys, found, PATIENT_US) == 0
        assert untouched(found[0])
        c = theirs.counters()
        assert (c.num_absent, c.num_foreign, c.num_behind_a_miss) == (1, 1, 2)


def test_what_is_there_is_not_put_again(place: Place) -> None:
    keys = chain(3)
    with store_at(place.spec) as store:
        assert put(store, keys) == put(store, keys) == 3
        c = store.counters()
        assert (c.num_puts, c.num_already_there, c.num_failed_puts) == (3, 3, 0)


def test_a_closed_store_is_late(place: Place) -> None:
    """Whoever still holds it is told nothing wrong, and does not wait."""
    keys = chain(1)
    store = store_at(place.spec)
    put(store, keys)
    store.close()
    store.close()
    assert store.get_into(keys, room(1), 1000) == store.num_leading(keys, 1000) == 0
    assert store.put(keys, [[bytes(BLOCK_BYTES)]], 1000) == 0
    c = store.counters()
    assert (c.num_late, c.num_failed_puts, c.reasons) == (1, 1, {"late": 1})


def test_parts_of_another_size_are_our_own_mistake(place: Place) -> None:
    with store_at(place.spec) as store:
        for size in (BLOCK_BYTES - 1, BLOCK_BYTES + 1):
            with pytest.raises(AssertionError, match="parts of a block"):
                store.put(chain(1), [[bytes(size)]], PATIENT_US)
        assert put(store, chain(3)) == 3  # no lane is lost by it
