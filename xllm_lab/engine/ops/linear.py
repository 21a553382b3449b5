"""Linear layers whose weights are laid out once, at load."""

# Shapes: T packed tokens, I input features, O output features

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from xllm_lab.engine.ops.tape import taped

# Rows oneDNN lays the weights out for. Layouts for 16 to 512 rows measured within 5 % of each other at every row
# count; the layout for 1 row lost a third in float32 from 4 rows on.
_PACK_ROWS = 64


class Linear(Protocol):
    """`y = x W' + b`, over weights that it has taken over and laid out as it likes.

    Attributes:
        kind: what serves it, for the manifest.
    """

    kind: str

    def __call__(self, x_TI: Tensor, out_TO: Tensor) -> None:
        """Writes y. `out` has x's dtype, or is float32; both are contiguous."""
        ...

    def rows(self, token_T: Tensor, out_TI: Tensor) -> None:
        """Writes the rows of W with these numbers: an embedding that is tied to the head needs no second copy."""
        ...


class TorchLinear:
    """The reference."""

    kind = "torch"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self._weight_OI, self._bias_O = weight_OI, bias_O

    @taped
    def __call__(self, x_TI: Tensor, out_TO: Tensor) -> None:
        if out_TO.dtype == x_TI.dtype and self._bias_O is None:
            torch.mm(x_TI, self._weight_OI.T, out=out_TO)
        else:
            out_TO.copy_(F.linear(x_TI, self._weight_OI, self._bias_O))

    @taped
    def rows(self, token_T: Tensor, out_TI: Tensor) -> None:
        torch.index_select(self._weight_OI, 0, token_T, out=out_TI)


class OneDnnLinear:
    """oneDNN's packed layout through torch's private operators; keeps the plain weights where their rows are wanted.

    1.1 to 1.6 times as fast as the reference per matrix at up to 64 rows, measured on Sapphire Rapids without AMX.
    """

    kind = "onednn"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, keep_rows: bool = False) -> None:
        self._bias_O = bias_O
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _PACK_ROWS)
        self._weight_OI = weight_OI if keep_rows else None

    @taped
    def __call__(self, x_TI: Tensor, out_TO: Tensor) -> None:
        out_TO.copy_(torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, self._bias_O, "none", [], ""))

    @taped
    def rows(self, token_T: Tensor, out_TI: Tensor) -> None:
        assert self._weight_OI is not None, "a matrix whose rows nobody asked to keep"
        torch.index_select(self._weight_OI, 0, token_T, out=out_TI)


@functools.cache
def onednn_fails(dtype: torch.dtype) -> str | None:
    """Why torch's private oneDNN operators cannot be used: they are not there, or disagree with `F.linear`."""
    weight_OI = torch.linspace(-1, 1, 48 * 32).reshape(48, 32).to(dtype)
    x_TI = torch.linspace(-1, 1, 3 * 32).reshape(3, 32).to(dtype)
    y_TO = torch.empty(3, 48, dtype=dtype)
    try:
        OneDnnLinear(weight_OI)(x_TI, y_TO)
    except (AttributeError, RuntimeError) as error:  # the operators are private: they may go, or refuse a dtype
        return " ".join(str(error).split())[:200]
    if torch.allclose(y_TO.float(), F.linear(x_TI, weight_OI).float(), rtol=2e-2, atol=2e-2):
        return None
    return "oneDNN's packed product differs from torch's"
