"""Mooncake as it is: who listens where, and what becomes of a caller whose peers or master are gone.

Run by `make test-cluster`, in an environment that has it.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.listening import listening_addresses
from tests.store.places import (
    IDENTITY,
    PATIENT_US,
    MooncakePlace,
    content,
    key_of,
    mooncake_master,
    name_of,
    room,
    store_at,
    told,
    untouched,
)  # fmt: skip
from tests.store.putting import BLOCK_BYTES, LENGTH, NUM_CHAINS, chain, right
from tests.store.test_processes import SLACK_US, num_right, putting
from xllm_lab.cluster_services import LOOPBACK, Service, free_ports, start_master
from xllm_lab.errors import ConfigError
from xllm_lab.store import BlockStore, open_store
from xllm_lab.store.lanes import now_us

TIMEOUT_US = 200_000
PATIENCE_US = 1_000_000  # for calls that may be counted as failed


@pytest.fixture
def master() -> Iterator[tuple[MooncakePlace, Service]]:
    with mooncake_master() as (port, service):
        place = MooncakePlace(port)
        yield place, service
        place.close()


def test_a_process_is_reached_from_this_machine_alone(master: tuple[MooncakePlace, Service]) -> None:
    """The library listens on every address; its sockets are kept to the loopback device."""
    place, _ = master
    before = listening_addresses(os.getpid())
    with store_at(place.spec) as store:
        ours = listening_addresses(os.getpid()) - before
        assert len(ours) == 2
        where = re.search(r"listens on (.*)", store.described)
        assert where is not None
        told_here = where[1].split(", ")
        assert all("%lo:" in one for one in told_here)
        assert {one.rpartition(":")[2] for one in told_here} == {one.rpartition(":")[2] for one in ours}


def test_the_master_is_reached_from_this_machine_alone(master: tuple[MooncakePlace, Service]) -> None:
    _, service = master
    found = listening_addresses(service.process.pid)
    assert len(found) == 2
    assert all(one.startswith(f"{LOOPBACK}:") for one in found)
    assert {f"{one.split(' ')[0]}" for one in service.addresses} == found


def test_told_otherwise_it_listens_everywhere_and_says_so(master: tuple[MooncakePlace, Service]) -> None:
    place, _ = master
    host = "0.0.0.0"
    with open_store(f"{place.reading_spec}?listen={host}", IDENTITY, 1024) as store:
        assert "listens on 0.0.0.0:" in store.described
        assert "%lo" not in store.described


def test_an_owner_that_stops_is_late(master: tuple[MooncakePlace, Service]) -> None:
    """It is there and does not answer: the caller goes on at his deadline, and its late bytes hit nobody."""
    place, _ = master
    with store_at(place.reading_spec, BLOCK_BYTES, lanes=1) as store, putting(place.spec, 0) as owner:
        there = [n for n in range(NUM_CHAINS) if num_right(store, n) == LENGTH]
        before = store.counters()
        owner.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WNOWAIT)  # all its threads have stopped
        found = room(LENGTH, BLOCK_BYTES)
        since_us = now_us()
        num_hits = store.get_into(chain(there[0]), found, TIMEOUT_US)
        assert now_us() - since_us < TIMEOUT_US + SLACK_US
        assert num_hits == 0
        assert store.counters().num_late == before.num_late + 1
        assert store.counters().num_left_behind == before.num_left_behind + 1
        owner.send_signal(signal.SIGCONT)
        while store.get_into(chain(there[0]), room(LENGTH, BLOCK_BYTES), PATIENT_US) == 0:
            assert owner.poll() is None
            assert store.counters().num_left_behind == before.num_left_behind + 1
        assert all(untouched(block) for block in found)


def test_what_a_dead_owner_had_is_put_anew(master: tuple[MooncakePlace, Service]) -> None:
    """At once, though the master still believes in it: a read that came short has told it otherwise."""
    place, _ = master
    with store_at(place.reading_spec, BLOCK_BYTES) as store:
        with putting(place.spec, 0) as owner:
            there = next(n for n in range(NUM_CHAINS) if num_right(store, n) == LENGTH)
        assert owner.wait() == -signal.SIGKILL
        keys, blocks = chain(there), [[right(key)] for key in chain(there)]
        assert store.num_leading(keys, PATIENT_US) == LENGTH
        assert store.get_into(keys, room(LENGTH, BLOCK_BYTES), PATIENT_US) == 0
        assert store.counters().num_short == 1
        assert store.num_leading(keys, PATIENT_US) == 0
        with store_at(place.spec, BLOCK_BYTES) as other:
            assert other.put(keys[:1], blocks[:1], PATIENT_US) == 1
            assert store.get_into(keys[:1], room(1, BLOCK_BYTES), PATIENT_US) == 1


def test_without_a_master_every_call_ends(master: tuple[MooncakePlace, Service]) -> None:
    """By its deadline, counted; and when there is one again, blocks go in and out again."""
    place, service = master
    keys = [key_of(k) for k in range(3)]
    blocks = [[content(key, 1024)] for key in keys]
    with store_at(place.spec) as store:
        assert store.put(keys, blocks, PATIENT_US) == 3
        service.process.kill()
        service.process.wait()
        calls: list[Callable[[], int]] = [
            lambda: store.get_into(keys, room(3), TIMEOUT_US),
            lambda: store.put(keys, blocks, TIMEOUT_US),
            lambda: store.num_leading(keys, TIMEOUT_US),
        ]
        for call in calls:
            since_us = now_us()
            assert call() == 0
            assert now_us() - since_us < TIMEOUT_US + SLACK_US
        c = store.counters()
        assert c.num_failed + c.num_late == c.num_failed_puts == 1
        with again(service):
            found = room(3)
            until_us = now_us() + PATIENT_US
            while store.put(keys, blocks, PATIENT_US) < 3 or store.get_into(keys, found, PATIENT_US) < 3:
                assert now_us() < until_us, store.counters()
            assert [told(block) for block in found] == [content(key, 1024) for key in keys]


def again(service: Service) -> Service:
    """Another master where one was."""
    port, metrics_port = (int(one.split(" ")[0].rpartition(":")[2]) for one in service.addresses)
    return start_master(port=port, metrics_port=metrics_port)


def test_no_master_is_one_line() -> None:
    (port,) = free_ports(1)
    with pytest.raises(ConfigError, match=rf"no Mooncake master answers at {LOOPBACK}:{port} .*`make cluster`"):
        open_store(f"mooncake://{LOOPBACK}:{port}", IDENTITY, 1024)


def test_a_full_store_forgets_and_counts(master: tuple[MooncakePlace, Service]) -> None:
    """Put into a store that is too small, all that comes back is right."""
    place, _ = master
    spec = f"{place.reading_spec}?segment_bytes=16MiB"
    keys = [key_of(9, k) for k in range(32)]
    with store_at(spec, 1 << 20) as store:
        num_put = [_put_one(store, key) for key in keys]
        num_hits = 0
        for key in keys:
            found = room(1, 1 << 20)
            if store.get_into([key], found, PATIENCE_US):
                assert told(found[0]) == content(key, 1 << 20)
                num_hits += 1
        c = store.counters()
        assert 0 < num_hits < len(keys)
        assert c.num_puts + c.num_failed_puts == len(keys)
        assert c.num_puts == sum(num_put)
        assert c.num_hits == num_hits


def _put_one(store: BlockStore, key: bytes) -> int:
    return store.put([key], [[content(key, 1 << 20)]], PATIENCE_US)


def test_a_name_says_whose_block_it_is(master: tuple[MooncakePlace, Service]) -> None:
    place, _ = master
    key = key_of(1)
    with store_at(place.spec) as store:
        assert store.put([key], [[content(key, 1024)]], PATIENT_US) == 1
        assert place.stored(name_of(key)) is not None
