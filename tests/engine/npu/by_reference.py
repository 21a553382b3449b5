"""The operators of torch_npu where there is none: each is its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xllm_lab.engine.ops.npu import calls  # noqa: F401  (declares the operators)
from xllm_lab.engine.ops.npu.operators import OPERATORS


class References:
    """In the place of `torch.ops.npu`: each operator is its reference, whatever its overload."""

    def __getattr__(self, packet: str) -> Any:
        found = [o for o in OPERATORS.values() if o.name.partition(".")[0] == packet]
        return _Packet({o.name.partition(".")[2] or "__call__": o.reference for o in found})


class _Packet:
    def __init__(self, overloads: dict[str, Callable[..., Any]]) -> None:
        self._overloads = overloads

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._overloads["__call__"](*arguments, **named)

    def __getattr__(self, overload: str) -> Any:
        return self._overloads[overload]
