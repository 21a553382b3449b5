"""The operators as compiled from `kernels/`, called through ctypes; signatures and meaning are those of `reference`.

A call costs 2 to 3 us. Tensors are on the CPU, all of one dtype, and laid out as the reference demands.
"""

# Shapes: T packed query tokens, R rows, N query heads, K KV heads, H head dim, D any last dimension,
#         B blocks of the pool, P tokens per block, V vocabulary, I input features, O output features

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xllm_lab.engine.device import survives
from xllm_lab.engine.ops import build
from xllm_lab.engine.ops.batch import PagedBatch
from xllm_lab.engine.ops.tape import Kernel

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_AMX_INPUTS = 32  # a tile's width in bfloat16
_AMX_OUTPUTS = 32

# Argument types by letter: pointer, long, float, int.
_LETTERS = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}
_TYPED = {
    "rms_norm": "plppfllpl",
    "head_norm": "plpflll",
    "rope_angles": "ppllpp",
    "rope": "plpplll",
    "swiglu": "pllp",
    "reshape_and_cache": "pplpllpp",
    "paged_attention": "plppplpplllllfpi",
}
_UNTYPED = {
    "argmax": "pllp",
    "linear_f32_pack": "pllp",
    "linear_f32_rows": "plplp",
    "linear_f32": "pllpplpi",
    "linear_bf16_pack": "pllp",
    "linear_bf16_rows": "plplp",
    "linear_bf16": "pllpplpii",
    "linear_f32_panel": "",
    "attention_lanes": "",
    "matrix_unit_granted": "",
    "replay": "pl",
}


@functools.cache
def load() -> ctypes.CDLL:
    """The library, compiled if need be.

    Raises:
        build.NotBuiltError: it cannot be had.
    """
    return opened(build.library())


def opened(path: Path) -> ctypes.CDLL:
    """A compiled library with its functions' types. Raises `build.NotBuiltError` if it does not load."""
    try:
        library = ctypes.CDLL(str(path))
        signatures = {f"{op}_{name}": s for op, s in _TYPED.items() for name in _NAMES.values()} | _UNTYPED
        for name, signature in signatures.items():
            if name == "linear_bf16" and not hasattr(library, name):
                continue  # compiled for cores without a matrix unit
            getattr(library, name).argtypes = [_LETTERS[letter] for letter in signature]
    except (OSError, AttributeError) as error:
        raise build.NotBuiltError(f"{path}: {error}") from error
    return library


def _kernel(library: ctypes.CDLL, name: str, signature: str) -> Kernel:
    packed = ctypes.cast(getattr(library, f"packed_{name}"), ctypes.c_void_p).value
    assert packed is not None
    return Kernel(getattr(library, name), packed, signature)


class NativeOps:
    """One dtype's operators."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, threads: int) -> None:
        name = _NAMES[dtype]
        self._threads = threads
        self._argmax: Any = library.argmax
        self._tokens_R = torch.empty(0, dtype=torch.int64)
        for op, signature in _TYPED.items():
            setattr(self, f"_{op}", _kernel(library, f"{op}_{name}", signature))

    _rms_norm: Any
    _head_norm: Any
    _rope_angles: Any
    _rope: Any
    _swiglu: Any
    _reshape_and_cache: Any
    _paged_attention: Any

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor) -> Tensor:
        """As `reference.rms_norm`."""
        rows, width = x_TD.shape
        x, out = x_TD.data_ptr(), out_TD.data_ptr()
        self._rms_norm(x, width, None, weight_D.data_ptr(), eps, rows, width, out, width)
        return out_TD

    def add_rms_norm(
        self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `reference.add_rms_norm`."""
        rows, width = x_TD.shape
        x, delta, out = x_TD.data_ptr(), delta_TD.data_ptr(), out_TD.data_ptr()
        self._rms_norm(x, width, delta, weight_D.data_ptr(), eps, rows, width, out, width)
        return x_TD, out_TD

    def head_norm(self, x_TNH: Tensor, weight_NH: Tensor, eps: float) -> Tensor:
        """As `reference.head_norm`."""
        self._head_norm(x_TNH.data_ptr(), x_TNH.stride(0), weight_NH.data_ptr(), eps, *x_TNH.shape)
        return x_TNH

    def rope_angles(self, position_T: Tensor, frequencies_H2: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> None:
        """As `reference.rope_angles`."""
        angles = (position_T.data_ptr(), frequencies_H2.data_ptr(), len(position_T), len(frequencies_H2))
        self._rope_angles(*angles, cos_TH.data_ptr(), sin_TH.data_ptr())

    def rope(self, x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        """As `reference.rope`."""
        self._rope(x_TNH.data_ptr(), x_TNH.stride(0), cos_TH.data_ptr(), sin_TH.data_ptr(), *x_TNH.shape)
        return x_TNH

    def swiglu(self, gate_up_TD: Tensor, out_TD: Tensor) -> Tensor:
        """As `reference.swiglu`."""
        self._swiglu(gate_up_TD.data_ptr(), *out_TD.shape, out_TD.data_ptr())
        return out_TD

    def reshape_and_cache(
        self, k_TKH: Tensor, v_TKH: Tensor, k_BPKH: Tensor, v_BPKH: Tensor, batch: PagedBatch
    ) -> None:
        """As `reference.reshape_and_cache`."""
        tokens, K, H = k_TKH.shape
        keys, values, slots = k_TKH.data_ptr(), v_TKH.data_ptr(), batch.slot_T.data_ptr()
        assert k_TKH.stride(0) == v_TKH.stride(0), "keys and values of one projection lie in the same rows"
        self._reshape_and_cache(
            keys, values, k_TKH.stride(0), slots, tokens, K * H, k_BPKH.data_ptr(), v_BPKH.data_ptr()
        )

    def paged_attention(
        self,
        q_TNH: Tensor,
        k_BPKH: Tensor,
        v_BPKH: Tensor,
        batch: PagedBatch,
        out_TNH: Tensor,
        *,
        scale: float | None = None,
    ) -> None:
        """As `reference.paged_attention`."""
        _, P, K, H = k_BPKH.shape
        sequences, width = batch.block_table_SM.shape
        self._paged_attention(
            *(q_TNH.data_ptr(), q_TNH.stride(0), k_BPKH.data_ptr(), v_BPKH.data_ptr()),
            *(batch.block_table_SM.data_ptr(), width, batch.starts_S1.data_ptr(), batch.kv_len_S.data_ptr()),
            *(sequences, q_TNH.shape[1], K, H, P, scale or H**-0.5, out_TNH.data_ptr(), self._threads),
        )

    def argmax(self, logits_RV: Tensor) -> list[int]:
        """As `reference.argmax`."""
        rows = len(logits_RV)
        if rows > len(self._tokens_R):
            self._tokens_R = torch.empty(rows, dtype=torch.int64)
        self._argmax(logits_RV.data_ptr(), *logits_RV.shape, self._tokens_R.data_ptr())
        found: list[int] = self._tokens_R[:rows].tolist()
        return found


class NativeLinear:
    """float32 by vectors, bfloat16 by the core's matrix unit; weights as panels of neighbouring outputs."""

    def __init__(self, library: ctypes.CDLL, threads: int, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        outputs, self._inputs = weight_OI.shape
        wide = weight_OI.dtype == torch.float32
        self.kind = "native" if wide else "native_amx"
        name = "linear_" + _NAMES[weight_OI.dtype]
        self._product, self._rows = (_kernel(library, n, _UNTYPED[n]) for n in (name, name + "_rows"))
        self._wide, self._outputs, self._threads, self._bias_O = wide, outputs, threads, bias_O
        panel = library.linear_f32_panel() if wide else _AMX_OUTPUTS
        self._packed = weight_OI.new_empty(-(-outputs // panel) * panel * self._inputs)
        pack = getattr(library, name + "_pack")
        pack(weight_OI.contiguous().data_ptr(), outputs, self._inputs, self._packed.data_ptr())

    def __call__(self, x_TI: Tensor, out_TO: Tensor) -> None:
        bias = None if self._bias_O is None else self._bias_O.data_ptr()
        product, y = (x_TI.data_ptr(), len(x_TI), self._inputs, self._packed.data_ptr(), bias, self._outputs), out_TO
        if self._wide:
            self._product(*product, y.data_ptr(), self._threads)
        else:
            self._product(*product, y.data_ptr(), y.dtype == torch.float32, self._threads)

    def rows(self, token_T: Tensor, out_TI: Tensor) -> None:
        self._rows(self._packed.data_ptr(), self._inputs, token_T.data_ptr(), len(token_T), out_TI.data_ptr())


def attention_fails(library: ctypes.CDLL, head_dim: int) -> str | None:
    """Why the attention cannot serve heads of this size, or None."""
    lanes = library.attention_lanes()
    return f"head_dim {head_dim} is no multiple of {lanes}" if head_dim % lanes else None


def linear_fails(library: ctypes.CDLL, dtype: torch.dtype, inputs: int) -> str | None:
    """Why the product cannot serve weights of this type and width, or None."""
    if dtype == torch.bfloat16:
        if inputs % _AMX_INPUTS:
            return f"{inputs} inputs are no multiple of {_AMX_INPUTS}"
        return amx_fails(library)
    return None


@functools.cache
def amx_fails(library: ctypes.CDLL) -> str | None:
    """Why the matrix unit cannot be used, or None: it is asked for, then tried in a child process."""
    if not library.matrix_unit_granted():
        return "no AMX: this core, kernel or compiler has none"
    if not survives(lambda: _amx_is_right(library)):
        return "AMX is advertised but faulty"
    return None


def _amx_is_right(library: ctypes.CDLL) -> bool:
    # The permission does not reach back from a child, so the parent has asked for it already.
    weight_OI = torch.linspace(-1, 1, 80 * 64).reshape(80, 64).bfloat16()
    x_TI = torch.linspace(-1, 1, 49 * 64).reshape(49, 64).bfloat16()
    y_TO = torch.empty(49, 80)
    NativeLinear(library, 1, weight_OI)(x_TI, y_TO)
    expected_TO = (x_TI.unsqueeze(1).float() * weight_OI.float()).sum(-1)  # no product of oneDNN's: it may be faulty
    return torch.allclose(y_TO, expected_TO, rtol=1e-3, atol=1e-3)
