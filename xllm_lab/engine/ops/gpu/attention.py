"""Attention of new tokens over the paged KV pool, with online softmax (Milakov and Gimelshein, 2018; FlashAttention).

    a program      a tile of one sequence's new tokens, with all query heads of one KV head: its rows
    its loop       tiles of keys, looked up in the block table token by token, so that any block size will do
    a split loop   programs share the keys of a decoding token; `merge` weighs their results (flash-decoding)

Lengths, starts and block tables are read from memory, and the grid depends on tensors' shapes only: a captured launch
serves whatever step these hold later.
"""

# ruff: noqa: PLR0915, PLR0917  (a kernel is one function, of many operands)
# Shapes: R rows of a tile (token and query head), L keys of a tile, H head dim, W the next power of 2 of it

import triton
import triton.language as tl

_SEARCHED = tl.constexpr(128)  # sequences looked at at once
# Numbers that would otherwise be compiled in when they are 1 or a multiple of 16.
_OTHER_EACH_STEP = ("table_stride", "num_sequences", "num_splits")
_NOBODYS_START = tl.constexpr(1 << 30)  # behind any token


@triton.jit(do_not_specialize=_OTHER_EACH_STEP)
def attend(
    q,
    k_pool,
    v_pool,
    out,
    partial_lse,
    table,
    starts,
    kv_lens,
    scale,
    q_stride,
    table_stride,
    num_sequences,
    num_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    LEAST_KEYS: tl.constexpr,
    IS_DECODE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Grid: tiles of tokens, KV heads, splits.

    Args:
        out: [T, N, H]; where IS_SPLIT, [T, N, splits, H] in float32, with log2 of their sums in partial_lse.
        scale: of scores, with log2(e) in it.
        GROUP: query heads of a KV head.
        ROWS: a power of 2, at least TILE_QUERIES * GROUP.
        LEAST_KEYS: fewer are not split; a multiple of TILE_KEYS.
        IS_DECODE: every sequence has one new token, and is a tile.
        IN_FLOAT32: products of float32 copies.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tile
    first = 0
    if not IS_DECODE:
        sequence = _sequence_of(tile, starts, num_sequences, TILE_QUERIES)
        first = (tile - sequence - tl.load(starts + sequence) // TILE_QUERIES) * TILE_QUERIES
    start = tl.load(starts + sequence)
    num_queries = tl.load(starts + sequence + 1) - start
    if first >= num_queries:
        return
    computed = tl.load(kv_lens + sequence) - num_queries

    row_R = tl.arange(0, ROWS)
    query_R = first + row_R // GROUP
    is_own_R = (row_R < TILE_QUERIES * GROUP) & (query_R < num_queries)
    width_W = tl.arange(0, WIDTH)
    is_own_RW = is_own_R[:, None] & (width_W < HEAD_DIM)[None, :]
    token_R = (start + query_R).to(tl.int64)
    column_R = head * GROUP + row_R % GROUP
    q_RW = tl.load(q + (token_R * q_stride + column_R * HEAD_DIM)[:, None] + width_W[None, :], is_own_RW, 0.0)

    begin = 0
    end = computed + tl.minimum(first + TILE_QUERIES, num_queries)
    if IS_SPLIT:
        share = tl.maximum(tl.cdiv(tl.cdiv(end, num_splits), TILE_KEYS) * TILE_KEYS, LEAST_KEYS)
        begin = tl.minimum(split * share, end)
        end = tl.minimum(begin + share, end)

    most_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    out_RW = tl.zeros([ROWS, WIDTH], tl.float32)
    for at in range(begin, end, TILE_KEYS):
        key_L = at + tl.arange(0, TILE_KEYS)
        is_key_L = key_L < end
        block_L = tl.load(table + sequence * table_stride + key_L // BLOCK_TOKENS, is_key_L, 0)
        slot_L = block_L.to(tl.int64) * BLOCK_TOKENS + key_L % BLOCK_TOKENS
        place_L = (slot_L * KV_HEADS + head) * HEAD_DIM
        # What is behind the end may be anything, NaN too: it is not read.
        is_key_LW = is_key_L[:, None] & (width_W < HEAD_DIM)[None, :]
        k_LW = tl.load(k_pool + place_L[:, None] + width_W[None, :], is_key_LW, 0.0)
        score_RL = _product(q_RW, tl.trans(k_LW), IN_FLOAT32) * scale
        sees_RL = is_key_L[None, :] & (key_L[None, :] <= (computed + query_R)[:, None])
        score_RL = tl.where(sees_RL, score_RL, float("-inf"))
        # Every row sees the first key of the first tile, so that this is finite from then on.
        more_R = tl.maximum(most_R, tl.max(score_RL, 1))
        fade_R = tl.exp2(most_R - more_R)
        weight_RL = tl.exp2(score_RL - more_R[:, None])
        v_LW = tl.load(v_pool + place_L[:, None] + width_W[None, :], is_key_LW, 0.0)
        out_RW = out_RW * fade_R[:, None] + _product(weight_RL.to(v_LW.dtype), v_LW, IN_FLOAT32)
        sum_R = sum_R * fade_R + tl.sum(weight_RL, 1)
        most_R = more_R

    place_R = token_R * (KV_HEADS * GROUP) + column_R
    if IS_SPLIT:
        place_R = place_R * num_splits + split
        sum_R = tl.where(begin < end, sum_R, 1.0)  # a split without keys is 0, and weighs -inf
        tl.store(partial_lse + place_R, most_R + tl.log2(sum_R), is_own_R)
    place_RW = place_R[:, None] * HEAD_DIM + width_W[None, :]
    tl.store(out + place_RW, (out_RW / sum_R[:, None]).to(out.dtype.element_ty), is_own_RW)


@triton.jit(do_not_specialize=_OTHER_EACH_STEP)
def merge(
    partial,
    partial_lse,
    out,
    num_splits,
    MOST_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One token and query head: the mean of its splits' results, each weighed by its sum. Grid: T * N."""
    row = tl.program_id(0).to(tl.int64)
    split_S = tl.arange(0, MOST_SPLITS)
    width_W = tl.arange(0, WIDTH)
    place_S = row * num_splits + split_S
    is_split_S = split_S < num_splits
    lse_S = tl.load(partial_lse + place_S, is_split_S, float("-inf"))
    weight_S = tl.exp2(lse_S - tl.max(lse_S, 0))
    is_own_SW = is_split_S[:, None] & (width_W < HEAD_DIM)[None, :]
    partial_SW = tl.load(partial + place_S[:, None] * HEAD_DIM + width_W[None, :], is_own_SW, 0.0)
    out_W = tl.sum(partial_SW * weight_S[:, None], 0) / tl.sum(weight_S, 0)
    tl.store(out + row * HEAD_DIM + width_W, out_W.to(out.dtype.element_ty), width_W < HEAD_DIM)


@triton.jit
def _sequence_of(tile, starts, num_sequences, TILE_QUERIES: tl.constexpr):
    """Whose tile it is: sequence s has those from starts[s] // TILE_QUERIES + s on, which are enough, and may be more.

    So T // TILE_QUERIES + S tiles do, however the tokens are shared out. (vLLM's Triton attention numbers them alike.)
    """
    behind = 0
    for at in range(0, num_sequences, _SEARCHED):
        sequence_S = at + tl.arange(0, _SEARCHED)
        start_S = tl.load(starts + sequence_S, sequence_S < num_sequences, _NOBODYS_START)
        behind += tl.sum((start_S // TILE_QUERIES + sequence_S <= tile).to(tl.int32), 0)
    return behind - 1


@triton.jit
def _product(a, b, IN_FLOAT32: tl.constexpr):
    """Summed in float32; float32 operands are not rounded to TF32."""
    if IN_FLOAT32:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
