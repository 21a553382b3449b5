"""Attention over a paged KV pool, and the writing of new keys and values into it."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed query tokens, S sequences, N query heads, K KV heads, H head dim, G = N / K query heads a KV head,
#         B blocks of the pool, P tokens per block, M blocks of the longest table, L tokens of one sequence's KV

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)


class PagedBatch(NamedTuple):
    """Where a step's tokens sit: built once a step, read by every layer.

    Attributes:
        slot_T: for each token, block * P + offset, where its key and value go.
        query_starts: S + 1 offsets into T: sequence s owns tokens [query_starts[s], query_starts[s + 1]).
        kv_lens: for each sequence, its tokens in the pool, counting those of this step.
        reads: for each sequence, how the reference finds its keys; a native kernel takes `block_table_SM`.
        block_table_SM: block ids, padded with 0; the first ceil(kv_len / P) of a row are its own.
    """

    slot_T: Tensor
    query_starts: Sequence[int]
    kv_lens: Sequence[int]
    reads: Sequence[SequenceRead]
    block_table_SM: Tensor


class SequenceRead(NamedTuple):
    """One sequence's keys in the pool.

    Attributes:
        first_slot: where they start if its blocks follow one another, so that a view will do; else `None`.
        block_ids: its blocks, to gather, if they do not.
        mask_TL: added to the scores when a chunk follows cached tokens; `None` where none or a plain causal one does.
    """

    first_slot: int | None
    block_ids: Tensor
    mask_TL: Tensor | None


def paged_batch(
    queries: Sequence[int],
    computed: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PagedBatch:
    """Indices of one step.

    Args:
        queries: tokens each sequence computes now, at least 1.
        computed: tokens each sequence has in the pool already.
        block_tables: covering computed + queries tokens; may be longer.
    """
    query_starts, kv_lens, reads, slots, rows = [0], [], [], [], []
    for count, start, table in zip(queries, computed, block_tables, strict=True):
        kv_len = start + count
        blocks = list(table[: -(-kv_len // block_size)])
        assert len(blocks) * block_size >= kv_len, f"block table of {len(blocks)} blocks is short of {kv_len} tokens"
        slots += [blocks[i // block_size] * block_size + i % block_size for i in range(start, kv_len)]
        query_starts.append(query_starts[-1] + count)
        kv_lens.append(kv_len)
        rows.append(torch.tensor(blocks, device=device))
        consecutive = blocks[-1] - blocks[0] == len(blocks) - 1 and blocks == list(range(blocks[0], blocks[-1] + 1))
        mask_TL = chunk_mask(count, kv_len, dtype, device) if start and count > 1 else None
        reads.append(SequenceRead(blocks[0] * block_size if consecutive else None, rows[-1], mask_TL))
    block_table_SM = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return PagedBatch(torch.tensor(slots, device=device), query_starts, kv_lens, reads, block_table_SM)


def chunk_mask(queries: int, kv_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Shape [T, L], 0 where query t may look and -inf elsewhere: causal, aligned at the lower right corner."""
    mask_TL = torch.full((queries, kv_len), float("-inf"), dtype=dtype, device=device)
    return mask_TL.triu_(kv_len - queries + 1)


def reshape_and_cache(k_TKH: Tensor, v_TKH: Tensor, k_BPKH: Tensor, v_BPKH: Tensor, slot_T: Tensor) -> None:
    """Writes keys and values of T tokens into their slots of the pool."""
    k_BPKH.view(-1, *k_BPKH.shape[2:]).index_copy_(0, slot_T, k_TKH)
    v_BPKH.view(-1, *v_BPKH.shape[2:]).index_copy_(0, slot_T, v_TKH)


def paged_attention(q_TNH: Tensor, k_BPKH: Tensor, v_BPKH: Tensor, batch: PagedBatch) -> Tensor:
    """Causal softmax attention of each sequence's new tokens over its own KV; scores are scaled by H^-0.5.

    The reference calls the attention of torch once a sequence: anything that pads to the longest sequence loses to
    it on a CPU from 64 sequences on, and a call costs only some 10 us.

    Returns:
        Shape [T, N, H].
    """
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    for s, (read, kv_len) in enumerate(zip(batch.reads, batch.kv_lens, strict=True)):
        start, end = batch.query_starts[s], batch.query_starts[s + 1]
        k_1KLH, v_1KLH = _keys(k_BPKH, read, kv_len), _keys(v_BPKH, read, kv_len)
        attend = _decode if end - start == 1 else _chunk
        out_TNH[start:end] = attend(q_TNH[start:end], k_1KLH, v_1KLH, read.mask_TL)
    return out_TNH


def _keys(pool_BPKH: Tensor, read: SequenceRead, kv_len: int) -> Tensor:
    _, _, K, H = pool_BPKH.shape
    if read.first_slot is None:
        rows_LKH = pool_BPKH.index_select(0, read.block_ids).view(-1, K, H)[:kv_len]
    else:
        rows_LKH = pool_BPKH.view(-1, K, H)[read.first_slot : read.first_slot + kv_len]
    return rows_LKH.transpose(0, 1).unsqueeze(0)


def _decode(q_1NH: Tensor, k_1KLH: Tensor, v_1KLH: Tensor, _: Tensor | None) -> Tensor:
    # The query heads of a KV head become rows of one query: repeating K and V for them costs 1.3 to 2.5 times.
    q_1KGH = q_1NH.reshape(1, k_1KLH.shape[1], -1, q_1NH.shape[-1])
    return F.scaled_dot_product_attention(q_1KGH, k_1KLH, v_1KLH).view(q_1NH.shape)


def _chunk(q_TNH: Tensor, k_1KLH: Tensor, v_1KLH: Tensor, mask_TL: Tensor | None) -> Tensor:
    q_1NTH = q_TNH.transpose(0, 1).unsqueeze(0)
    out_1NTH = F.scaled_dot_product_attention(
        q_1NTH, k_1KLH, v_1KLH, attn_mask=mask_TL, is_causal=mask_TL is None, enable_gqa=True
    )
    return out_1NTH[0].transpose(0, 1)
