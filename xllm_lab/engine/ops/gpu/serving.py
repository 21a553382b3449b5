"""The engine's operators served by Triton kernels; signatures and meaning are those of `ops.reference`.

They read lengths and tables from the batch's tensors, never from its lists, so that all of a step can be captured.
"""

# Shapes: T packed query tokens, S sequences, N query heads, K KV heads, H head dim, D any last dimension, B blocks of
#         the pool, P tokens per block

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.ops.batch import PagedBatch
from xllm_lab.engine.ops.tape import taped

MAX_HEAD_DIM = 256  # what a tile of keys and values leaves room for in a core's shared memory
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # bfloat16 and copies that run beside the computing

_LEAST_ROWS = 16  # of a matrix product in Triton
_CHUNK_ROWS = {2: 64, 4: 16}  # by bytes of an element; more do not fit into registers
_KEY_TILE_BYTES = 16 << 10
_MOST_SPLITS = 32
_SPLIT_KEYS = 256  # fewer are not worth a program and a merge
_PROGRAMS_PER_CORE = 4  # that decoding with few sequences is split for
_WIDE = 2048  # elements of a row that four warps read at once
_TILE_HEADS = 8


def fails(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve this type here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in _DTYPES:
        return f"no kernels for {str(dtype).removeprefix('torch.')}"
    capability = torch.get_device_module(device).get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"compute capability {capability} is below {_LEAST_CAPABILITY}"
    return None


def attention_fails(head_dim: int) -> str | None:
    """Why the attention cannot serve heads of this size, or None."""
    return f"head_dim {head_dim} is more than {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else None


def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
    """Every launch goes through here."""
    if math.prod(grid):
        kernel[grid](*operands, **constants)


class _Tiles(NamedTuple):
    """How the attention of a step is cut.

    Attributes:
        rows: of a product; a power of 2.
        queries: tokens of a tile.
        keys: of a tile.
        grid: tiles, KV heads, splits.
    """

    rows: int
    queries: int
    keys: int
    grid: tuple[int, int, int]


class TritonOps:
    """Operators of any dtype.

    Args:
        num_cores: streaming multiprocessors to keep busy.
        is_interpreted: Triton runs the kernels in Python; its products of bfloat16 are wrong there (3.9.0 multiplies
            the bits as integers), so that they are made in float32.
    """

    def __init__(self, num_cores: int, *, is_interpreted: bool = False) -> None:
        from xllm_lab.engine.ops.gpu import attention, rowwise

        self._attention, self._rowwise = attention, rowwise
        self._num_cores, self._is_interpreted = num_cores, is_interpreted

    @taped
    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor) -> Tensor:
        """As `reference.rms_norm`."""
        self._norm(x_TD, None, weight_D, eps, out_TD)
        return out_TD

    @taped
    def add_rms_norm(
        self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `reference.add_rms_norm`."""
        self._norm(x_TD, delta_TD, weight_D, eps, out_TD)
        return x_TD, out_TD

    @taped
    def head_norm(self, x_TNH: Tensor, weight_NH: Tensor, eps: float) -> Tensor:
        """As `reference.head_norm`."""
        T, N, H = x_TNH.shape
        constants = {"HEADS": N, "HEAD_DIM": H, "TILE_HEADS": _TILE_HEADS, "WIDTH": _power_of_2(H)}
        grid = (T, -(-N // _TILE_HEADS))
        launch(self._rowwise.head_norm, grid, x_TNH, weight_NH, eps, _token_stride(x_TNH), **constants)
        return x_TNH

    @taped
    def rope(self, x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        """As `reference.rope`, with the angles of `reference.rope_angles`."""
        T, N, H = x_TNH.shape
        constants = {"HEADS": N, "HEAD_DIM": H, "TILE_HEADS": _TILE_HEADS, "WIDTH": _power_of_2(H // 2)}
        grid = (T, -(-N // _TILE_HEADS))
        launch(self._rowwise.rope, grid, x_TNH, cos_TH, sin_TH, _token_stride(x_TNH), **constants)
        return x_TNH

    @taped
    def swiglu(self, gate_up_TD: Tensor, out_TD: Tensor) -> Tensor:
        """As `reference.swiglu`."""
        T, D = out_TD.shape
        width = min(_power_of_2(D), _WIDE)
        launch(self._rowwise.swiglu, (T, -(-D // width)), gate_up_TD, out_TD, SIZE=D, WIDTH=width)
        return out_TD

    @taped
    def reshape_and_cache(
        self, k_TKH: Tensor, v_TKH: Tensor, k_BPKH: Tensor, v_BPKH: Tensor, batch: PagedBatch
    ) -> None:
        """As `reference.reshape_and_cache`."""
        T, K, H = k_TKH.shape
        operands = (k_TKH, v_TKH, k_BPKH, v_BPKH, batch.slot_T, _token_stride(k_TKH), _token_stride(v_TKH))
        launch(self._rowwise.reshape_and_cache, (T,), *operands, SIZE=K * H, WIDTH=_power_of_2(K * H))

    @taped
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
        """As `reference.paged_attention`. Sequences that pad a graph are attended to like any other."""
        N, H = q_TNH.shape[1:]
        _, P, K, _ = k_BPKH.shape
        tiles = self._tiles(q_TNH, k_BPKH, batch)
        splits, sequences = tiles.grid[2], len(batch.kv_len_S)
        partial, partial_lse = out_TNH, out_TNH
        if splits > 1:
            partial = q_TNH.new_empty((*q_TNH.shape[:2], splits, H), dtype=torch.float32)
            partial_lse = partial.new_empty(partial.shape[:3])
        launch(
            self._attention.attend,
            tiles.grid,
            *(q_TNH, k_BPKH, v_BPKH, partial, partial_lse),
            *(batch.block_table_SM, batch.starts_S1, batch.kv_len_S),
            *(
                (scale or H**-0.5) * math.log2(math.e),
                _token_stride(q_TNH),
                batch.block_table_SM.stride(0),
                sequences,
                splits,
            ),
            KV_HEADS=K,
            GROUP=N // K,
            HEAD_DIM=H,
            WIDTH=max(_power_of_2(H), _LEAST_ROWS),
            BLOCK_TOKENS=P,
            ROWS=tiles.rows,
            TILE_QUERIES=tiles.queries,
            TILE_KEYS=tiles.keys,
            LEAST_KEYS=_SPLIT_KEYS,
            IS_DECODE=batch.is_decode,
            IS_SPLIT=splits > 1,
            IN_FLOAT32=self._is_interpreted,
        )
        if splits > 1:
            constants = {"MOST_SPLITS": _MOST_SPLITS, "HEAD_DIM": H, "WIDTH": _power_of_2(H)}
            launch(self._attention.merge, (len(q_TNH) * N,), partial, partial_lse, out_TNH, splits, **constants)

    def _norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, out_TD: Tensor) -> None:
        T, D = x_TD.shape
        constants = {"SIZE": D, "WIDTH": _power_of_2(D), "ADDS": delta_TD is not None}
        delta_TD = x_TD if delta_TD is None else delta_TD
        warps = 4 if D <= _WIDE else 8
        launch(self._rowwise.rms_norm, (T,), x_TD, delta_TD, weight_D, out_TD, eps, **constants, num_warps=warps)

    def _tiles(self, q_TNH: Tensor, k_BPKH: Tensor, batch: PagedBatch) -> _Tiles:
        """From shapes only, and whether the batch decodes, which are a graph's for good."""
        T, N, H = q_TNH.shape
        _, P, K, _ = k_BPKH.shape
        sequences, most_blocks = batch.block_table_SM.shape
        group = N // K
        keys = min(max(_KEY_TILE_BYTES // (_power_of_2(H) * k_BPKH.element_size()), 16), 64)
        if not batch.is_decode:
            rows = max(_power_of_2(group), _CHUNK_ROWS[k_BPKH.element_size()])
            queries = rows // group
            return _Tiles(rows, queries, keys, (T // queries + sequences, K, 1))
        wanted = -(-_PROGRAMS_PER_CORE * self._num_cores // (sequences * K))
        splits = max(min(wanted, -(-most_blocks * P // _SPLIT_KEYS), _MOST_SPLITS), 1)
        return _Tiles(max(_power_of_2(group), _LEAST_ROWS), 1, keys, (sequences, K, splits))


@functools.cache
def operators(device: torch.device) -> TritonOps:
    """Those of an accelerator."""
    properties = torch.get_device_module(device).get_device_properties(device)
    return TritonOps(properties.multi_processor_count)


def _token_stride(x_TNH: Tensor) -> int:
    """Heads of a token are side by side; tokens may be strided."""
    assert x_TNH[0].is_contiguous(), f"heads apart: strides {x_TNH.stride()}"
    return x_TNH.stride(0)


def _power_of_2(least: int) -> int:
    """The next one."""
    return 1 << (least - 1).bit_length()
