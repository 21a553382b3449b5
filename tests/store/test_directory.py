"""A directory keeps its size, forgets what was not used, and takes whatever a file system does to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.places import PATIENT_US, DirectoryPlace, content, key_of, name_of, room, store_at, told, untouched
from tests.store.test_processes import ROOT, bytes_in
from xllm_lab.store import BlockStore
from xllm_lab.store.envelope import HEADER_BYTES

ENVELOPE_BYTES = HEADER_BYTES + 1024


def put(store: BlockStore, *numbers: int) -> int:
    keys = [key_of(number) for number in numbers]
    return store.put(keys, [[content(key, store.block_bytes)] for key in keys], PATIENT_US)


def kept(store: BlockStore, num_keys: int) -> list[int]:
    """Which of the first keys are there; without use."""
    return [k for k in range(num_keys) if DirectoryPlace.stored(place_of(store), name_of(key_of(k)))]


def place_of(store: BlockStore) -> DirectoryPlace:
    return DirectoryPlace(Path(store.described.removeprefix("directory ").rpartition(",")[0]))


@given(
    capacity=st.integers(1, 12 * ENVELOPE_BYTES),
    calls=st.lists(st.tuples(st.sampled_from((700, 1024, 2500)), st.integers(0, 30), st.integers(1, 5)), max_size=12),
)
def test_no_put_exceeds_the_capacity(
    tmp_path_factory: pytest.TempPathFactory, capacity: int, calls: list[tuple[int, int, int]]
) -> None:
    """Of several stores in one directory, for blocks of several sizes."""
    folder = tmp_path_factory.mktemp("blocks")
    stores = {size: store_at(f"dir:{folder}?bytes={capacity}", size, lanes=1) for size in (700, 1024, 2500)}
    for size, first, length in calls:
        num_put = put(stores[size], *range(first, first + length))
        assert bytes_in(folder) <= capacity
        fits = HEADER_BYTES + size <= capacity
        assert num_put == (length if fits else 0)
        assert stores[size].counters().num_failed_puts == 0 or not fits
    for store in stores.values():
        store.close()


def test_what_was_used_last_is_kept(tmp_path: Path) -> None:
    with store_at(f"dir:{tmp_path}?bytes={10 * ENVELOPE_BYTES}") as store:
        for k in range(10):
            assert put(store, k) == 1
        assert store.get_into([key_of(0)], room(1), PATIENT_US) == 1
        assert store.num_leading([key_of(1)], PATIENT_US) == 1
        assert put(store, 3) == 1
        assert put(store, 10, 11) == 2
        assert kept(store, 12) == [0, 1, 3, 5, 6, 7, 8, 9, 10, 11]
        assert store.counters().num_evictions == 2


def test_leaves_are_evicted_before_their_roots(tmp_path: Path) -> None:
    """A chain is put in several batches, and still its first block counts as used last."""
    with store_at(f"dir:{tmp_path}?bytes={10 * ENVELOPE_BYTES}") as store:
        assert put(store, *range(9)) == 9
        assert put(store, 100, 101, 102) == 3
        assert kept(store, 9) == list(range(7))
        assert store.num_leading([key_of(k) for k in range(9)], PATIENT_US) == 7


def test_a_smaller_capacity_holds_from_the_start(tmp_path: Path) -> None:
    """And files that nobody has counted are counted."""
    with store_at(f"dir:{tmp_path}?bytes={10 * ENVELOPE_BYTES}") as store:
        put(store, *range(10))
    (tmp_path / ".usage").unlink()
    with store_at(f"dir:{tmp_path}?bytes={4 * ENVELOPE_BYTES}") as store:
        assert bytes_in(tmp_path) <= 4 * ENVELOPE_BYTES
        assert put(store, 20, 21) == 2
        assert bytes_in(tmp_path) <= 4 * ENVELOPE_BYTES


def test_a_file_that_never_answers_is_late(tmp_path: Path) -> None:
    """Whoever waits for it waits until his deadline, and a late answer does not hit his memory."""
    place, keys = DirectoryPlace(tmp_path), [key_of(0), key_of(1)]
    with store_at(place.spec, lanes=1) as store:
        put(store, 0, 1)
        pipe = place.file(name_of(keys[1]))
        envelope = pipe.read_bytes()
        pipe.unlink()
        os.mkfifo(pipe)  # whose opening waits for a writer
        found = room(2)
        assert store.get_into(keys, found, 50_000) == 0
        assert store.num_leading(keys, 50_000) == 0  # the only lane is taken
        with pipe.open("wb") as writer:
            writer.write(envelope)
        pipe.unlink()
        while store.get_into(keys, room(2), PATIENT_US) != 1:  # late at once until the first has come back
            assert store.counters().num_left_behind == 1
        assert all(untouched(block) for block in found)
        c = store.counters()
        assert (c.num_hits, c.num_absent) == (1, 1)
        assert c.num_late >= 1


def test_a_file_that_cannot_be_read_is_a_miss(tmp_path: Path) -> None:
    place, key = DirectoryPlace(tmp_path), key_of(0)
    with store_at(place.spec) as store:
        place.file(name_of(key)).mkdir(parents=True)
        assert store.get_into([key], room(1), PATIENT_US) == 0
        assert store.counters().num_failed == 1
        assert store.counters().reasons == {"Is a directory": 1}


FULL = """
import resource, signal, sys
from tests.store.places import PATIENT_US, content, key_of, room, store_at, told
with store_at(sys.argv[1], 600_000, lanes=1) as store:
    keys = [key_of(k) for k in range(3)]
    put = lambda: store.put(keys, [[content(key, 600_000)] for key in keys], PATIENT_US)
    if sys.argv[2] == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    num_put = put()
    found = room(3, 600_000)
    assert store.get_into(keys, found, PATIENT_US) == num_put
    assert all(told(block) == content(key, 600_000) for key, block in zip(keys[:num_put], found))
    c = store.counters()
    print(num_put, c.num_puts, c.num_failed_puts, *c.reasons)
"""


@pytest.mark.parametrize(
    ("how", "expected"), [("limit", "0 0 1 File too large\n"), ("disk", "1 1 1 No space left on device\n")]
)
def test_a_full_disk_is_a_counted_failure(tmp_path: Path, how: str, expected: str) -> None:
    """It breaks off in the middle of a file; what was put before is right, and nothing half written is left."""
    command = [sys.executable, "-c", FULL, f"dir:{tmp_path}?bytes=1GiB", how]
    if how == "disk":
        if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode != 0:
            pytest.skip("no disk can be made here: unshare -rm is not permitted")
        mount = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@" && ls {tmp_path}'
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (expected, 0), done.stderr
    assert not list(tmp_path.glob("*/.*.part"))


def test_a_corrupted_block_is_found_and_mended(tmp_path: Path) -> None:
    place, keys = DirectoryPlace(tmp_path), [key_of(k) for k in range(3)]
    with store_at(place.spec) as store:
        put(store, 0, 1, 2)
        file = place.file(name_of(keys[1]))
        envelope = bytearray(file.read_bytes())
        envelope[500] ^= 1
        file.write_bytes(envelope)
        found = room(3)
        assert store.get_into(keys, found, PATIENT_US) == 1
        assert told(found[0]) == content(keys[0], 1024)
        c = store.counters()
        assert (c.num_hits, c.num_corrupted, c.num_behind_a_miss) == (1, 1, 1)
        assert not file.exists()
        assert put(store, 0, 1, 2) == store.get_into(keys, found, PATIENT_US) == 3
