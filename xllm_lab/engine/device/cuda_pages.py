"""Virtual memory of NVIDIA GPUs by the CUDA driver ("Virtual Memory Management", CUDA Driver API 12).

Written from its documentation; it has not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from xllm_lab.engine.device.driver_pages import Driver
from xllm_lab.errors import ConfigError

_PINNED, _ON_DEVICE, _MINIMUM, _READ_WRITE = 1, 1, 0, 3


class _Properties(ctypes.Structure):
    """`CUmemAllocationProp`: type, handle types, location, security attributes, flags."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("security", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """`CUmemAccessDesc`."""

    _fields_ = (("location_type", ctypes.c_int), ("location_id", ctypes.c_int), ("flags", ctypes.c_int))


def page_bytes(index: int) -> int:
    """What the device maps at once."""
    found, kind = ctypes.c_size_t(), _kind(index)
    _call("cuMemGetAllocationGranularity", ctypes.byref(found), ctypes.byref(kind), _MINIMUM)
    return found.value


def driver(index: int) -> Driver:
    """The calls, for one device of this process."""
    number, size, none = ctypes.c_ulonglong, ctypes.c_size_t, ctypes.c_ulonglong(0)
    kind, access = _kind(index), _Access(_ON_DEVICE, index, _READ_WRITE)

    def reserve(num_bytes: int) -> int:
        start = number()
        _call("cuMemAddressReserve", ctypes.byref(start), size(num_bytes), size(0), none, none)
        return start.value

    def create(num_bytes: int) -> int:
        handle = number()
        _call("cuMemCreate", ctypes.byref(handle), size(num_bytes), ctypes.byref(kind), none)
        return handle.value

    def show(at: int, num_bytes: int, handle: int) -> None:
        _call("cuMemMap", number(at), size(num_bytes), size(0), number(handle), none)
        _call("cuMemSetAccess", number(at), size(num_bytes), ctypes.byref(access), size(1))

    return Driver(
        reserve=reserve,
        release=lambda start, num_bytes: _call("cuMemAddressFree", number(start), size(num_bytes)),
        create=create,
        destroy=lambda handle: _call("cuMemRelease", number(handle)),
        map=show,
        unmap=lambda at, num_bytes: _call("cuMemUnmap", number(at), size(num_bytes)),
    )


def _kind(index: int) -> _Properties:
    return _Properties(kind=_PINNED, location_type=_ON_DEVICE, location_id=index)


def _call(name: str, *arguments: Any) -> None:
    error = getattr(_library(), name)(*arguments)
    if error:
        raise ConfigError(f"virtual KV: {name} fails with CUDA error {error}; accepted: fewer num_kv_blocks, 'paged'")


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
