"""Several processes share a store, and some of them die."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.store.places import PATIENT_US, DirectoryPlace, Place, name_of, room, store_at, told
from tests.store.putting import BLOCK_BYTES, LENGTH, NUM_CHAINS, TIMEOUT_US, chain, right
from xllm_lab.store import BlockStore
from xllm_lab.store.envelope import HEADER_BYTES
from xllm_lab.store.lanes import now_us

ROOT = Path(__file__).parents[2]
# What a busy machine may add to a deadline; the libraries behind it wait 30 s and more.
SLACK_US = 5_000_000


@contextmanager
def putting(spec: str, seed: int, *, first: int = 0, rounds: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that has put a chain."""
    command = [sys.executable, "-m", "tests.store.putting", spec, str(seed), str(first), *([rounds] if rounds else [])]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def num_right(store: BlockStore, number: int) -> int:
    """How many blocks of a chain come; all of them are right, and in time."""
    keys, found = chain(number), room(LENGTH, BLOCK_BYTES)
    since_us = now_us()
    num_hits = store.get_into(keys, found, TIMEOUT_US)
    assert now_us() - since_us < TIMEOUT_US + SLACK_US
    for key, block in list(zip(keys, found, strict=True))[:num_hits]:
        assert told(block) == right(key)
    return num_hits


def test_a_second_process_gets_what_the_first_put(place: Place) -> None:
    with store_at(place.reading_spec, BLOCK_BYTES) as store, putting(place.spec, seed=0):
        hits = [store.get_into(chain(n), room(LENGTH, BLOCK_BYTES), PATIENT_US) for n in range(NUM_CHAINS)]
        assert LENGTH in hits
        assert store.counters().num_corrupted == 0


@pytest.mark.slow
def test_an_owner_is_killed_at_any_moment(place: Place) -> None:
    """No wrong byte, and nobody waits: 20 times, while it puts and others read."""
    dice, hits_while_alive = random.Random(7), 0
    with store_at(place.reading_spec, BLOCK_BYTES) as store:
        for moment in range(20):
            numbers = range(moment * NUM_CHAINS, (moment + 1) * NUM_CHAINS)  # of this owner alone
            with putting(place.spec, seed=moment, first=numbers[0]) as owner:
                for _ in range(dice.randrange(1, 60)):
                    hits_while_alive += num_right(store, dice.choice(numbers))
                owner.kill()
                for number in numbers:
                    num_right(store, number)
        c = store.counters()
        assert hits_while_alive > 20 * LENGTH
        assert c.num_asked == c.num_hits + c.num_misses + c.num_behind_a_miss


def test_processes_that_fill_a_directory_never_exceed_it(tmp_path: Path) -> None:
    """They evict one another's blocks meanwhile, and none is ever wrong."""
    capacity_bytes = 20 * (HEADER_BYTES + BLOCK_BYTES)  # of the 60 blocks that they put
    spec = f"dir:{tmp_path}?bytes={capacity_bytes}"
    with (
        putting(spec, 1, rounds="150") as one,
        putting(spec, 2, rounds="150") as two,
        store_at(spec, BLOCK_BYTES) as store,
    ):
        most_bytes, number = 0, 0
        while one.poll() is None or two.poll() is None:
            most_bytes = max(most_bytes, bytes_in(tmp_path))
            num_right(store, number := (number + 1) % NUM_CHAINS)
        assert one.returncode == two.returncode == 0
        assert capacity_bytes / 2 < most_bytes <= capacity_bytes
        assert not store.counters().num_corrupted + store.counters().num_foreign


def bytes_in(folder: Path) -> int:
    """Of all blocks, whole or half written, of a moment or of two."""
    sizes = []
    for path in folder.glob("*/*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return sum(sizes)


def test_the_dead_leave_no_room_behind(tmp_path: Path) -> None:
    """Half a file of a process that was killed is removed by the next count, and its room is found again."""
    place = DirectoryPlace(tmp_path)
    with store_at(place.spec, BLOCK_BYTES) as store:
        store.put(chain(0), [[right(key)] for key in chain(0)], PATIENT_US)
    left = tmp_path / name_of(chain(0)[0]).partition("/")[0] / ".1-0.part"
    left.write_bytes(bytes(1000))
    capacity_bytes = LENGTH * (HEADER_BYTES + BLOCK_BYTES)
    with store_at(f"dir:{tmp_path}?bytes={capacity_bytes}", BLOCK_BYTES) as store:
        assert not left.exists()
        assert num_right(store, 0) == LENGTH
