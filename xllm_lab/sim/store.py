"""A store of KV blocks in simulated time, which all instances of a run share.

    instance 0    asked |--- in its queue ---|--- at the store: one of its channels ---| end
    instance 1              asked |--------- waits for a channel ---------|------------| end

What is given is there when its copy ends, and can be found by copies that begin then. When a copy is asked for, it is
decided when it begins and what it finds: what others, asked for later, give before it begins is not found.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from xllm_lab.errors import ConfigError
from xllm_lab.ledger import BlockKey
from xllm_lab.store_spec import number_of, options_of, size_of


class StoreRoom(NamedTuple):
    """How much a store holds, of all instances together; None: everything."""

    num_bytes: int | None


def store_room(spec: str) -> tuple[StoreRoom, float | None, float]:
    """What `sim:?bytes=20GiB&bytes_per_s=2e9&latency_us=300` says: room, rate or None, and latency.

    Raises:
        ConfigError: anything else; a latency without a rate.
    """
    accepted = "sim:?bytes=20GiB&bytes_per_s=2e9&latency_us=300, each of them or none"
    if spec.partition(":")[0] != "sim" or spec.partition(":")[2].partition("?")[0]:
        raise ConfigError(f"{spec!r} names no simulated store; accepted is {accepted}")
    options = options_of(spec)
    room = size_of(spec, options, "bytes", 0) or None
    rate = number_of(spec, options, "bytes_per_s", None)
    latency_us = number_of(spec, options, "latency_us", None)
    for name in options:
        raise ConfigError(f"{spec!r}: {name!r} is no option of a simulated store; accepted is {accepted}")
    if rate is None and latency_us is not None:
        raise ConfigError(f"{spec!r}: latency_us without bytes_per_s; accepted is {accepted}")
    return StoreRoom(room), rate, latency_us or 0.0


class SimulatedStore:
    """Blocks by key, of which those used least recently give way.

    Args:
        num_blocks: it has room for; None: for all.
        num_channels: copies at a time; further ones wait.

    Raises:
        ConfigError: room for no block, or no channel.
    """

    def __init__(self, num_blocks: int | None = None, *, num_channels: int = 2) -> None:
        if num_channels < 1 or (num_blocks is not None and num_blocks < 1):
            raise ConfigError(
                f"a store of {num_blocks} blocks with {num_channels} channels; accepted: at least 1 of each"
            )
        self._num_blocks = num_blocks
        self._there: OrderedDict[BlockKey, tuple[int, object]] = OrderedDict()  # from when on, and who gave it
        self._free_us = [0] * num_channels  # a heap

    def __len__(self) -> int:
        return len(self._there)

    def begins_us(self, ready_us: int) -> int:
        """When the channel that is free first can serve a copy; it is taken until `ends`."""
        return max(ready_us, heapq.heappop(self._free_us))

    def ends(self, end_us: int) -> None:
        """The copy that began last ends then."""
        heapq.heappush(self._free_us, end_us)

    def put(self, keys: Sequence[BlockKey], end_us: int, *, owner: object) -> None:
        """Blocks are there from then on, in order of their tokens: their beginnings are kept longest."""
        for key in reversed(keys):
            there = self._there.get(key)
            if there is None or there[0] > end_us:
                self._there[key] = end_us, owner
            self._there.move_to_end(key)
        while self._num_blocks is not None and len(self._there) > self._num_blocks:
            self._there.popitem(last=False)

    def num_leading(self, keys: Sequence[BlockKey], now_us: int) -> int:
        """How many of the first blocks are there; they are used."""
        found = 0
        while found < len(keys) and keys[found] in self._there and self._there[keys[found]][0] <= now_us:
            found += 1
        for key in reversed(keys[:found]):
            self._there.move_to_end(key)
        return found

    def forget(self, owner: object, now_us: int) -> None:
        """What it was giving is not there, and never will be."""
        unfinished = [key for key, (end_us, by) in self._there.items() if by is owner and end_us > now_us]
        for key in unfinished:
            del self._there[key]
