"""Ranges of addresses and the physical pages that are mapped into them: one small interface, one file a device.

    range 0    |  0  |  1  |  2  |  3  |  4  |  ...       addresses: positions of one page each, most of them empty
                  |     |     \\                           mapping: position 2 shows page 7
    pages 0    |  0  |  1  | ... |  7  | ...              physical memory, as much as there is KV

All ranges are mapped alike, each to pages of its own: position p of every range shows page b of its own. A page may be
shown at several positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Geometry(NamedTuple):
    """What virtual memory is made for.

    Attributes:
        num_ranges: of addresses.
        num_positions: of pages, in a range.
        num_pages: physical ones, of each range.
        page_bytes: a multiple of what the device maps at once.
    """

    num_ranges: int
    num_positions: int
    num_pages: int
    page_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of physical memory."""
        return self.num_ranges * self.num_pages * self.page_bytes

    @property
    def address_bytes(self) -> int:
        """Of addresses."""
        return self.num_ranges * self.num_positions * self.page_bytes


class VirtualMemory(Protocol):
    """Memory of a device. It is gone when nobody has it, nor a tensor of its ranges, any more.

    Attributes:
        ranges: bytes, one tensor each. Whoever touches a position that shows no page may end the process.
        fresh_is_zero: pages that nobody wrote to are zero; else they hold anything.
        num_map_calls, num_unmap_calls: of the system or the driver, so far.
    """

    ranges: Sequence[Tensor]
    fresh_is_zero: bool
    num_map_calls: int
    num_unmap_calls: int

    def map(self, position: int, page: int, count: int) -> None:
        """Positions [position, position + count) of every range show pages [page, page + count), whatever they showed.

        Raises:
            ConfigError: the system has no more room for mappings.
        """
        ...

    def unmap(self, position: int, count: int) -> None:
        """Positions [position, position + count), all of which show something, show nothing."""
        ...


class Shown:
    """Which positions show something, for devices that want to be asked to unmap before they map anew."""

    def __init__(self, num_positions: int) -> None:
        self._is_shown = bytearray(num_positions)

    def put(self, position: int) -> bool:
        """Whether it shows something already."""
        before, self._is_shown[position] = bool(self._is_shown[position]), 1
        return before

    def positions(self) -> list[int]:
        """That show something, in order."""
        return [position for position, shown in enumerate(self._is_shown) if shown]

    def take(self, position: int) -> None:
        assert self._is_shown[position], f"position {position} shows nothing"
        self._is_shown[position] = 0
