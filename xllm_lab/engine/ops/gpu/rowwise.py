"""Kernels that read each row once: norms, rotation, SwiGLU, and the way into the KV pool. They compute in float32."""

# ruff: noqa: PLR0917  (kernels have many operands)
# Shapes: D a row, N some of a token's heads, H head dim, H2 half of it; each rounded up to a power of 2

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, delta, weight, out, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, ADDS: tl.constexpr):
    """ADDS: x becomes x + delta, rounded to its type, before it is normalised. Grid: T."""
    at_D = tl.arange(0, WIDTH)
    is_own_D = at_D < SIZE
    place_D = tl.program_id(0).to(tl.int64) * SIZE + at_D
    x_D = tl.load(x + place_D, is_own_D, 0.0).to(tl.float32)
    if ADDS:
        x_D += tl.load(delta + place_D, is_own_D, 0.0).to(tl.float32)
        sum_D = x_D.to(x.dtype.element_ty)
        tl.store(x + place_D, sum_D, is_own_D)
        x_D = sum_D.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x_D * x_D, 0) / SIZE + eps)
    out_D = x_D * scale * tl.load(weight + at_D, is_own_D, 0.0).to(tl.float32)
    tl.store(out + place_D, out_D.to(out.dtype.element_ty), is_own_D)


@triton.jit
def head_norm(
    x,
    weight,
    eps,
    x_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: T, tiles of heads."""
    head_N = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    at_H = tl.arange(0, WIDTH)
    is_own_NH = (head_N < HEADS)[:, None] & (at_H < HEAD_DIM)[None, :]
    within_NH = head_N[:, None] * HEAD_DIM + at_H[None, :]
    place_NH = tl.program_id(0).to(tl.int64) * x_stride + within_NH
    x_NH = tl.load(x + place_NH, is_own_NH, 0.0).to(tl.float32)
    scale_N = 1.0 / tl.sqrt(tl.sum(x_NH * x_NH, 1) / HEAD_DIM + eps)
    out_NH = x_NH * scale_N[:, None] * tl.load(weight + within_NH, is_own_NH, 0.0).to(tl.float32)
    tl.store(x + place_NH, out_NH.to(x.dtype.element_ty), is_own_NH)


@triton.jit
def rope(
    x,
    cos,
    sin,
    x_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WIDTH: at least HEAD_DIM / 2. Grid: T, tiles of heads."""
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head_N = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    at_H2 = tl.arange(0, WIDTH)
    is_own_H2 = at_H2 < HALF
    is_own_NH2 = (head_N < HEADS)[:, None] & is_own_H2[None, :]
    left_NH2 = token * x_stride + head_N[:, None] * HEAD_DIM + at_H2[None, :]
    a_NH2 = tl.load(x + left_NH2, is_own_NH2, 0.0).to(tl.float32)
    b_NH2 = tl.load(x + left_NH2 + HALF, is_own_NH2, 0.0).to(tl.float32)
    # The angles' halves differ in the sign of the sine only; the right one has it plain.
    angle_H2 = token * HEAD_DIM + HALF + at_H2
    cos_H2 = tl.load(cos + angle_H2, is_own_H2, 0.0).to(tl.float32)[None, :]
    sin_H2 = tl.load(sin + angle_H2, is_own_H2, 0.0).to(tl.float32)[None, :]
    tl.store(x + left_NH2, (a_NH2 * cos_H2 - b_NH2 * sin_H2).to(x.dtype.element_ty), is_own_NH2)
    tl.store(x + left_NH2 + HALF, (b_NH2 * cos_H2 + a_NH2 * sin_H2).to(x.dtype.element_ty), is_own_NH2)


@triton.jit
def swiglu(gate_up, out, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """SIZE: of the result's rows. Grid: T, tiles of a row."""
    row = tl.program_id(0).to(tl.int64)
    at_D = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_own_D = at_D < SIZE
    gate_D = tl.load(gate_up + row * 2 * SIZE + at_D, is_own_D, 0.0).to(tl.float32)
    up_D = tl.load(gate_up + row * 2 * SIZE + SIZE + at_D, is_own_D, 0.0).to(tl.float32)
    out_D = gate_D / (1.0 + tl.exp(-gate_D)) * up_D
    tl.store(out + row * SIZE + at_D, out_D.to(out.dtype.element_ty), is_own_D)


@triton.jit
def reshape_and_cache(k, v, k_pool, v_pool, slots, k_stride, v_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """SIZE: of a token's keys, all heads. Grid: T."""
    token = tl.program_id(0).to(tl.int64)
    at_D = tl.arange(0, WIDTH)
    is_own_D = at_D < SIZE
    place_D = tl.load(slots + token) * SIZE + at_D
    tl.store(k_pool + place_D, tl.load(k + token * k_stride + at_D, is_own_D), is_own_D)
    tl.store(v_pool + place_D, tl.load(v + token * v_stride + at_D, is_own_D), is_own_D)
