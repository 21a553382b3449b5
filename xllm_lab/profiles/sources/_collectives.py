"""Which kernels carry out a collective, and which of them say the same thing twice.

HCCL reports a collective as an operation, `hcom_allReduce__503_96_4` of type `hcom_allReduce_` (503: end of the
communicator's hash, 96: its number, 4: iteration), and the kernel that carries it out a second time on its own stream:
`AivKernel`, of the operation's type, or `allreduceAicpuKernel`. The operation's row is the one to trust.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from xllm_lab.operator_table import Shapes

_OPERATION = re.compile(r"(?:hcom_|Hccl)([A-Za-z]+)")
_GROUP = re.compile(r"hcom_[A-Za-z]+_(?:[A-Za-z]*_)?(\d+)_\d+_\d+")
_KERNEL = re.compile(r"(\w*?)_?(?:Aiv|Aicpu)Kernel(?:_\d+)?")
_NAMES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "allgatherv": "all_gather_v",
    "reducescatter": "reduce_scatter",
    "reducescatterv": "reduce_scatter_v",
    "alltoall": "all_to_all",
    "alltoallv": "all_to_all_v",
    "alltoallvc": "all_to_all_vc",
    "batchsendrecv": "batch_send_recv",
}
# HCCL's and CANN's names of types; CANN writes DT_BF16 as well as BF16.
_BYTES = {
    **dict.fromkeys(("INT8", "UINT8", "BOOL", "HIFLOAT8", "FLOAT8_E4M3FN", "FLOAT8_E5M2"), 1),
    **dict.fromkeys(("FLOAT16", "FP16", "BF16", "BFP16", "INT16", "UINT16"), 2),
    **dict.fromkeys(("FLOAT", "FLOAT32", "FP32", "INT32", "UINT32"), 4),
    **dict.fromkeys(("INT64", "UINT64", "DOUBLE", "FLOAT64", "FP64"), 8),
}


class Collective(NamedTuple):
    """What a kernel's row says about the collective that it is, or carries out.

    Attributes:
        name: of the collective; "" if the row does not say which one it carries out.
        group: digits that tell communicators apart; "" if there are none.
        is_operation: whether this is the row to trust.
    """

    name: str
    group: str
    is_operation: bool


def collective_of(name: str, type: str) -> Collective | None:
    """What a kernel of this name and type has to do with collectives; None for nothing."""
    if operation := _OPERATION.match(name):
        group = _GROUP.fullmatch(name)
        return Collective(collective_name(operation[1]), group[1] if group else "", True)
    operation = _OPERATION.match(type)
    kernel = _KERNEL.fullmatch(name) or _KERNEL.fullmatch(type)
    if kernel:
        return Collective(collective_name(operation[1] if operation else kernel[1]), "", False)
    return Collective(collective_name(operation[1]), "", True) if operation else None


def collective_name(written: str) -> str:
    """`allReduce`, `allreduce` and `all_reduce` as `all_reduce`."""
    plain = written.lower().replace("_", "")
    return _NAMES.get(plain, plain)


def message_bytes(shapes: Shapes | None, dtypes: str) -> int | None:
    """Bytes of the inputs; None where a shape or a type is not told."""
    types = [dtype.strip().removeprefix("DT_") for dtype in dtypes.split(";")]
    if shapes is None or len(types) != len(shapes) or not all(dtype in _BYTES for dtype in types):
        return None
    return sum(math.prod(shape) * _BYTES[dtype] for shape, dtype in zip(shapes, types, strict=True))
