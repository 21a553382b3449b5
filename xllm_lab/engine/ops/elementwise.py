"""Normalisation, rotary position embedding and the gated activation."""

# Shapes: T packed tokens, N heads, H head dim, D any last dimension

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def rope(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Rotates the pair (x[i], x[i + H/2]) by its token's angle (Su et al., 2021, in the half-split layout).

    Args:
        cos_T1H, sin_T1H: rows of `rope_table`; in `sin` the first half carries the minus sign of the rotation.
    """
    swapped_TNH = x_TNH.roll(x_TNH.shape[-1] // 2, -1)
    return torch.addcmul(x_TNH * cos_T1H, swapped_TNH, sin_T1H)


def swiglu(gate_up_TD: Tensor) -> Tensor:
    """`silu(gate) * up`, where the input holds gate and up side by side; halves the last dimension."""
    gate, up = gate_up_TD.chunk(2, -1)
    return F.silu(gate) * up
