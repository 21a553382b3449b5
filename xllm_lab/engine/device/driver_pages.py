"""Virtual memory by a driver whose handles are mapped whole: each page of each range is a handle, and a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from xllm_lab.engine.device.foreign_tensor import bytes_at
from xllm_lab.engine.device.virtual_memory import Geometry, Shown

Handle = int


class Driver(NamedTuple):
    """The calls of a driver; each raises ConfigError if it fails.

    Attributes:
        reserve: addresses for so many bytes -> where they start.
        release: addresses, by their start and bytes.
        create: physical memory of so many bytes.
        destroy: physical memory, once it is mapped nowhere.
        map: (address, bytes, handle), and makes it readable and writable.
        unmap: (address, bytes), as they were mapped.
    """

    reserve: Callable[[int], int]
    release: Callable[[int, int], None]
    create: Callable[[int], Handle]
    destroy: Callable[[Handle], None]
    map: Callable[[int, int, Handle], None]
    unmap: Callable[[int, int], None]


class _Owned:
    """What has to be given back, in this order: mappings, physical memory, addresses."""

    def __init__(self, driver: Driver, geometry: Geometry) -> None:
        self.driver, self.geometry = driver, geometry
        self.starts: list[int] = []
        self.handles: list[list[Handle]] = []
        self.shown = Shown(geometry.num_positions)
        given_back = weakref.finalize(self, _give_back, driver, geometry, self.starts, self.handles, self.shown)
        given_back.atexit = False  # the driver is gone by then


class DriverPages:
    """A `VirtualMemory`.

    Raises:
        ConfigError: the driver does not give as much.
    """

    fresh_is_zero = False

    def __init__(self, geometry: Geometry, driver: Driver, device: torch.device) -> None:
        self.num_map_calls = self.num_unmap_calls = 0
        self._owned = owned = _Owned(driver, geometry)
        self._bytes = geometry.page_bytes
        range_bytes = geometry.num_positions * self._bytes
        for _ in range(geometry.num_ranges):
            owned.starts.append(driver.reserve(range_bytes))
            owned.handles.append([])
            for _ in range(geometry.num_pages):
                owned.handles[-1].append(driver.create(self._bytes))
        self.ranges: Sequence[torch.Tensor] = [bytes_at(start, range_bytes, device, owned) for start in owned.starts]

    def map(self, position: int, page: int, count: int) -> None:
        owned = self._owned
        for k in range(count):
            if owned.shown.put(position + k):
                self._unmap(position + k)
            for start, handles in zip(owned.starts, owned.handles, strict=True):
                owned.driver.map(start + (position + k) * self._bytes, self._bytes, handles[page + k])
                self.num_map_calls += 1

    def unmap(self, position: int, count: int) -> None:
        for k in range(count):
            self._owned.shown.take(position + k)
            self._unmap(position + k)

    def _unmap(self, position: int) -> None:
        for start in self._owned.starts:
            self._owned.driver.unmap(start + position * self._bytes, self._bytes)
            self.num_unmap_calls += 1


def _give_back(
    driver: Driver, geometry: Geometry, starts: Sequence[int], handles: Sequence[Sequence[Handle]], shown: Shown
) -> None:
    for start in starts:
        for position in shown.positions():
            driver.unmap(start + position * geometry.page_bytes, geometry.page_bytes)
    for one in (handle for of_range in handles for handle in of_range):
        driver.destroy(one)
    for start in starts:
        driver.release(start, geometry.num_positions * geometry.page_bytes)
