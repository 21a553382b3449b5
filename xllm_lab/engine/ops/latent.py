"""Operators of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) beside the attention itself.

KV keeps one row a token, for all heads: a compressed vector c and one rotated key r. The matrices that expand c to each
head's key and value are applied to the query and to the result instead ("absorbed"), and attention runs on the rows:

    score   = q_nope . (U c) + q_rope . r  =  [U' q_nope; q_rope] . [c; r]
    result  = sum of weight (V c)          =  V (sum of weight c)

So it is attention with one KV head whose values are its keys; of each value, only the part that is c is wanted.
"""

# Shapes: T packed tokens, N heads, C width of the compressed vector, R of the rotated key, H = C + R,
#         I, O any widths, B blocks of the pool, P tokens per block

from __future__ import annotations

import torch
from torch import Tensor

from xllm_lab.engine.ops.batch import PagedBatch


def head_linear(x_TNI: Tensor, weight_NIO: Tensor, out_TNO: Tensor) -> None:
    """`y = x W_n`, each head by its own matrix. Input and output may be strided."""
    torch.bmm(x_TNI.transpose(0, 1), weight_NIO, out=out_TNO.transpose(0, 1))


def latent_query(q_nope_TNI: Tensor, q_rope_TNR: Tensor, up_NIC: Tensor, query_TNH: Tensor) -> None:
    """Queries for rows of the pool: [U' q_nope; q_rope]."""
    C = up_NIC.shape[2]
    head_linear(q_nope_TNI, up_NIC, query_TNH[..., :C])
    query_TNH[..., C:].copy_(q_rope_TNR)


def cache_latent(latent_TC: Tensor, k_rope_T1R: Tensor, kv_BP1H: Tensor, batch: PagedBatch) -> None:
    """Writes [c; r] of T tokens into their slots of the pool."""
    rows_SH, C = kv_BP1H.view(-1, kv_BP1H.shape[-1]), latent_TC.shape[1]
    rows_SH[:, :C].index_copy_(0, batch.slot_T, latent_TC)
    rows_SH[:, C:].index_copy_(0, batch.slot_T, k_rope_T1R.flatten(1))
