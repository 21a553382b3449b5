"""Attention over a paged KV pool, and the writing of new keys and values into it."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed query tokens, S sequences, N query heads, K KV heads, H head dim, G = N / K query heads a KV head,
#         B blocks of the pool, P tokens per block, M blocks of the longest table, L tokens of one sequence's KV

from __future__ import annotations

import itertools
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
        block_table_SM: block ids, padded with 0; the first ceil(kv_len / P) of a row are its own.
        gathers: for each sequence, how the reference reads the pool; a native kernel has no use for it.
    """

    slot_T: Tensor
    query_starts: Sequence[int]
    kv_lens: Sequence[int]
    block_table_SM: Tensor
    gathers: Sequence[Gather]


class Gather(NamedTuple):
    """One sequence's way out of the pool, into memory that all sequences and layers of a step use in turn.

    Reusing it keeps the gathered keys in the core's cache and saves the allocator from mapping pages anew each time:
    attention measured a seventh (bfloat16) to a quarter (float32) faster at 16 sequences of 350 tokens.

    Attributes:
        block_ids: what to gather.
        k_blocks, v_blocks: where to, [own blocks, P, K, H].
        k_1KLH, v_1KLH: the same memory, seen by the attention.
        mask_TL: added to the scores when a chunk follows cached tokens; `None` where none or a plain causal one does.
    """

    block_ids: Tensor
    k_blocks: Tensor
    v_blocks: Tensor
    k_1KLH: Tensor
    v_1KLH: Tensor
    mask_TL: Tensor | None


def paged_batch(
    queries: Sequence[int], computed: Sequence[int], block_tables: Sequence[Sequence[int]], pool_BPKH: Tensor
) -> PagedBatch:
    """Indices and masks of one step.

    Args:
        queries: tokens each sequence computes now, at least 1.
        computed: tokens each sequence has in the pool already.
        block_tables: covering computed + queries tokens; may be longer.
        pool_BPKH: keys of any layer, for shape, dtype and device.
    """
    _, P, K, H = pool_BPKH.shape
    tables, slots = [], []
    for count, start, table in zip(queries, computed, block_tables, strict=True):
        blocks = list(table[: -(-(start + count) // P)])
        assert len(blocks) * P >= start + count, f"a table of {len(blocks)} blocks is short of {start + count} tokens"
        slots += [blocks[i // P] * P + i % P for i in range(start, start + count)]
        tables.append(torch.tensor(blocks, device=pool_BPKH.device))
    kv_lens = [start + count for start, count in zip(computed, queries, strict=True)]
    k_scratch, v_scratch = pool_BPKH.new_empty((2, max(map(len, tables)), P, K, H))
    gathers = [
        Gather(
            table,
            k_scratch[: len(table)],
            v_scratch[: len(table)],
            k_scratch.view(1, -1, K, H)[:, :kv_len].transpose(1, 2),
            v_scratch.view(1, -1, K, H)[:, :kv_len].transpose(1, 2),
            chunk_mask(count, kv_len, pool_BPKH.dtype, pool_BPKH.device) if 1 < count < kv_len else None,
        )
        for table, kv_len, count in zip(tables, kv_lens, queries, strict=True)
    ]
    return PagedBatch(
        slot_T=torch.tensor(slots, device=pool_BPKH.device),
        query_starts=[0, *itertools.accumulate(queries)],
        kv_lens=kv_lens,
        block_table_SM=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
        gathers=gathers,
    )


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
    for gather, (start, end) in zip(batch.gathers, itertools.pairwise(batch.query_starts), strict=True):
        torch.index_select(k_BPKH, 0, gather.block_ids, out=gather.k_blocks)
        torch.index_select(v_BPKH, 0, gather.block_ids, out=gather.v_blocks)
        attend = _decode if end - start == 1 else _chunk
        out_TNH[start:end] = attend(q_TNH[start:end], gather)
    return out_TNH


def _decode(q_1NH: Tensor, gather: Gather) -> Tensor:
    # The query heads of a KV head become rows of one query: repeating K and V for them costs 1.3 to 2.5 times.
    q_1KGH = q_1NH.reshape(1, gather.k_1KLH.shape[1], -1, q_1NH.shape[-1])
    return F.scaled_dot_product_attention(q_1KGH, gather.k_1KLH, gather.v_1KLH).view(q_1NH.shape)


def _chunk(q_TNH: Tensor, gather: Gather) -> Tensor:
    mask_TL = gather.mask_TL
    out_1NTH = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1).unsqueeze(0),
        gather.k_1KLH,
        gather.v_1KLH,
        attn_mask=mask_TL,
        is_causal=mask_TL is None,
        enable_gqa=True,
    )
    return out_1NTH[0].transpose(0, 1)
