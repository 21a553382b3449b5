"""`npu::` and `atb::` operators of torch_npu on the fake device, computed by references in plain torch.

A reference is a function of the operator's arguments (CPU tensors over device memory) that returns its results or
writes into its arguments. Shapes come from the wheel's own meta kernels, so a reference that returns another shape or
type than Huawei's meta function says is an error. An operator without a reference keeps the wheel's kernel, which fails
loudly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import control, kernels

Reference = Callable[..., Any]


def _into_outputs(reference: Reference) -> Reference:
    """The `.out` form of a reference that returns new tensors."""

    def write(*args: Any, workspace: torch.Tensor | None = None, out: list[torch.Tensor], **kwargs: Any) -> None:
        results = reference(*args, **kwargs)
        kernels._store(results, list(out) if isinstance(out, (list, tuple)) else [out], reference.__name__)

    return write


def install(references: Mapping[str, Reference], shapes: Mapping[str, Reference] | None = None) -> None:
    """Registers references by operator name: `npu_rms_norm`, `atb::_npu_paged_attention`, `npu_x.out`.

    The namespace is `npu::` unless given. The `.out` overload of an operator uses its reference too, unless it has one
    of its own. `shapes` gives results as meta tensors for operators whose wheel has no meta kernel.
    """
    for name, reference in references.items():
        full = name if "::" in name else f"npu::{name}"
        op = kernels.find_op(full)
        kernels.register(full, kernels.Kernel(op, compute=reference, shapes=(shapes or {}).get(name)))
        packet = getattr(getattr(torch.ops, full.partition("::")[0]), full.partition("::")[2].partition(".")[0])
        if "." not in full and "out" in packet.overloads() and f"{name}.out" not in references:
            kernels.register(f"{full}.out", kernels.Kernel(packet.out, compute=_into_outputs(reference)))


def all_gather(group: str, tensor: torch.Tensor) -> torch.Tensor:
    """Inside a reference: every rank's `tensor` (same shape), stacked in the order of ranks of communicator `group`."""
    import ctypes

    own = tensor.contiguous()
    gathered = torch.empty((control.group_size(group), *own.shape), dtype=own.dtype)
    call = control.hccl().fake_hccl_all_gather
    call.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    error = call(group.encode(), own.data_ptr(), gathered.data_ptr(), own.numel() * own.element_size())
    if error:
        raise RuntimeError(f"collective on {group!r} failed with HCCL error {error}")
    return gathered
