"""Virtual memory of NPUs by AscendCL (`acl_rt.h` of CANN 8.3, as shipped in torch_npu 2.13.0)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from xllm_lab.engine.device.driver_pages import Driver
from xllm_lab.errors import ConfigError

_HUGE_PAGES = 1  # flag of `aclrtReserveMemAddress`, as torch_npu passes for its expandable segments
_HBM_HUGE, _ON_DEVICE, _MINIMUM = 4, 1, 0  # ACL_HBM_MEM_HUGE, ACL_MEM_LOCATION_TYPE_DEVICE, ..._GRANULARITY_MINIMUM


class _PhysicalMemory(ctypes.Structure):
    """`aclrtPhysicalMemProp`."""

    _fields_ = (
        ("handle_type", ctypes.c_int),
        ("allocation_type", ctypes.c_int),
        ("attribute", ctypes.c_int),
        ("location_id", ctypes.c_uint32),
        ("location_type", ctypes.c_int),
        ("reserved", ctypes.c_uint64),
    )


def page_bytes(index: int) -> int:
    """What the device maps at once."""
    found = ctypes.c_size_t()
    _call("aclrtMemGetAllocationGranularity", ctypes.byref(_kind(index)), _MINIMUM, ctypes.byref(found))
    return found.value


def driver(index: int) -> Driver:
    """The calls, for one device of this process."""
    kind, pointer, size, flags = _kind(index), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64

    def reserve(num_bytes: int) -> int:
        start = pointer()
        _call("aclrtReserveMemAddress", ctypes.byref(start), size(num_bytes), size(0), None, flags(_HUGE_PAGES))
        return start.value or 0

    def create(num_bytes: int) -> int:
        handle = pointer()
        _call("aclrtMallocPhysical", ctypes.byref(handle), size(num_bytes), ctypes.byref(kind), flags(0))
        return handle.value or 0

    return Driver(
        reserve=reserve,
        release=lambda start, _: _call("aclrtReleaseMemAddress", pointer(start)),
        create=create,
        destroy=lambda handle: _call("aclrtFreePhysical", pointer(handle)),
        map=lambda at, num_bytes, handle: _call(
            "aclrtMapMem", pointer(at), size(num_bytes), size(0), pointer(handle), flags(0)
        ),
        unmap=lambda at, _: _call("aclrtUnmapMem", pointer(at)),
    )


def _kind(index: int) -> _PhysicalMemory:
    return _PhysicalMemory(0, 0, _HBM_HUGE, index, _ON_DEVICE, 0)


def _call(name: str, *arguments: Any) -> None:
    error = getattr(_library(), name)(*arguments)
    if error:
        raise ConfigError(f"virtual KV: {name} fails with ACL error {error}; accepted: fewer num_kv_blocks, or 'paged'")


@functools.cache
def _library() -> ctypes.CDLL:
    """The one that torch_npu has loaded."""
    return ctypes.CDLL("libascendcl.so")
