"""Virtual memory of a CPU: one file in memory, mapped into reserved addresses over what was there (Linux)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from xllm_lab.engine.device.virtual_memory import Geometry
from xllm_lab.errors import ConfigError

PAGE_BYTES = mmap.PAGESIZE
_MOST_MAPPINGS = Path("/proc/sys/vm/max_map_count")
# Of <sys/mman.h> on Linux; Python has no names for them.
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value


def is_there() -> bool:
    """Whether this system can."""
    return hasattr(os, "memfd_create") and hasattr(mmap, "MAP_POPULATE")


class CpuPages:
    """A `VirtualMemory`. A run of pages is one call for each range, which brings their contents into the page table.

    Without that, a step would be interrupted at the first touch of every 4 KiB of a page mapped ahead.

    Raises:
        ConfigError: more pages than the system may map one by one, or no memory.
    """

    fresh_is_zero = True

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self.num_map_calls = self.num_unmap_calls = 0
        _refuse_too_many(geometry)
        self._libc = ctypes.CDLL(None, use_errno=True)
        address, length = ctypes.c_void_p, ctypes.c_size_t
        self._mmap = self._libc.mmap
        self._mmap.restype = address
        self._mmap.argtypes = (address, length, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
        self._libc.mprotect.argtypes = (address, length, ctypes.c_int)
        self._file = os.memfd_create("xllm_lab_kv", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        try:
            os.posix_fallocate(self._file, 0, geometry.num_bytes)
            self.ranges: Sequence[torch.Tensor] = [self._reserved() for _ in range(geometry.num_ranges)]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"virtual KV takes {geometry.num_bytes} bytes and {geometry.address_bytes} bytes of addresses, which "
                f"the system does not give: {getattr(error, 'strerror', None) or error}; accepted: fewer "
                "num_kv_blocks, or a shorter max_model_len"
            ) from None
        self._starts = tuple(one.data_ptr() for one in self.ranges)

    def map(self, position: int, page: int, count: int) -> None:
        g = self._geometry
        at, length, pages_bytes = position * g.page_bytes, count * g.page_bytes, g.num_pages * g.page_bytes
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED | _MAP_FIXED | mmap.MAP_POPULATE
        offset = page * g.page_bytes
        for start in self._starts:
            if self._mmap(start + at, length, protection, flags, self._file, offset) == _FAILED:
                raise self._refusal()
            offset += pages_bytes
        self.num_map_calls += len(self._starts)

    def unmap(self, position: int, count: int) -> None:
        at, length = position * self._geometry.page_bytes, count * self._geometry.page_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        for start in self._starts:
            # Not munmap: the addresses stay ours.
            if self._mmap(start + at, length, 0, flags, -1, 0) == _FAILED:
                raise self._refusal()
        self.num_unmap_calls += len(self._starts)

    def _reserved(self) -> torch.Tensor:
        """Addresses without memory; the mapping goes when no tensor of it is left."""
        num_bytes = self._geometry.num_positions * self._geometry.page_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        found = torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.uint8)
        if self._libc.mprotect(found.data_ptr(), num_bytes, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return found

    def _refusal(self) -> ConfigError:
        number = ctypes.get_errno()
        if number != errno.ENOMEM:
            return ConfigError(f"virtual KV: a page is not mapped: {os.strerror(number)}")
        return ConfigError(
            f"virtual KV: this process has as many mappings as the system accepts, {_most_mappings()}; accepted: fewer "
            "num_kv_blocks, a larger block_size, or a larger vm.max_map_count (sysctl)"
        )


def _refuse_too_many(geometry: Geometry) -> None:
    """Scattered over a range, each page is a mapping of its own."""
    most = _most_mappings()
    if most is not None and geometry.num_ranges * geometry.num_pages > most:
        raise ConfigError(
            f"virtual KV of {geometry.num_pages} blocks may take {geometry.num_ranges * geometry.num_pages} mappings, "
            f"one for each layer's keys and values of each; the system accepts {most} (vm.max_map_count); accepted: at "
            f"most {most // geometry.num_ranges} blocks, so perhaps larger ones"
        )


def _most_mappings() -> int | None:
    try:
        return int(_MOST_MAPPINGS.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
