"""A tensor over memory of a device that torch did not allocate, handed over as DLPack (version 0.8 of its header)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

# `DLDeviceType`: torch takes devices of other makers, as NPUs are, under the last one.
_KINDS = {"cpu": 1, "cuda": 2, "npu": 12}
_UNSIGNED_INTEGER = 1


class _DlDevice(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DlDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DlTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DlDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DlDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DlManagedTensor(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DlManagedTensor))
_DlManagedTensor._fields_ = (("tensor", _DlTensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))

# What tensors that are alive stand on, by the address of their description.
_alive: dict[int, tuple[Any, ...]] = {}


def _forget(managed: Any) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


_DELETE = _DELETER(_forget)


def bytes_at(address: int, num_bytes: int, device: torch.device, owner: object) -> Tensor:
    """`num_bytes` bytes as a tensor, which keeps `owner` alive."""
    shape = (ctypes.c_int64 * 1)(num_bytes)
    stride = (ctypes.c_int64 * 1)(1)
    managed = _DlManagedTensor()
    managed.tensor.data = address
    managed.tensor.device = _DlDevice(_KINDS[device.type], device.index or 0)
    managed.tensor.ndim = 1
    managed.tensor.dtype = _DlDataType(_UNSIGNED_INTEGER, 8, 1)
    managed.tensor.shape, managed.tensor.strides = shape, stride
    managed.deleter = _DELETE
    _alive[ctypes.addressof(managed)] = (managed, shape, stride, owner)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = new_capsule(ctypes.addressof(managed), b"dltensor", None)
    made: Tensor = torch.utils.dlpack.from_dlpack(capsule)
    return made
