"""What each operator computes, in plain torch: parameters and results are those of its schema.

Written from the operators' documentation, computed in float32 and rounded once, slow and free of state. They stand in
for the kernels where there is no device; on a device they are what its kernels are held against.
"""

# Shapes: T packed query tokens, R rows, S sequences, N query heads, K KV heads, H head dim, D any last dimension,
#         B blocks of the pool, P tokens per block, M blocks of the longest table, L tokens of one sequence's KV

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor,
    actual_seq_lengths: Sequence[int],
    actual_seq_lengths_kv: Sequence[int],
    block_table: Tensor,
    num_heads: int,
    scale: float,
    input_layout: str,
    num_key_value_heads: int,
    sparse_mode: int,
    block_size: int,
    workspace: Tensor | None = None,
    out: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Layout TND over a paged pool, sparse mode 3: causal, aligned at the lower right corner."""
    assert (input_layout, sparse_mode) == ("TND", 3), f"no reference for {input_layout}, mode {sparse_mode}"
    assert tuple(key.shape[1:]) == (block_size, num_key_value_heads * query.shape[2]), "a pool of another layout"
    attended_TNH = torch.empty_like(query) if not out else out[0]
    starts = [0, *actual_seq_lengths]
    for row, ((start, end), kv_len) in enumerate(zip(itertools.pairwise(starts), actual_seq_lengths_kv, strict=True)):
        blocks = block_table[row, : -(-kv_len // block_size)].long()
        k_LKH, v_LKH = (
            pool[blocks].view(-1, num_key_value_heads, query.shape[2])[:kv_len].float() for pool in (key, value)
        )
        attended_TNH[start:end] = _attended(query[start:end].float(), k_LKH, v_LKH, atten_mask, scale)
    return attended_TNH, out[1] if out else query.new_empty(1)


def npu_fused_infer_attention_score_get_max_workspace(query: Tensor, *_: object, **__: object) -> Tensor:
    """Of a size that only the device knows; the reference needs none."""
    return query.new_empty(1, dtype=torch.uint8)


def _attended(q_TNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, mask: Tensor, scale: float) -> Tensor:
    (T, N, _), (L, K, _) = q_TNH.shape, k_LKH.shape
    groups = N // K
    scores_NTL = torch.einsum("tnh,lnh->ntl", q_TNH, k_LKH.repeat_interleave(groups, 1)) * scale
    # The compressed mask is a pattern: what counts of an element is how far it lies from the diagonal.
    ahead_TL = torch.arange(L, device=mask.device) - torch.arange(L - T, L, device=mask.device)[:, None]
    most = len(mask) - 1
    hidden_TL = mask[(-ahead_TL).clamp(0, most), ahead_TL.clamp(0, most)].bool()
    weights_NTL = scores_NTL.masked_fill(hidden_TL, float("-inf")).softmax(-1)
    return torch.einsum("ntl,lnh->tnh", weights_NTL, v_LKH.repeat_interleave(groups, 1))


def npu_scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *, cache_mode: str
) -> None:
    """Layout "Norm": pools are [B, P, K, H]."""
    assert cache_mode == "Norm", f"no reference for cache mode {cache_mode}"
    key_cache.view(-1, *key_cache.shape[2:])[slot_mapping.long()] = key
    value_cache.view(-1, *value_cache.shape[2:])[slot_mapping.long()] = value


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The normalised rows, and one over their root mean squares in float32."""
    x = input.float()
    over = tuple(range(-gamma.dim(), 0))
    rstd = (x.square().mean(over, keepdim=True) + epsilon).rsqrt()
    return (x * rstd * gamma.float()).to(input.dtype), rstd


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """The sum normalised, one over its root mean squares, and the sum, which is rounded first."""
    summed = x1 + x2
    return *npu_rms_norm(summed, gamma, epsilon), summed


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    """Mode "half": the second half of the width turns against the first."""
    assert rotary_mode == "half", f"no reference for rotary mode {rotary_mode}"
    x = input.float()
    first, second = x.chunk(2, -1)
    return (x * r1.float() + torch.cat([-second, first], -1) * r2.float()).to(input.dtype)


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu of the first half times the second."""
    gate, up = input.float().chunk(2, dim)
    return (F.silu(gate) * up).to(input.dtype)


def npu_mm_all_reduce_base(
    x1: Tensor, x2: Tensor, hcom: str, *, reduce_op: str = "sum", bias: Tensor | None = None
) -> Tensor:
    """One rank's product; a sum over several is `torch.distributed`'s, of the group that the communicator names."""
    product = x1.float() @ x2.float()
    if bias is not None:
        product = product + bias.float()
    return product.to(x1.dtype)


def npu_prefetch(input: Tensor, dependency: Tensor | None, max_size: int, offset: int = 0) -> None:
    """Nothing that a result shows."""


def npu_format_cast(input: Tensor, acl_format: int) -> Tensor:
    """The same numbers; how they lie is the device's own business."""
    return input.clone()
