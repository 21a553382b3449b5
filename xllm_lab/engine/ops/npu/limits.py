"""What the documentation of each operator rules out, checked before a call; see `operators.check_calls`.

Sources: the operators' documentation in torch_npu 2.13.0 (`_op_plugin_docs.py`) for Atlas A2 and A3, inference. The
device finds some of it out by an error number, some by wrong results, and some (block ids, repeated slots) never.

Values on a device are read where that is possible: not while a step is captured, nor while a graph is updated.
"""

# ruff: noqa: PLR0917  (signatures are the operators' own)
# Shapes: T packed query tokens, R rows, S sequences, N query heads, K KV heads, H head dim, D any last dimension,
#         B blocks of the pool, P tokens per block, M blocks of the longest table, E experts, k experts of a token

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xllm_lab.engine.ops.npu.operators import LimitError
from xllm_lab.engine.ops.tape import is_captured

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
INTEGERS = (torch.int32, torch.int64)
ATTENTION_DTYPES: tuple[torch.dtype, ...] = HALVES
EXCHANGE_DTYPES: tuple[torch.dtype, ...] = HALVES
MOST_EXCHANGED_ROWS = 256  # of a rank: BS of npu_moe_distribute_dispatch on Atlas A2, 512 on A3 (torch_npu 7.0's API)
CAUSAL_MASK = 2048  # side of the compressed mask of sparse modes 2, 3 and 4
PAGED_BLOCK_TOKENS = range(128, 513, 128)
MAX_SEQUENCES = 65_536
MAX_HEAD_DIM = 512
MAX_GROUP = 64  # query heads of a KV head
MAX_KV_WIDTH = 65_535  # of a pool seen as [B, P, K * H]
ROTARY_WIDTH = 896
ROTARY_COUNT = 1000
MAX_LIST = 128  # tensors of a list
MAX_EXPERTS = 10_240
MAX_TOP_K = 512
MAX_SOFTMAX_TOP_K = 1024
WORLD_SIZES = (1, 2, 4, 8)  # of a matrix product with all-reduce, on a full mesh of HCCS links
FORMATS = {2: "ND", 29: "FRACTAL_NZ"}


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
) -> None:
    """Packed queries over a paged pool."""
    _contiguous(query=query, key=key, value=value, atten_mask=atten_mask, block_table=block_table)
    _dtype("query", query, ATTENTION_DTYPES)
    _same_dtype(query=query, key=key, value=value)
    _one_of("input_layout", input_layout, ("TND",))
    _dims("query", query, 3)
    T, N, H = query.shape
    _require(num_heads == N, "num_heads", num_heads, f"{N}, those of query")
    _require(0 < H <= MAX_HEAD_DIM and H % 16 == 0, "head dim", H, f"multiples of 16 up to {MAX_HEAD_DIM}")
    K = num_key_value_heads
    _require(K > 0 and N % K == 0 and N // K <= MAX_GROUP, "num_key_value_heads", K, f"{N} heads in groups to 64")
    _require(block_size in PAGED_BLOCK_TOKENS, "block_size", block_size, "128, 256, 384, 512")
    for name, cache in (("key", key), ("value", value)):
        _dims(name, cache, 3)
        _shape(name, cache, (cache.shape[0], block_size, K * H))
        _require(K * H <= MAX_KV_WIDTH, f"last dimension of {name}", K * H, f"at most {MAX_KV_WIDTH}")
    _one_of("sparse_mode", sparse_mode, (3,))
    _shape("atten_mask", atten_mask, (CAUSAL_MASK, CAUSAL_MASK))
    _dtype("atten_mask", atten_mask, (torch.bool, torch.int8, torch.uint8))
    _lengths(T, actual_seq_lengths, actual_seq_lengths_kv)
    _block_table(block_table, actual_seq_lengths_kv, block_size, key.shape[0])
    if out:
        _require(len(out) == 2, "number of outputs", len(out), "2")
        _contiguous(out=out[0])
        _shape("out", out[0], (T, N, H))
        _same_dtype(query=query, out=out[0])


def _lengths(T: int, cumulated: Sequence[int], kv_lens: Sequence[int]) -> None:
    S = len(cumulated)
    _require(0 < S <= MAX_SEQUENCES, "number of sequences", S, f"1 to {MAX_SEQUENCES}")
    _require(len(kv_lens) == S, "length of actual_seq_lengths_kv", len(kv_lens), f"{S}, a length for each sequence")
    _require(cumulated[-1] == T, "last of actual_seq_lengths", cumulated[-1], f"{T}, the tokens of query")
    for row, (before, after) in enumerate(itertools.pairwise([0, *cumulated])):
        _require(after >= before, f"actual_seq_lengths[{row}]", after, f"at least {before}: it is cumulated")
        _require(
            kv_lens[row] >= after - before,
            f"actual_seq_lengths_kv[{row}]",
            kv_lens[row],
            f"at least the {after - before} tokens computed",
        )


def _block_table(table_SM: Tensor, kv_lens: Sequence[int], P: int, B: int) -> None:
    _dtype("block_table", table_SM, (torch.int32,))
    _dims("block_table", table_SM, 2)
    _require(len(table_SM) == len(kv_lens), "rows of block_table", len(table_SM), f"{len(kv_lens)}, one a sequence")
    most = max(-(-length // P) for length in kv_lens)
    _require(table_SM.shape[1] >= most, "columns of block_table", table_SM.shape[1], f"at least {most}")
    if _readable(table_SM):
        for row, (ids, length) in enumerate(zip(table_SM.tolist(), kv_lens, strict=True)):
            for block in ids[: -(-length // P)]:
                _require(0 <= block < B, f"block_table[{row}]", block, f"0 to {B - 1}")


def npu_scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *, cache_mode: str
) -> None:
    """Tokens into a pool in plain layout."""
    _contiguous(key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping)
    _one_of("cache_mode", cache_mode, ("Norm",))
    _same_dtype(key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    _dims("key", key, 3)
    _dims("key_cache", key_cache, 4)
    _shape("value", value, (*key.shape[:2], value.shape[-1]))
    B, P = key_cache.shape[:2]
    _shape("key_cache", key_cache, (B, P, *key.shape[1:]))
    _shape("value_cache", value_cache, (B, P, *value.shape[1:]))
    _dtype("slot_mapping", slot_mapping, INTEGERS)
    _shape("slot_mapping", slot_mapping, (len(key),))
    if _readable(slot_mapping):
        slots = slot_mapping.tolist()
        for slot in slots:
            _require(0 <= slot < B * P, "slot_mapping", slot, f"0 to {B * P - 1}")
        _require(len(set(slots)) == len(slots), "slot_mapping", slots, "each slot once")


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> None:
    """Over the dimensions that gamma has."""
    _dtype("input", input, FLOATS)
    _same_dtype(input=input, gamma=gamma)
    _require(2 <= input.dim() <= 8, "dimensions of input", input.dim(), "2 to 8")
    _shape("gamma", gamma, tuple(input.shape[-gamma.dim() :]))
    _require(epsilon > 0, "epsilon", epsilon, "above 0")


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> None:
    """As `npu_rms_norm`, of a sum."""
    npu_rms_norm(x1, gamma, epsilon)
    _shape("x2", x2, tuple(x1.shape))
    _same_dtype(x1=x1, x2=x2)


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> None:
    """Batch, sequence, heads, width; one row of cosines and sines for each token."""
    _one_of("rotary_mode", rotary_mode, ("half",))
    _dtype("input", input, FLOATS)
    _same_dtype(input=input, r1=r1, r2=r2)
    _dims("input", input, 4)
    B, S, N, D = input.shape
    _require(D < ROTARY_WIDTH and D % 2 == 0, "last dimension of input", D, f"even, below {ROTARY_WIDTH}")
    _require(B < ROTARY_COUNT and N < ROTARY_COUNT, "batch and heads of input", (B, N), f"below {ROTARY_COUNT}")
    for name, tensor in (("r1", r1), ("r2", r2)):
        _dims(name, tensor, 4)
        _require(tuple(tensor.shape) == (1, S, 1, D), f"shape of {name}", tuple(tensor.shape), f"(1, {S}, 1, {D})")


def npu_swiglu(input: Tensor, dim: int = -1) -> None:
    """Halves side by side."""
    _dtype("input", input, FLOATS)
    _require(1 <= input.dim() <= 8, "dimensions of input", input.dim(), "1 to 8")
    _require(input.shape[dim] % 2 == 0, "width of input", input.shape[dim], "even")


def npu_mm_all_reduce_base(x1: Tensor, x2: Tensor, hcom: str, *, reduce_op: str, bias: Tensor | None = None) -> None:
    """A product of plain matrices, summed over the ranks."""
    _one_of("reduce_op", reduce_op, ("sum",))
    _dtype("x1", x1, HALVES)
    _same_dtype(x1=x1, x2=x2)
    _contiguous(x1=x1)
    _require(x1.dim() in (2, 3), "dimensions of x1", x1.dim(), "2 or 3")
    _dims("x2", x2, 2)
    _require(x1.shape[-1] == x2.shape[0], "inner dimension", (x1.shape[-1], x2.shape[0]), "two equal ones")
    _require(x1.numel() > 0 and x2.numel() > 0, "elements", (x1.numel(), x2.numel()), "matrices that are not empty")
    _require(bool(hcom), "hcom", hcom, "the name of a communicator")
    if bias is not None:
        _shape("bias", bias, (x2.shape[1],))


def npu_prefetch(input: Tensor, dependency: Tensor | None, max_size: int, offset: int = 0) -> None:
    """Into the L2 cache; without a dependency only where no graph is compiled."""
    num_bytes = input.numel() * input.element_size()
    _require(max_size > 0, "max_size", max_size, "above 0")
    _require(0 <= offset < num_bytes, "offset", offset, f"0 to {num_bytes - 1}, within the tensor")


def npu_format_cast(input: Tensor, acl_format: int) -> None:
    """Between the plain layout and the one of matrix units."""
    _one_of("acl_format", acl_format, tuple(FORMATS))
    _require(input.dim() >= 2, "dimensions of input", input.dim(), "2 or more")
    if FORMATS[acl_format] == "FRACTAL_NZ":
        _dtype("input", input, (*HALVES, torch.int8))


def npu_moe_gating_top_k_softmax(x: Tensor, finished: Tensor | None, k: int) -> None:
    """The largest of a softmax over all experts."""
    _dtype("x", x, FLOATS)
    _require(x.dim() in (2, 3), "dimensions of x", x.dim(), "2 or 3")
    most = min(x.shape[-1], MAX_SOFTMAX_TOP_K)
    _require(0 < k <= most, "k", k, f"1 to {most}")
    if finished is not None:
        _dtype("finished", finished, (torch.bool,))
        _shape("finished", finished, tuple(x.shape[:-1]))


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: Sequence[int],
    row_idx_type: int,
) -> None:
    """Rows sorted by expert, none dropped, with the number that each expert gets."""
    _dtype("x", x, (*FLOATS, torch.int8))
    _dims("x", x, 2)
    _dtype("expert_idx", expert_idx, (torch.int32,))
    _dims("expert_idx", expert_idx, 2)
    _require(len(expert_idx) == len(x), "rows of expert_idx", len(expert_idx), f"{len(x)}, those of x")
    _require(0 < expert_num <= MAX_EXPERTS, "expert_num", expert_num, f"1 to {MAX_EXPERTS}")
    _one_of("drop_pad_mode", drop_pad_mode, (0,))
    _one_of("expert_tokens_num_type", expert_tokens_num_type, (1,))
    _require(expert_tokens_num_flag, "expert_tokens_num_flag", expert_tokens_num_flag, "True")
    _one_of("quant_mode", quant_mode, (-1,))
    _one_of("row_idx_type", row_idx_type, (0, 1))
    _require(active_num >= -1, "active_num", active_num, "-1 or more")
    start, end = active_expert_range
    _require(0 <= start < end <= expert_num, "active_expert_range", list(active_expert_range), f"in 0 to {expert_num}")
    if _readable(expert_idx):
        most = int(expert_idx.max()) if expert_idx.numel() else 0
        _require(most < expert_num, "expert_idx", most, f"below expert_num, {expert_num}")


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor,
    split_item: int,
    group_type: int,
    group_list_type: int,
) -> None:
    """One matrix of rows, those of each expert together, with one weight a group."""
    _require(len(x) == 1 and len(weight) == 1, "lists", (len(x), len(weight)), "one tensor each")
    _one_of("split_item", split_item, (2, 3))
    _one_of("group_type", group_type, (0,))
    _one_of("group_list_type", group_list_type, (0, 1))
    _dtype("x", x[0], HALVES)
    _same_dtype(x=x[0], weight=weight[0])
    _dims("x", x[0], 2)
    _dims("weight", weight[0], 3)
    E, inputs, _ = weight[0].shape
    _require(x[0].shape[1] == inputs, "inner dimension", (x[0].shape[1], inputs), "two equal ones")
    _dtype("group_list", group_list, (torch.int64,))
    _shape("group_list", group_list, (E,))
    if _readable(group_list):
        counts = group_list.tolist()
        rows = sum(counts) if group_list_type == 1 else counts[-1]
        _require(0 <= rows <= len(x[0]), "rows in group_list", rows, f"at most {len(x[0])}, those of x")


def npu_moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False
) -> None:
    """Rows back to their tokens, weighted and summed."""
    _dtype("permuted_tokens", permuted_tokens, FLOATS)
    _dims("permuted_tokens", permuted_tokens, 2)
    _dtype("sorted_indices", sorted_indices, (torch.int32,))
    _dims("sorted_indices", sorted_indices, 1)
    _require(not padded_mode, "padded_mode", padded_mode, "False")
    top_k = 1 if probs is None else probs.shape[1]
    _require(top_k <= MAX_TOP_K, "experts of a token", top_k, f"at most {MAX_TOP_K}")
    if probs is not None:
        _require(probs.numel() == len(sorted_indices), "elements of probs", probs.numel(), f"{len(sorted_indices)}")
    if _readable(sorted_indices):
        seen = set(sorted_indices.tolist())
        _require(len(seen) == len(sorted_indices), "sorted_indices", len(seen), f"{len(sorted_indices)} different rows")


def npu_moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    global_bs: int,
    expert_token_nums_type: int,
    quant_mode: int,
) -> None:
    """Rows to the ranks of their experts."""
    _dtype("x", x, HALVES)
    _dims("x", x, 2)
    _dtype("expert_ids", expert_ids, (torch.int32,))
    _routes("expert_ids", expert_ids, len(x))
    _ranks(group_ep, ep_world_size, ep_rank_id, moe_expert_num)
    _one_of("quant_mode", quant_mode, (0,))
    _one_of("expert_token_nums_type", expert_token_nums_type, (0, 1))
    _global_rows(global_bs, len(x), ep_world_size)


def npu_moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    global_bs: int,
) -> None:
    """Rows back from the ranks of their experts."""
    _dtype("expand_x", expand_x, HALVES)
    _dims("expand_x", expand_x, 2)
    _dtype("expert_scales", expert_scales, (torch.float32,))
    _routes("expert_ids", expert_ids, len(expert_ids))
    _shape("expert_scales", expert_scales, tuple(expert_ids.shape))
    for name, counts in (("assist_info_for_combine", assist_info_for_combine), ("ep_send_counts", ep_send_counts)):
        _dtype(name, counts, (torch.int32,))
        _dims(name, counts, 1)
    _ranks(group_ep, ep_world_size, ep_rank_id, moe_expert_num)
    _global_rows(global_bs, len(expert_ids), ep_world_size)


def _routes(name: str, expert_ids: Tensor, rows: int) -> None:
    _dtype(name, expert_ids, (torch.int32,))
    _dims(name, expert_ids, 2)
    _require(len(expert_ids) == rows, f"rows of {name}", len(expert_ids), f"{rows}, one a token")


def _ranks(group: str, size: int, rank: int, experts: int) -> None:
    _require(bool(group), "group_ep", group, "the name of a communicator")
    _require(0 <= rank < size, "ep_rank_id", rank, f"0 to {size - 1}")
    _require(experts > 0 and experts % size == 0, "moe_expert_num", experts, f"a multiple of {size} ranks")


def _global_rows(global_bs: int, rows: int, size: int) -> None:
    fits = global_bs == 0 or (global_bs >= rows * size and global_bs % size == 0)
    _require(fits, "global_bs", global_bs, f"0, or a multiple of {size} from {rows * size} on")


def _require(holds: bool, what: str, value: object, accepted: str) -> None:
    if not holds:
        raise LimitError(f"{what} is {value}; accepted: {accepted}")


def _one_of(name: str, value: object, accepted: Sequence[object]) -> None:
    _require(value in accepted, name, repr(value), ", ".join(map(repr, accepted)))


def _contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        _require(tensor.is_contiguous(), f"strides of {name}", tensor.stride(), "a contiguous tensor")


def _dtype(name: str, tensor: Tensor, accepted: Sequence[torch.dtype]) -> None:
    _require(tensor.dtype in accepted, f"dtype of {name}", tensor.dtype, ", ".join(map(str, accepted)))


def _same_dtype(**tensors: Tensor) -> None:
    first, *others = tensors
    for name in others:
        _require(tensors[name].dtype == tensors[first].dtype, f"dtype of {name}", tensors[name].dtype, f"{first}'s")


def _dims(name: str, tensor: Tensor, accepted: int) -> None:
    _require(tensor.dim() == accepted, f"dimensions of {name}", tensor.dim(), str(accepted))


def _shape(name: str, tensor: Tensor, accepted: tuple[int, ...]) -> None:
    _require(tuple(tensor.shape) == accepted, f"shape of {name}", tuple(tensor.shape), str(accepted))


def _readable(tensor: Tensor) -> bool:
    return tensor.is_cpu or (not tensor.is_meta and math.prod(tensor.shape) > 0 and not is_captured())
