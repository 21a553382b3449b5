"""Every operator in plain PyTorch: the definition, the tests' yardstick, and what serves where nothing faster does.

All of them can write into memory that the caller owns, so that a steady step allocates nothing where an implementation
can do without; some return where the result is, because others cannot. Strided views are welcome where a name says so;
everything else is contiguous.
"""

# Shapes: T packed query tokens, R rows, S sequences, N query heads, K KV heads, H head dim, D any last dimension,
#         B blocks of the pool, P tokens per block, L tokens of one sequence's KV, V vocabulary

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from xllm_lab.engine.ops.batch import PagedBatch
from xllm_lab.engine.ops.collectives import Group


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, 2019)."""
    return out_TD.copy_(F.rms_norm(x_TD, weight_D.shape, weight_D, eps))


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor) -> tuple[Tensor, Tensor]:
    """`x + delta`, and that normalised: the residual stream takes a branch's result and feeds the next. x is lost."""
    x_TD += delta_TD
    return x_TD, rms_norm(x_TD, weight_D, eps, out_TD)


def head_norm(x_TNH: Tensor, weight_NH: Tensor, eps: float) -> Tensor:
    """RMS norm of each head, each with its own weight. Tokens may be strided. x is lost."""
    normed_TNH = F.rms_norm(x_TNH, x_TNH.shape[-1:], torch.ones_like(weight_NH[0]), eps)
    return torch.mul(normed_TNH, weight_NH, out=x_TNH)


def rope_angles(position_T: Tensor, frequencies_H2: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> None:
    """Cosines and sines for `rope`: computed in float32 and rounded once, as transformers does.

    Anew each step: for T tokens that is nothing next to one layer, while a table is as long as the longest context.
    """
    angles = torch.outer(position_T.float(), frequencies_H2)
    cos, sin = angles.cos(), angles.sin()
    cos_TH.copy_(torch.cat([cos, cos], -1))
    sin_TH.copy_(torch.cat([-sin, sin], -1))


def rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Turns the pair (x[i], x[i + H/2]) by its token's angle (Su et al., 2021, in the half-split layout). x is lost.

    Args:
        x_TNH: tokens may be strided.
        cos_TH, sin_TH: as the same implementation's `rope_angles` wrote them; here, both halves are alike, but the
            first half of `sin` carries the rotation's minus.
    """
    swapped_TNH = x_TNH.roll(x_TNH.shape[-1] // 2, -1)
    return torch.addcmul(x_TNH * cos_TH.unsqueeze(1), swapped_TNH, sin_TH.unsqueeze(1), out=x_TNH)


def swiglu(gate_up_TD: Tensor, out_TD: Tensor) -> Tensor:
    """`silu(gate) * up`, where the input holds gate and up side by side."""
    gate, up = gate_up_TD.chunk(2, -1)
    return torch.mul(F.silu(gate), up, out=out_TD)


def reshape_and_cache(k_TKH: Tensor, v_TKH: Tensor, k_BPKH: Tensor, v_BPKH: Tensor, batch: PagedBatch) -> None:
    """Writes keys and values of T tokens into their slots of the pool. Tokens may be strided."""
    k_BPKH.view(-1, *k_BPKH.shape[2:]).index_copy_(0, batch.slot_T, k_TKH)
    v_BPKH.view(-1, *v_BPKH.shape[2:]).index_copy_(0, batch.slot_T, v_TKH)


def paged_attention(
    q_TNH: Tensor,
    k_BPKH: Tensor,
    v_BPKH: Tensor,
    batch: PagedBatch,
    out_TNH: Tensor,
    *,
    scale: float | None = None,
) -> None:
    """Causal softmax attention of each sequence's new tokens over its own KV; scores are scaled by H^-0.5 or `scale`.

    The attention of torch once a sequence: anything that pads to the longest sequence loses to it on a CPU from 64
    sequences on, and a call costs only some 10 us. Tokens of q may be strided.
    """
    for gather, (start, end) in zip(batch.gathers(k_BPKH), itertools.pairwise(batch.query_starts), strict=True):
        if gather.lies_in is None:
            torch.index_select(k_BPKH, 0, gather.block_ids, out=gather.k_blocks)
            k_1KLH, v_1KLH = gather.k_1KLH, gather.v_1KLH
            if v_BPKH is k_BPKH:  # latent attention
                v_1KLH = k_1KLH
            else:
                torch.index_select(v_BPKH, 0, gather.block_ids, out=gather.v_blocks)
        else:
            k_1KLH, v_1KLH = (pool[gather.lies_in, : gather.kv_len].transpose(0, 1)[None] for pool in (k_BPKH, v_BPKH))
        attend = _decode if end - start == 1 else _chunk
        out_TNH[start:end] = attend(q_TNH[start:end], k_1KLH, v_1KLH, gather.mask_TL, scale)


def argmax(logits_RV: Tensor) -> list[int]:
    """Index of the largest logit of each row, the first among equals."""
    tokens: list[int] = logits_RV.argmax(-1).tolist()  # torch documents the first of equal maxima
    return tokens


def all_reduce(x_TD: Tensor, group: Group) -> None:
    """x becomes the sum of every rank's x, added in order of rank and rounded once: the same bits everywhere."""
    parts_nTD = x_TD.new_empty((group.size, *x_TD.shape))
    group.all_gather(x_TD, parts_nTD)
    torch.sum(parts_nTD, 0, out=x_TD)


def _decode(q_1NH: Tensor, k_1KLH: Tensor, v_1KLH: Tensor, _: Tensor | None, scale: float | None) -> Tensor:
    # The query heads of a KV head become rows of one query: repeating K and V for them costs 1.3 to 2.5 times.
    q_1KGH = q_1NH.reshape(1, k_1KLH.shape[1], -1, q_1NH.shape[-1])
    return F.scaled_dot_product_attention(q_1KGH, k_1KLH, v_1KLH, scale=scale).view(q_1NH.shape)


def _chunk(q_TNH: Tensor, k_1KLH: Tensor, v_1KLH: Tensor, mask_TL: Tensor | None, scale: float | None) -> Tensor:
    out_1NTH = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1).unsqueeze(0),
        k_1KLH,
        v_1KLH,
        attn_mask=mask_TL,
        is_causal=mask_TL is None,
        scale=scale,
        enable_gqa=True,
    )
    return out_1NTH[0].transpose(0, 1)
