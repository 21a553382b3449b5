"""Which implementation serves which operator: one table, read once when a model is built.

    op -> device -> implementations, the preferred one first

`choose` walks each row until one says that it can serve, and keeps what the others said.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from xllm_lab.engine.ops import experts, latent, native, reference
from xllm_lab.engine.ops.batch import PagedBatch
from xllm_lab.engine.ops.build import NotBuiltError
from xllm_lab.engine.ops.collectives import Group
from xllm_lab.engine.ops.experts import (
    EachLinear,
    Exchange,
    GroupedLinear,
    GroupedMmLinear,
    Permuted,
    Routes,
    Routing,
    grouped_mm_fails,
    loop_linear,
)
from xllm_lab.engine.ops.gpu import serving as gpu
from xllm_lab.engine.ops.linear import Linear, OneDnnLinear, TorchLinear, onednn_fails
from xllm_lab.engine.ops.npu import operators as npu_operators
from xllm_lab.engine.ops.npu import serving as npu
from xllm_lab.engine.ops.tape import reads_host, taped
from xllm_lab.errors import ConfigError

_PLAIN = {"cpu": ("native", "torch"), "cuda": ("torch",), "npu": ("torch_npu",)}
_ROWWISE = {**_PLAIN, "cuda": ("triton", "torch")}
_TORCH = {"cpu": ("torch",), "cuda": ("torch",), "npu": ("torch",)}
TABLE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "linear": {"cpu": ("native", "onednn", "torch"), "cuda": ("torch",), "npu": ("torch",)},
    "paged_attention": {**_ROWWISE, "npu": ("torch_npu", "torch")},
    "reshape_and_cache": _ROWWISE,
    "rms_norm": _ROWWISE,
    "add_rms_norm": _ROWWISE,
    "head_norm": _ROWWISE,
    "rope_angles": _PLAIN,
    "rope": _ROWWISE,
    "swiglu": _ROWWISE,
    "argmax": _PLAIN,
    "all_reduce": {"cpu": ("gloo", "torch"), "cuda": ("nccl", "torch"), "npu": ("hccl", "torch")},
    "route": {**_TORCH, "npu": ("torch_npu", "torch")},
    "permute": {**_TORCH, "npu": ("torch_npu", "torch")},
    "grouped_matmul": {
        "cpu": ("native", "grouped_mm", "torch"),
        "cuda": ("grouped_mm", "torch"),
        "npu": ("torch_npu", "torch"),
    },
    "unpermute": {**_TORCH, "npu": ("torch_npu", "torch")},
    "exchange": {"cpu": ("gloo",), "cuda": ("nccl",), "npu": ("torch_npu", "hccl")},
    "latent_query": _TORCH,
    "cache_latent": _TORCH,
    "head_linear": _TORCH,
}
_MADE_APART = ("all_reduce", "grouped_matmul", "exchange")
OF_EXPERTS = ("route", "permute", "grouped_matmul", "unpermute")
OF_LATENTS = ("latent_query", "cache_latent", "head_linear")


@dataclass(frozen=True, slots=True)
class Served:
    """What serves an operator.

    Attributes:
        by: the implementation's name in `TABLE`.
        instead_of: those before it in the table, with what each said against itself.
    """

    by: str
    instead_of: Mapping[str, str] = field(default_factory=dict)


class PagedAttention(Protocol):
    """See `reference.paged_attention`."""

    def __call__(
        self,
        q_TNH: Tensor,
        k_BPKH: Tensor,
        v_BPKH: Tensor,
        batch: PagedBatch,
        out_TNH: Tensor,
        *,
        scale: float | None = None,
    ) -> None: ...


class ExpertOps(NamedTuple):
    """See `experts`; `grouped_matmul` makes a layer over weights [E, O, I].

    Attributes:
        exchange: rows to other ranks' experts and back in kernels of their own; None: by collectives.
        skips_padding: tokens that only pad may be nobody's; else they are routed like any other, and do no harm.
    """

    route: Callable[[Tensor, Tensor | None, Routing, Tensor | None, Routes], Routes]
    permute: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Permuted]
    grouped_matmul: Callable[[Tensor], GroupedLinear]
    unpermute: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]
    permute_own: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Permuted]
    count_rows: Callable[[Tensor, Tensor | None, Tensor], None]
    exchange: Exchange | None
    skips_padding: bool


class LatentOps(NamedTuple):
    """See `latent`."""

    latent_query: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    cache_latent: Callable[[Tensor, Tensor, Tensor, PagedBatch], None]
    head_linear: Callable[[Tensor, Tensor, Tensor], None]


class ExpertShape(NamedTuple):
    """Of a layer's experts.

    Attributes:
        routing: how tokens find them.
        hidden_size, intermediate_size: of each.
    """

    routing: Routing
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """The operators of one device and dtype; what each does is told in `reference`. A rank that is alone has nobody to
    reduce with: its `all_reduce` does nothing, and nobody serves it.

    Attributes:
        experts: those of `experts`, if the model has some.
        latents: those of `latent`, if its attention is.
        served: which implementation each one is.
    """

    rms_norm: Callable[[Tensor, Tensor, float, Tensor], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]]
    head_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope_angles: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    reshape_and_cache: Callable[[Tensor, Tensor, Tensor, Tensor, PagedBatch], None]
    paged_attention: PagedAttention
    argmax: Callable[[Tensor], list[int]]
    all_reduce: Callable[[Tensor], None]
    experts: ExpertOps | None
    latents: LatentOps | None
    served: Mapping[str, Served]
    _dtype: torch.dtype
    _device: str
    _without: frozenset[str]

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, keep_rows: bool = False) -> Linear:
        """A layer over these weights, which it takes over; `keep_rows` if its `rows` will be called."""
        by = _pick("linear", self._device, _linear_fails(self._dtype, weight_OI.shape[1], self._without)).by
        if by == "native":
            return native.NativeLinear(native.load(), torch.get_num_threads(), weight_OI, bias_O)
        if by == "onednn":
            return OneDnnLinear(weight_OI, bias_O, keep_rows=keep_rows)
        return TorchLinear(weight_OI, bias_O)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Operators that something else than their first choice serves."""
        return tuple(op for op, served in self.served.items() if served.instead_of)


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int,
    hidden_size: int,
    expert_shape: ExpertShape | None = None,
    is_latent: bool = False,
    without: Sequence[str] = (),
    group: Group | None = None,
    exchanges: Group | None = None,
) -> Ops:
    """The best operators for a model here.

    Args:
        head_dim, hidden_size: of the model; some implementations take multiples of a vector's length only.
        expert_shape: of its experts; None: it has none.
        is_latent: whether its KV holds compressed vectors.
        without: implementations not to use, e.g. "native".
        group: who shares the model; None: nobody.
        exchanges: ranks whose experts get rows of tokens; None: nobody's do.

    Warns:
        Once a process, if the kernels could not be compiled.
    """
    left_out = frozenset(without)
    served: dict[str, Served] = {}
    for op in TABLE:
        if (op == "all_reduce" and group is None) or (op == "exchange" and exchanges is None):
            continue
        if (op in OF_EXPERTS and expert_shape is None) or (op in OF_LATENTS and not is_latent):
            continue
        if op == "linear":
            served[op] = _pick(op, device.type, _linear_fails(dtype, hidden_size, left_out))
        elif op == "grouped_matmul":
            assert expert_shape is not None
            served[op] = _pick(op, device.type, _grouped_fails(device, dtype, expert_shape, left_out))
        else:
            routing = None if expert_shape is None else expert_shape.routing
            served[op] = _pick(
                op, device.type, _op_fails(op, device, dtype, head_dim=head_dim, routing=routing, without=left_out)
            )
    makers: dict[str, Callable[[], object]] = {
        "native": lambda: native.NativeOps(native.load(), dtype, torch.get_num_threads()),
        "torch_npu": lambda: npu.NpuOps(device),
        "triton": lambda: gpu.operators(device),
        "torch": _References,
    }
    chosen = {op: s.by for op, s in served.items() if op not in (*_MADE_APART, "linear")}
    made: dict[str, Any] = {by: makers[by]() for by in set(chosen.values())}
    functions = {op: getattr(made[by], op) for op, by in chosen.items()}
    functions["all_reduce"] = _nothing if group is None else _all_reduce(served["all_reduce"].by, group)
    latents = LatentOps(*(functions.pop(op) for op in OF_LATENTS)) if is_latent else None
    of_experts = None
    if expert_shape is not None:
        functions["grouped_matmul"] = _GROUPED[served["grouped_matmul"].by]
        skips_padding = all(served[op].by != "torch_npu" for op in OF_EXPERTS)
        parts_of_experts: dict[str, Any] = {op: functions.pop(op) for op in OF_EXPERTS}
        fuses = exchanges is not None and served["exchange"].by == "torch_npu"
        parts_of_experts["exchange"] = npu.NpuExchange(exchanges) if exchanges is not None and fuses else None
        parts_of_experts["permute_own"] = made[chosen["permute"]].permute_own
        of_experts = ExpertOps(**parts_of_experts, count_rows=taped(experts.count_rows), skips_padding=skips_padding)
    parts: dict[str, Any] = {**functions, "experts": of_experts, "latents": latents}
    return Ops(**parts, served=served, _dtype=dtype, _device=device.type, _without=left_out)


def check_calls(device: torch.device, *, on: bool) -> None:
    """If `on`, operators with documented limits hold each call of this process against them first, from now on.

    Nothing turns that off: another engine that did not ask for it must not take it from the one that did.

    Raises:
        ConfigError: the device's operators have none.
    """
    if not on:
        return
    if not any("torch_npu" in by_device.get(device.type, ()) for by_device in TABLE.values()):
        raise ConfigError(f"check_ops: operators of {device.type} have no documented limits; accepted on: npu")
    npu_operators.check_calls(on=True)


class _References:
    def __getattr__(self, op: str) -> Callable[..., Any]:
        module = experts if op in (*OF_EXPERTS, "permute_own") else latent if op in OF_LATENTS else reference
        function: Callable[..., Any] = getattr(module, op)
        if op == "argmax":  # reads a step's result, and is no part of it
            return function
        return reads_host(function) if op == "paged_attention" else taped(function)


def _all_reduce(by: str, group: Group) -> Callable[[Tensor], None]:
    return taped(functools.partial(reference.all_reduce, group=group) if by == "torch" else group.all_reduce)


def _nothing(x_TD: Tensor) -> None:
    pass


def _pick(op: str, device: str, fails: Callable[[str], str | None]) -> Served:
    against: dict[str, str] = {}
    for name in TABLE[op][device]:
        reason = fails(name)
        if reason is None:
            return Served(name, against)
        against[name] = reason
    raise AssertionError(f"nothing serves {op} on {device}: {against}")


def _linear_fails(dtype: torch.dtype, inputs: int, without: frozenset[str]) -> Callable[[str], str | None]:
    def fails(name: str) -> str | None:
        if name in without:
            return "left out on request"
        if name == "onednn":
            return onednn_fails(dtype)
        if name == "native":
            return _native_fails(dtype) or native.linear_fails(native.load(), dtype, inputs)
        return None

    return fails


def _native_grouped(weight_EOI: Tensor) -> GroupedLinear:
    library, threads = native.load(), torch.get_num_threads()
    return EachLinear(weight_EOI, lambda weight_OI: native.NativeLinear(library, threads, weight_OI), "native")


_GROUPED: Mapping[str, Callable[[Tensor], GroupedLinear]] = {
    "native": _native_grouped,
    "torch": loop_linear,
    "grouped_mm": GroupedMmLinear,
    "torch_npu": npu.NpuGroupedLinear,
}


def _grouped_fails(
    device: torch.device, dtype: torch.dtype, shape: ExpertShape, without: frozenset[str]
) -> Callable[[str], str | None]:
    def fails(name: str) -> str | None:
        if name in without:
            return "left out on request"
        if name == "native":
            reason = _native_fails(dtype)
            for inputs in (shape.hidden_size, shape.intermediate_size):
                reason = reason or native.linear_fails(native.load(), dtype, inputs)
            return reason
        if name == "grouped_mm":
            up, down = (shape.hidden_size, 2 * shape.intermediate_size), (shape.intermediate_size, shape.hidden_size)
            return grouped_mm_fails(device, dtype, *up) or grouped_mm_fails(device, dtype, *down)
        return None

    return fails


def _op_fails(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int,
    routing: Routing | None,
    without: frozenset[str],
) -> Callable[[str], str | None]:
    def npu_fails() -> str | None:
        if op == "paged_attention":
            return npu.attention_fails(dtype, head_dim)
        if op == "exchange":
            return npu.exchange_fails(dtype)
        return npu.route_fails(routing) if op == "route" and routing is not None else None

    def fails(name: str) -> str | None:
        if name in without:
            return "left out on request"
        if name == "native":
            reason = _native_fails(dtype)
            if reason is None and op == "paged_attention":
                return native.attention_fails(native.load(), head_dim)
            return reason
        if name == "triton":
            reason = gpu.fails(device, dtype)
            return gpu.attention_fails(head_dim) if reason is None and op == "paged_attention" else reason
        return npu_fails() if name == "torch_npu" else None

    return fails


def _native_fails(dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no kernels for {str(dtype).removeprefix('torch.')}"
    return _build_fails()


@functools.cache
def _build_fails() -> str | None:
    try:
        native.load()
    except NotBuiltError as error:
        warnings.warn(f"the CPU kernels are not available, PyTorch serves instead: {error}", stacklevel=2)
        return str(error)
    return None
