"""A device's operators beside their definitions: the same inputs, computed in float32 by plain PyTorch on the CPU."""

# Shapes: T packed tokens, S sequences, N query heads, K KV heads, H head dim, D hidden size, B blocks of the pool,
#         P tokens per block, O outputs of a layer

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.ops import reference
from xllm_lab.engine.ops.batch import paged_batch
from xllm_lab.engine.ops.table import Ops

_EPS = 1e-5
# (tokens computed now, tokens in the pool before): a prompt, a chunk of one, decodes at and beside a block's edge.
_SEQUENCES = ((37, 0), (16, 128), (1, 0), (1, 127), (1, 128), (1, 300))
# Largest error that rounding explains, in units of the results' standard deviation: a few roundings of the operator's
# inputs and of its result, 2^-24 or 2^-9 each, and in a sum of many products the square root of their number.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


class OperatorCheck(NamedTuple):
    """One operator's largest error, as a fraction of the standard deviation of its results.

    Attributes:
        by: what serves it here.
    """

    op: str
    by: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # not so of a NaN


class Sizes(NamedTuple):
    """Of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    block_size: int


def check_operators(ops: Ops, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[OperatorCheck]:
    """Every operator that serves a model of these sizes here.

    Args:
        dtype: of the model; one of `TOLERANCES`.
    """
    checks = {
        "linear": _linear,
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "head_norm": _head_norm,
        "rope": _rope,
        "swiglu": _swiglu,
        "paged_attention": _attention,
        "argmax": _argmax,
    }
    for op, check in checks.items():
        found, expected = check(ops, sizes, _Drawn(dtype, device))
        error = float((found.cpu().float() - expected).abs().max() / expected.std())
        yield OperatorCheck(op, ops.served[op].by, error, 0.0 if op == "argmax" else TOLERANCES[dtype])


class _Drawn:
    """Random numbers that the device's dtype holds exactly, here and there."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator().manual_seed(11)

    def __call__(self, *shape: int) -> tuple[Tensor, Tensor]:
        """(On the device in its dtype, on the CPU in float32)."""
        rounded = torch.randn(shape, generator=self._generator).to(self._dtype)
        return rounded.to(self._device, copy=True), rounded.float()

    def like(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=self._dtype, device=self._device)


_Pair = tuple[Tensor, Tensor]


def _linear(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    (x_TD, x), (weight_OD, weight) = drawn(33, sizes.hidden_size), drawn(2 * sizes.hidden_size, sizes.hidden_size)
    expected = x @ weight.T
    out = drawn.like(expected)
    ops.linear(weight_OD)(x_TD, out)
    return out, expected


def _rms_norm(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    (x_TD, x), (weight_D, weight) = drawn(33, sizes.hidden_size), drawn(sizes.hidden_size)
    expected = reference.rms_norm(x, weight, _EPS, torch.empty_like(x))
    return ops.rms_norm(x_TD, weight_D, _EPS, drawn.like(x)), expected


def _add_rms_norm(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    (x_TD, x), (delta_TD, delta) = drawn(33, sizes.hidden_size), drawn(33, sizes.hidden_size)
    weight_D, weight = drawn(sizes.hidden_size)
    expected = reference.add_rms_norm(x, delta, weight, _EPS, torch.empty_like(x))
    found = ops.add_rms_norm(x_TD, delta_TD, weight_D, _EPS, drawn.like(x))
    return torch.cat([part.cpu() for part in found]), torch.cat(expected)


def _head_norm(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    (x_TNH, x), (weight_NH, weight) = drawn(33, sizes.num_heads, sizes.head_dim), drawn(sizes.num_heads, sizes.head_dim)
    return ops.head_norm(x_TNH, weight_NH, _EPS), reference.head_norm(x, weight, _EPS)


def _rope(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    x_TNH, x = drawn(33, sizes.num_heads, sizes.head_dim)
    position_T, frequencies_H2 = torch.arange(33) * 7, 10_000.0 ** -torch.linspace(0, 1, sizes.head_dim // 2)
    cos, sin = (torch.empty(33, sizes.head_dim) for _ in range(2))
    reference.rope_angles(position_T, frequencies_H2, cos, sin)
    cos_TH, sin_TH = drawn.like(cos), drawn.like(sin)
    ops.rope_angles(position_T.to(x_TNH.device), frequencies_H2.to(x_TNH.device), cos_TH, sin_TH)
    return ops.rope(x_TNH, cos_TH, sin_TH), reference.rope(x, cos, sin)


def _swiglu(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    x_TF2, x = drawn(33, 2 * sizes.hidden_size)
    expected = reference.swiglu(x, torch.empty(33, sizes.hidden_size))
    return ops.swiglu(x_TF2, drawn.like(expected)), expected


def _attention(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    """With `reshape_and_cache`: what the step writes is among what it reads."""
    P, K, H = sizes.block_size, sizes.num_kv_heads, sizes.head_dim
    queries, computed = zip(*_SEQUENCES, strict=True)
    own = [-(-(new + before) // P) for new, before in _SEQUENCES]
    order = torch.randperm(sum(own), generator=torch.Generator().manual_seed(3)).tolist()
    tables = [order[sum(own[:s]) : sum(own[: s + 1])] for s in range(len(own))]
    T, B = sum(queries), sum(own)
    (q_TNH, q), (k_TKH, k), (v_TKH, v) = drawn(T, sizes.num_heads, H), drawn(T, K, H), drawn(T, K, H)
    (k_BPKH, k_pool), (v_BPKH, v_pool) = drawn(B, P, K, H), drawn(B, P, K, H)

    batch, expected = paged_batch(queries, computed, tables, k_pool), torch.empty_like(q)
    reference.reshape_and_cache(k, v, k_pool, v_pool, batch)
    reference.paged_attention(q, k_pool, v_pool, batch, expected)
    batch = paged_batch(queries, computed, tables, k_BPKH)
    ops.reshape_and_cache(k_TKH, v_TKH, k_BPKH, v_BPKH, batch)
    out_TNH = drawn.like(q)
    ops.paged_attention(q_TNH, k_BPKH, v_BPKH, batch, out_TNH)
    return out_TNH, expected


def _argmax(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    logits_RV, logits = drawn(9, 4 * sizes.hidden_size)
    return torch.tensor(ops.argmax(logits_RV.float())), logits.argmax(-1).float()
