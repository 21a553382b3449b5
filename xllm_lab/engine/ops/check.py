"""A device's operators beside their definitions: the same inputs, computed in float32 by plain PyTorch on the CPU."""

# Shapes: T packed tokens, S sequences, N query heads, K KV heads, H head dim, D hidden size, B blocks of the pool,
#         P tokens per block, O outputs of a layer

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.ops import experts, latent, reference
from xllm_lab.engine.ops.batch import paged_batch
from xllm_lab.engine.ops.experts import Routes, loop_linear
from xllm_lab.engine.ops.table import ExpertOps, ExpertShape, LatentOps, Ops

_EPS = 1e-5
# (tokens computed now, tokens in the pool before): a prompt, a chunk of one, decodes at and beside a block's edge.
_SEQUENCES = ((37, 0), (16, 128), (1, 0), (1, 127), (1, 128), (1, 300))
# Largest error that rounding explains, in units of the results' standard deviation: a few roundings of the operator's
# inputs and of its result, 2^-24 or 2^-9 each, and in a sum of many products the square root of their number.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


_EXACT = ("argmax", "permute", "cache_latent")  # nothing is computed, or nothing is rounded
_MOST_EXPERTS = 5  # whose weights are drawn


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
    """Of a model.

    Attributes:
        expert_shape: of its experts, if it has some.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    block_size: int
    expert_shape: ExpertShape | None = None


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
    if ops.experts is not None:
        checks |= {"route": _route, "permute": _permute, "grouped_matmul": _grouped_matmul, "unpermute": _unpermute}
    if ops.latents is not None:
        checks |= {"latent_query": _latent_query, "cache_latent": _cache_latent, "head_linear": _head_linear}
    for op, check in checks.items():
        found, expected = check(ops, sizes, _Drawn(dtype, device))
        error = float((found.cpu().float() - expected).abs().max() / expected.std())
        yield OperatorCheck(op, ops.served[op].by, error, 0.0 if op in _EXACT else TOLERANCES[dtype])


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


def _with_experts(ops: Ops, sizes: Sizes) -> tuple[ExpertOps, ExpertShape]:
    assert ops.experts is not None, "a model without experts"
    assert sizes.expert_shape is not None, "sizes of a model without experts"
    return ops.experts, sizes.expert_shape


def _routes(rows: int, top_k: int, device: torch.device) -> Routes:
    return Routes(torch.empty(rows, top_k, device=device), torch.empty(rows, top_k, dtype=torch.int32, device=device))


def _route(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    """As a weight for each expert: the chosen ones come in no order."""
    of_experts, (routing, *_) = _with_experts(ops, sizes)
    logits_TE, logits = drawn(33, routing.num_experts)
    bias_E, bias = drawn(routing.num_experts)
    biases = (bias_E.float(), bias) if routing.is_sigmoid else (None, None)
    made = of_experts.route(logits_TE.float(), biases[0], routing, None, _routes(33, routing.top_k, logits_TE.device))
    expected = experts.route(logits, biases[1], routing, None, _routes(33, routing.top_k, logits.device))
    found, wanted = (
        torch.zeros(33, routing.num_experts).scatter_(1, r.expert_Tk.cpu().long(), r.weight_Tk.cpu().float())
        for r in (made, expected)
    )
    return found, wanted


def _chosen(num_experts: int, top_k: int) -> Tensor:
    """Of 33 tokens different experts each, unevenly."""
    first = torch.arange(33, dtype=torch.int32) ** 2 % num_experts
    return (first.unsqueeze(1) + torch.arange(top_k, dtype=torch.int32)) % num_experts


def _permute(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    """Rows, and how many each expert has."""
    of_experts, (routing, *_) = _with_experts(ops, sizes)
    (x_TD, x), chosen_Tk, made = drawn(33, sizes.hidden_size), _chosen(routing.num_experts, routing.top_k), []
    for permute, rows_TD in ((of_experts.permute, x_TD), (experts.permute, x)):
        rows, device = 33 * routing.top_k, rows_TD.device
        place_X = torch.empty(rows, dtype=torch.int32, device=device)
        count_E = torch.empty(routing.num_experts, dtype=torch.int64, device=device)
        out = permute(rows_TD, chosen_Tk.to(device), rows_TD.new_empty(rows, sizes.hidden_size), place_X, count_E)
        made.append(torch.cat([out.rows_XD.cpu().float().flatten(), out.count_E.cpu().float()]))
    return made[0], made[1]


def _grouped_matmul(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    """One expert among them gets no row."""
    of_experts, shape = _with_experts(ops, sizes)
    E, outputs = min(shape.routing.num_experts, _MOST_EXPERTS), 2 * shape.intermediate_size
    weight_EOI, weight = drawn(E, outputs, shape.hidden_size)
    count_E = torch.arange(E) ** 2
    x_XI, x = drawn(int(count_E.sum()), shape.hidden_size)
    expected = loop_linear(weight)(x, count_E, torch.empty(len(x), outputs))
    layer = of_experts.grouped_matmul(weight_EOI)
    return layer(x_XI, count_E.to(x_XI.device), drawn.like(expected)), expected


def _unpermute(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    of_experts, (routing, *_) = _with_experts(ops, sizes)
    rows, D = 33 * routing.top_k, sizes.hidden_size
    (x_XD, x), (weight_Tk, weight), (shared_TD, shared) = drawn(rows, D), drawn(33, routing.top_k), drawn(33, D)
    place = torch.randperm(rows, generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    expected = experts.unpermute(x, place, weight, shared, torch.empty(33, D))
    place_X, out_TD = place.to(x_XD.device), drawn.like(expected)
    return of_experts.unpermute(x_XD, place_X, weight_Tk.float(), shared_TD, out_TD), expected


def _with_latents(ops: Ops) -> LatentOps:
    assert ops.latents is not None, "a model of another attention"
    return ops.latents


def _latent_query(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    N, H = sizes.num_heads, sizes.head_dim
    R = H // 4
    (nope_TNI, nope), (rope_TNR, rope), (up_NIC, up) = drawn(33, N, 16), drawn(33, N, R), drawn(N, 16, H - R)
    expected = torch.empty(33, N, H)
    latent.latent_query(nope, rope, up, expected)
    query_TNH = drawn.like(expected)
    _with_latents(ops).latent_query(nope_TNI, rope_TNR, up_NIC, query_TNH)
    return query_TNH, expected


def _cache_latent(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    P, H = sizes.block_size, sizes.head_dim
    R = H // 4
    (kv_BP1H, pool), (c_TC, c), (r_T1R, r) = drawn(3, P, 1, H), drawn(5, H - R), drawn(5, 1, R)
    latent.cache_latent(c, r, pool, paged_batch([3, 2], [P, 0], [[2, 0], [1]], pool))
    _with_latents(ops).cache_latent(c_TC, r_T1R, kv_BP1H, paged_batch([3, 2], [P, 0], [[2, 0], [1]], kv_BP1H))
    return kv_BP1H, pool


def _head_linear(ops: Ops, sizes: Sizes, drawn: _Drawn) -> _Pair:
    (x_TNI, x), (weight_NIO, weight) = drawn(33, sizes.num_heads, 24), drawn(sizes.num_heads, 24, 16)
    expected = torch.einsum("tni,nio->tno", x, weight)
    out_TNO = drawn.like(expected)
    _with_latents(ops).head_linear(x_TNI, weight_NIO, out_TNO)
    return out_TNO, expected
