"""How long a store takes: calls timed by size, and two constants for each operation, which a simulator can use.

    us = latency_us + bytes / bytes_per_s

A call's bytes are those of all its blocks. Asking for a block that is not there costs a latency of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from xllm_lab.errors import ConfigError
from xllm_lab.store.block_store import BlockStore, Parts
from xllm_lab.store.lanes import now_us

_PATIENCE_US: Final = 10_000_000


class StoreSample(NamedTuple):
    """One call: what it did, with how many blocks and bytes of payload, and how long it took."""

    operation: str
    num_blocks: int
    num_bytes: int
    us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTime:
    """What a call costs.

    Attributes:
        latency_us: whatever its size.
        bytes_per_s: infinite where size does not tell.
    """

    latency_us: float
    bytes_per_s: float

    def us(self, num_bytes: float) -> float:
        """Of a call with so many bytes."""
        return self.latency_us + num_bytes / self.bytes_per_s * 1e6


def fit_link_time(samples: Iterable[tuple[float, float]]) -> LinkTime:
    """Latency and rate, neither below 0, of (bytes, microseconds) measured.

    The median of each size counts, so that a disk that stalls once is no rate; and relative errors, so that the
    smallest calls say what a call costs, where sizes span several powers of ten.

    Raises:
        ConfigError: fewer than two sizes, or a time that is not above 0.
    """
    from scipy.optimize import nnls

    by_size: dict[float, list[float]] = {}
    for size, took_us in samples:
        if not took_us > 0:
            raise ConfigError(f"a call of {size:g} bytes took {took_us:g} us; times above 0 are accepted")
        by_size.setdefault(size, []).append(took_us)
    if len(by_size) < 2:
        raise ConfigError(f"a link's time is fitted to calls of {len(by_size)} sizes; at least 2 are accepted")
    num_bytes = np.array(sorted(by_size), dtype=np.float64)
    us = np.array([np.median(by_size[size]) for size in sorted(by_size)])
    factors = np.stack([np.ones_like(num_bytes), num_bytes], axis=1)
    weights, _ = nnls(factors / us[:, None], np.ones_like(us))
    latency_us, us_per_byte = (float(w) for w in weights)
    return LinkTime(latency_us=latency_us, bytes_per_s=1e6 / us_per_byte if us_per_byte > 0 else math.inf)


def fit_store_times(samples: Sequence[StoreSample]) -> dict[str, LinkTime]:
    """By operation; of `probe`, which moves no block, the bytes are those it asks about."""
    names = sorted({sample.operation for sample in samples})
    return {name: fit_link_time((s.num_bytes, s.us) for s in samples if s.operation == name) for name in names}


def time_store(
    opened: Callable[[int], BlockStore], *, sizes: Sequence[int], batches: Sequence[int], repeats: int
) -> Iterator[StoreSample]:
    """Time puts, gets and probes of random blocks that nobody has put before.

    Args:
        opened: the store, for blocks of so many bytes.
        sizes: of a block, in bytes.
        batches: blocks a call.

    Raises:
        ConfigError: a block does not come back; no time is known then.
    """
    for block_bytes in sizes:
        with opened(block_bytes) as store:
            for num_blocks in batches:
                blocks: list[Parts] = [[np.frombuffer(os.urandom(block_bytes), np.uint8)] for _ in range(num_blocks)]
                room: list[Parts] = [[np.zeros(block_bytes, np.uint8)] for _ in range(num_blocks)]
                list(_timed(store, blocks, room))  # the store's memory is touched for the first time
                for _ in range(repeats):
                    yield from _timed(store, blocks, room)


def _timed(store: BlockStore, blocks: Sequence[Parts], room: Sequence[Parts]) -> Iterator[StoreSample]:
    """Each operation once, under keys of their own."""
    keys = [os.urandom(16) for _ in blocks]
    calls: dict[str, Callable[[], int]] = {
        "put": lambda: store.put(keys, blocks, _PATIENCE_US),
        "probe": lambda: store.num_leading(keys, _PATIENCE_US),
        "get": lambda: store.get_into(keys, room, _PATIENCE_US),
    }
    for operation, call in calls.items():
        started_us = now_us()
        num_done = call()
        took_us = max(1, now_us() - started_us)
        if num_done != len(keys):
            raise ConfigError(
                f"{store.described}: {operation} of {len(keys)} blocks of {store.block_bytes} bytes did {num_done} "
                f"({store.counters()}); a store with room for them is expected"
            )
        yield StoreSample(operation, len(keys), len(keys) * store.block_bytes, took_us)
