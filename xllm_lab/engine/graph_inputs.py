"""What a captured step reads: memory that stays where it is, filled anew for each step and padded to the graph's size.

    decoding graph    every sequence computes one token; those that pad are sequences of one token, in a block of theirs
    other graphs      tokens that pad belong to no sequence; there are as many sequences as can be, the rest empty

Whatever pads writes its key and value into the last block of the pool, which no request ever gets.
"""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T tokens of a graph, S sequences, M blocks of the longest table

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xllm_lab.engine.device import Device
from xllm_lab.engine.ops.batch import PagedBatch

_ALIGNED = 64  # bytes; what kernels of any device load at once


class Chunk(Protocol):
    """See `runner.SequenceChunk`."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def block_table(self) -> Sequence[int]: ...


class GraphInputs(NamedTuple):
    """One graph's part of the memory."""

    token_T: Tensor
    position_T: Tensor
    batch: PagedBatch


class InputMemory:
    """The memory that the inputs of all graphs share: one piece, which one copy brings to the device.

    Args:
        tokens, sequences: of the largest graph.
        blocks_per_sequence: M.
        padding_block: nobody's, for what pads.
    """

    def __init__(
        self,
        *,
        tokens: int,
        sequences: int,
        blocks_per_sequence: int,
        block_size: int,
        padding_block: int,
        device: Device,
    ) -> None:
        self._block_size, self._padding_block, self._most_sequences = block_size, padding_block, sequences
        shapes = _shapes(tokens, sequences, blocks_per_sequence)
        self._host, self._device = device.mirrored(_num_bytes(shapes))
        host = (part.numpy() for part in _parts(self._host, shapes))
        self._token_T, self._position_T, self._slot_T, self._table_SM, self._starts_S1, self._kv_len_S, self._used_1 = (
            host
        )
        self._on_device = tuple(_parts(self._device, shapes))
        self._tables: list[Sequence[int]] = [()] * sequences  # what is in the rows of `_table_SM`

    @staticmethod
    def bytes_for(*, tokens: int, sequences: int, blocks_per_sequence: int) -> int:
        """What it would hold."""
        return _num_bytes(_shapes(tokens, sequences, blocks_per_sequence))

    def of(self, size: int, *, is_decode: bool) -> GraphInputs:
        """For a graph of that many tokens."""
        sequences = size if is_decode else self._most_sequences
        token_T, position_T, slot_T, table_SM, starts_S1, kv_len_S, used_1 = self._on_device
        batch = PagedBatch(
            slot_T=slot_T[:size],
            query_starts=[0],
            kv_lens=[],
            block_table_SM=table_SM[:sequences],
            starts_S1=starts_S1[: sequences + 1],
            kv_len_S=kv_len_S[:sequences],
            num_tokens_1=used_1,
        )
        return GraphInputs(token_T[:size], position_T[:size], batch)

    def fill(self, inputs: GraphInputs, tokens: Sequence[int], chunks: Sequence[Chunk], *, is_decode: bool) -> None:
        """A step, and padding behind it.

        Args:
            tokens: of all chunks, one after another.
        """
        size, used, rows = len(inputs.token_T), len(tokens), len(chunks)
        sequences = len(inputs.batch.kv_len_S)
        assert used <= size, f"{used} tokens in a graph of {size}"
        assert rows <= sequences, f"{rows} sequences in a graph of {sequences}"
        self._used_1[0] = used
        self._token_T[:used] = tokens
        self._token_T[used:size] = 0
        computed_S = np.fromiter((c.num_computed_tokens for c in chunks), np.int64, rows)
        for row, chunk in enumerate(chunks):
            self._put_table(row, chunk.block_table)
        if is_decode:
            assert used == rows, "a sequence of several tokens in a decoding graph"
            self._starts_S1[: size + 1] = np.arange(size + 1)
            self._locate(np.arange(rows), computed_S, size)
            self._kv_len_S[:rows] = computed_S + 1
            self._kv_len_S[rows:size] = 1
            for row in range(rows, size):
                self._put_table(row, (self._padding_block,))
        else:
            query_S = np.fromiter((len(c.token_ids) for c in chunks), np.int64, rows)
            starts_S = np.cumsum(query_S) - query_S
            sequence_T = np.repeat(np.arange(rows), query_S)
            self._locate(sequence_T, np.arange(used) + (computed_S - starts_S)[sequence_T], size)
            self._starts_S1[:rows] = starts_S
            self._starts_S1[rows : sequences + 1] = used
            self._kv_len_S[:rows] = computed_S + query_S
            self._kv_len_S[rows:sequences] = 0
        self._tell(inputs.batch, rows, size - rows if is_decode else 0)
        if self._device is not self._host:
            # The device is done with the step before, whose tokens were read, so that the host may write here again.
            self._device.copy_(self._host, non_blocking=True)

    def _locate(self, sequence_T: npt.NDArray[np.int64], position_T: npt.NDArray[np.int64], size: int) -> None:
        used, P = len(sequence_T), self._block_size
        self._position_T[:used] = position_T
        self._position_T[used:size] = 0
        self._slot_T[:used] = self._table_SM[sequence_T, position_T // P].astype(np.int64) * P + position_T % P
        # Each its own slot as far as there are: kernels may demand that no slot is written twice.
        self._slot_T[used:size] = self._padding_block * P + np.arange(size - used) % P

    def _put_table(self, row: int, table: Sequence[int]) -> None:
        if self._tables[row] != table:
            self._table_SM[row, : len(table)] = table
            self._tables[row] = table

    def _tell(self, batch: PagedBatch, rows: int, padding: int) -> None:
        """Attention that walks through sequences in Python sees those of the step only."""
        batch.num_padding = padding
        batch.query_starts = self._starts_S1[: rows + 1].tolist()
        batch.kv_lens = self._kv_len_S[:rows].tolist()
        batch.forget_gathers()


Shape = tuple[torch.dtype, tuple[int, ...]]


def _shapes(tokens: int, sequences: int, blocks_per_sequence: int) -> tuple[Shape, ...]:
    """Of tokens, positions, slots, tables, starts, lengths, and how many tokens pad nothing."""
    long, int32 = torch.int64, torch.int32
    wide = ((long, (tokens,)),) * 3
    a_sequence = (int32, (sequences, blocks_per_sequence)), (int32, (sequences + 1,)), (int32, (sequences,))
    return (*wide, *a_sequence, (int32, (1,)))


def _num_bytes(shapes: Sequence[Shape]) -> int:
    return sum(-(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED for dtype, shape in shapes)


def _parts(memory: Tensor, shapes: Sequence[Shape]) -> Iterator[Tensor]:
    """Views of bytes, each aligned."""
    for dtype, shape in shapes:
        num_bytes = math.prod(shape) * dtype.itemsize
        yield memory[:num_bytes].view(dtype).view(shape)
        memory = memory[_num_bytes([(dtype, shape)]) :]
