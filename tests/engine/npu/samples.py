"""One small call of each operator, within all limits, on a CPU or wherever `on` says."""

# Shapes: T packed query tokens, S sequences, N query heads, K KV heads, H head dim, B blocks, P tokens per block,
#         R rows, D hidden size, E experts, k experts of a row, X rows times experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xllm_lab.engine.ops.npu import calls
from xllm_lab.engine.ops.npu.serving import causal_mask

B, P, N, K, H = 6, 128, 4, 2, 16
R, D, E, TOP_K, WIDE = 6, 32, 4, 2, 48
ALONE = calls.ExpertGroup("alone", 1, 0, E)


class _Here:
    device = torch.device("cpu")


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Operands are there meanwhile."""
    before, _Here.device = _Here.device, device
    try:
        yield
    finally:
        _Here.device = before


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The same numbers for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(_Here.device, dtype)


def integers(rows: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
    """These numbers."""
    return torch.tensor(rows, dtype=dtype, device=_Here.device)


def paged(dtype: torch.dtype = torch.bfloat16) -> calls.PagedQuery:
    """Three sequences: a decode, a chunk after a prefix that crosses a block, and a prompt."""
    return calls.PagedQuery(
        q_TNH=random(1 + 3 + 5, N, H, dtype=dtype),
        k_BPF=random(B, P, K * H, dtype=dtype),
        v_BPF=random(B, P, K * H, dtype=dtype) + 1,
        mask=causal_mask(_Here.device),
        cumulated_S=[1, 4, 9],
        kv_len_S=[7, 130, 5],
        table_SM=integers([[3, 0], [5, 1], [2, 0]], torch.int32),
        scale=H**-0.5,
    )


def experts() -> Tensor:
    """Of each row two different ones."""
    return integers([[0, 1], [1, 2], [3, 0], [2, 3], [1, 0], [1, 3]], torch.int32)


def _attend() -> Tensor:
    query = paged()
    out_TNH = torch.empty_like(query.q_TNH)
    calls.attend(query, integers([0], torch.uint8), out_TNH, random(1))
    return out_TNH


def _scatter() -> Tensor:
    k_BPKH, v_BPKH = (random(B, P, K, H) * 0 for _ in "kv")
    calls.scatter_kv(random(3, K, H), random(3, K, H), k_BPKH, v_BPKH, integers([0, 700, 5]))
    return k_BPKH


def _unpermute() -> Tensor:
    place_X = integers([0, 7, 2, 9, 4, 11, 6, 1, 8, 3, 10, 5], torch.int32)
    summed: Tensor = calls.sum_over_experts(random(R * TOP_K, D), place_X, random(R, TOP_K).abs())
    return summed


def _combine() -> Tensor:
    sent = calls.dispatch(random(R, D), experts(), ALONE)
    return calls.combine(sent.rows_XD, experts(), random(R, TOP_K, dtype=torch.float32).abs(), sent, ALONE)


CALLS: dict[str, Callable[[], Any]] = {
    "npu_fused_infer_attention_score.out": _attend,
    "_npu_fused_infer_attention_score_get_max_workspace": lambda: calls.attention_workspace(paged()),
    "npu_scatter_pa_kv_cache": _scatter,
    "npu_rms_norm": lambda: calls.rms_norm(random(R, D), random(D), 1e-5),
    "npu_add_rms_norm": lambda: calls.add_rms_norm(random(R, D), random(R, D) + 1, random(D), 1e-5),
    "npu_rotary_mul": lambda: calls.rotate(random(R, N, H), random(R, H), random(R, H)),
    "npu_swiglu": lambda: calls.swiglu(random(R, 2 * D)),
    "npu_mm_all_reduce_base": lambda: calls.matmul_all_reduce(random(R, D), random(D, WIDE), "alone"),
    "npu_prefetch": lambda: calls.prefetch(random(D, WIDE), None, 1024),
    "npu_format_cast": lambda: calls.format_cast(random(D, WIDE), calls.FRACTAL_NZ),
    "npu_moe_gating_top_k_softmax": lambda: calls.gate(random(R, E), TOP_K),
    "npu_moe_init_routing_v2": lambda: calls.sort_by_expert(random(R, D), experts(), E),
    "npu_grouped_matmul": lambda: calls.experts_matmul(
        random(R * TOP_K, D), random(E, D, WIDE), integers([3, 0, 5, 4])
    ),
    "npu_moe_token_unpermute": _unpermute,
    "npu_moe_distribute_dispatch_v2": lambda: calls.dispatch(random(R, D), experts(), ALONE),
    "npu_moe_distribute_combine_v2": _combine,
}
