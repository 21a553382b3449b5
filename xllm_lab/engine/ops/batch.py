"""Where a step's tokens sit in the KV pool: built once a step, read by every layer."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed query tokens, S sequences, K KV heads, H head dim, B blocks of the pool, P tokens per block,
#         M blocks of the longest table, L tokens of one sequence's KV

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Gather(NamedTuple):
    """One sequence's way out of the pool, into memory that all sequences and layers of a step use in turn.

    Reusing it keeps the gathered keys in the core's cache and saves the allocator from mapping pages anew each time:
    attention measured a seventh (bfloat16) to a quarter (float32) faster at 16 sequences of 350 tokens.

    Attributes:
        block_ids: what to gather.
        lies_in: the block that holds the whole sequence, which then is read where it lies; None: there are several.
        k_blocks, v_blocks: where to, [own blocks, P, K, H].
        k_1KLH, v_1KLH: the same memory, seen by the attention.
        kv_len: tokens of the sequence.
        mask_TL: added to the scores when a chunk follows cached tokens; `None` where none or a plain causal one does.
    """

    block_ids: Tensor
    lies_in: int | None
    k_blocks: Tensor
    v_blocks: Tensor
    k_1KLH: Tensor
    v_1KLH: Tensor
    mask_TL: Tensor | None
    kv_len: int


@dataclass(slots=True)
class PagedBatch:
    """A step's geometry.

    Attributes:
        slot_T: for each token, block * P + offset, where its key and value go; int64.
        query_starts: S + 1 offsets into T: sequence s owns tokens [query_starts[s], query_starts[s + 1]).
        kv_lens: for each sequence, its tokens in the pool, counting those of this step.
        block_table_SM: block ids, int32, padded with 0; the first ceil(kv_len / P) of a row are its own.
        starts_S1, kv_len_S: the two lists as int32 tensors.
        num_tokens_1: how many of T are a sequence's, int32, on the device; None: all are.
        num_padding: sequences of one token behind those of the lists, which only fill up a graph; each has one token
            in the pool, in a block that its row of the table names.
    """

    slot_T: Tensor
    query_starts: Sequence[int]
    kv_lens: Sequence[int]
    block_table_SM: Tensor
    starts_S1: Tensor
    kv_len_S: Tensor
    num_tokens_1: Tensor | None = None
    num_padding: int = 0
    _gathers: list[Gather] = field(default_factory=list)

    def gathers(self, pool_BPKH: Tensor) -> Sequence[Gather]:
        """How the reference reads the pool, made at the first layer; a native kernel has no use for it."""
        if not self._gathers:
            self._gathers = _gathers(self, pool_BPKH)
        return self._gathers

    def padded_lengths(self) -> tuple[list[int], list[int]]:
        """For each sequence, those that pad included: its last token's number in T plus 1, and its tokens in the pool.

        For kernels that compute all T tokens, of whomever.
        """
        used = self.query_starts[-1]
        return (
            [*self.query_starts[1:], *range(used + 1, used + self.num_padding + 1)],
            [*self.kv_lens, *[1] * self.num_padding],
        )

    @property
    def is_decode(self) -> bool:
        """Whether every token is its sequence's only one; true of all steps of a graph, or of none."""
        return len(self.kv_lens) + self.num_padding == len(self.slot_T)

    def forget_gathers(self) -> None:
        """The lists above are another step's now."""
        self._gathers = []


def paged_batch(
    queries: Sequence[int], computed: Sequence[int], block_tables: Sequence[Sequence[int]], pool_BPKH: Tensor
) -> PagedBatch:
    """Indices of one step.

    Args:
        queries: tokens each sequence computes now, at least 1.
        computed: tokens each sequence has in the pool already.
        block_tables: covering computed + queries tokens; may be longer.
        pool_BPKH: keys of any layer, for block size and device.
    """
    device, P = pool_BPKH.device, pool_BPKH.shape[1]
    query_S, computed_S = np.array(queries), np.array(computed)
    kv_len_S = query_S + computed_S
    own_S = -(-kv_len_S // P)
    table_SM = np.zeros((len(queries), own_S.max()), np.int32)
    for row, (own, table) in enumerate(zip(own_S.tolist(), block_tables, strict=True)):
        assert len(table) >= own, f"a table of {len(table)} blocks is short of {kv_len_S[row]} tokens"
        table_SM[row, :own] = table[:own]
    starts_S1 = np.concatenate([[0], np.cumsum(query_S)])
    sequence_T = np.repeat(np.arange(len(queries)), query_S)
    position_T = np.arange(starts_S1[-1]) + (computed_S - starts_S1[:-1])[sequence_T]
    slot_T = table_SM[sequence_T, position_T // P].astype(np.int64) * P + position_T % P
    return PagedBatch(
        slot_T=sent(torch.from_numpy(slot_T), device),
        query_starts=starts_S1.tolist(),
        kv_lens=kv_len_S.tolist(),
        block_table_SM=sent(torch.from_numpy(table_SM), device),
        starts_S1=sent(torch.from_numpy(starts_S1.astype(np.int32)), device),
        kv_len_S=sent(torch.from_numpy(kv_len_S.astype(np.int32)), device),
    )


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, in order of this thread's stream; the host does not wait for the copy.

    torch lends the pinned memory that it is made from to nobody else before it is done.
    """
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def chunk_mask(queries: int, kv_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Shape [T, L], 0 where query t may look and -inf elsewhere: causal, aligned at the lower right corner."""
    mask_TL = torch.full((queries, kv_len), float("-inf"), dtype=dtype, device=device)
    return mask_TL.triu_(kv_len - queries + 1)


def _gathers(batch: PagedBatch, pool_BPKH: Tensor) -> list[Gather]:
    _, P, K, H = pool_BPKH.shape
    longest = max([-(-kv_len // P) for kv_len in batch.kv_lens], default=0)
    scratch = longest if longest > 1 else 0  # of virtual KV, a block is as long as the longest context
    k_scratch, v_scratch = pool_BPKH.new_empty((2, scratch, P, K, H))
    starts = batch.query_starts
    made = []
    for row, kv_len in enumerate(batch.kv_lens):
        own, queries = -(-kv_len // P), starts[row + 1] - starts[row]
        mask_TL = chunk_mask(queries, kv_len, pool_BPKH.dtype, pool_BPKH.device) if 1 < queries < kv_len else None
        made.append(
            Gather(
                batch.block_table_SM[row, :own],
                int(batch.block_table_SM[row, 0]) if own == 1 else None,
                k_scratch[:own],
                v_scratch[:own],
                k_scratch.view(1, scratch * P, K, H)[:, :kv_len].transpose(1, 2),
                v_scratch.view(1, scratch * P, K, H)[:, :kv_len].transpose(1, 2),
                mask_TL,
                kv_len,
            )
        )
    return made
