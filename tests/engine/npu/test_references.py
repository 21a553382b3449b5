"""What stands in for the kernels, against definitions written another way, or against our own CPU operators."""

# Shapes: T packed query tokens, R rows, D hidden size, E experts, k experts of a row, X rows times experts

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.npu.by_reference import References
from tests.engine.npu.samples import ALONE, CALLS, TOP_K, WIDE, D, E, H, K, N, P, R, experts, paged, random
from xllm_lab.engine.ops import reference
from xllm_lab.engine.ops.batch import paged_batch
from xllm_lab.engine.ops.npu import calls, moe_references
from xllm_lab.engine.ops.npu.operators import calling
from xllm_lab.engine.ops.npu.serving import NpuOps

F32 = torch.float32


@pytest.fixture(autouse=True)
def _by_references() -> Iterator[None]:
    with calling(References()):
        yield


def test_attention_is_a_softmax_over_the_tokens_before() -> None:
    """Written out for each query and head over the blocks of its sequence."""
    query = paged(F32)
    out_TNH = torch.empty_like(query.q_TNH)
    calls.attend(query, None, out_TNH, torch.empty(1))
    start = 0
    for row, (end, kv_len) in enumerate(zip(query.cumulated_S, query.kv_len_S, strict=True)):
        for token in range(start, end):
            visible = kv_len - (end - 1 - token)
            places = [(int(query.table_SM[row, i // P]), i % P) for i in range(visible)]
            for head in range(N):
                own = slice(head // (N // K) * H, (head // (N // K) + 1) * H)
                scores = [float(query.q_TNH[token, head] @ query.k_BPF[b, p, own]) / math.sqrt(H) for b, p in places]
                weights = torch.tensor(scores).softmax(0)
                expected = sum(w * query.v_BPF[b, p, own] for w, (b, p) in zip(weights, places, strict=True))
                torch.testing.assert_close(out_TNH[token, head], expected, rtol=1e-4, atol=1e-4)
        start = end


def test_attention_reads_its_mask() -> None:
    """So that a mask the other way round would not pass."""
    query = paged(F32)
    right, wrong = torch.empty_like(query.q_TNH), torch.empty_like(query.q_TNH)
    calls.attend(query, None, right, torch.empty(1))
    calls.attend(query._replace(mask=query.mask.T.contiguous()), None, wrong, torch.empty(1))
    assert not torch.allclose(right, wrong)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_the_engines_operators_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """The same signature, the same numbers: norms, rotation, activation, cache and attention on a mixed batch."""
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 2e-2, "atol": 2e-2}
    ops, T = NpuOps(torch.device("cpu")), 9
    x_TD, delta_TD, weight_D, out_TD = random(T, D, dtype=dtype), random(T, D, dtype=dtype) / 2, random(D), None
    weight_D, out_TD = weight_D.to(dtype), torch.empty(T, D, dtype=dtype)
    reference.rms_norm(x_TD, weight_D, 1e-5, out_TD)
    torch.testing.assert_close(ops.rms_norm(x_TD, weight_D, 1e-5, torch.empty(0)), out_TD, **close)
    summed_TD, normed_TD = ops.add_rms_norm(x_TD, delta_TD, weight_D, 1e-5, torch.empty(0))
    reference.add_rms_norm(x_TD, delta_TD, weight_D, 1e-5, out_TD)
    torch.testing.assert_close(summed_TD, x_TD, **close)
    torch.testing.assert_close(normed_TD, out_TD, **close)
    qkv_THn, norms_NH = random(T, N + 2 * K, H, dtype=dtype), random(N + K, H, dtype=dtype)
    qk_TNH = qkv_THn[:, : N + K].clone()
    normed_TNH = ops.head_norm(qkv_THn[:, : N + K], norms_NH, 1e-5)
    reference.head_norm(qk_TNH, norms_NH, 1e-5)
    torch.testing.assert_close(normed_TNH, qk_TNH, **close)
    position_T, frequencies_H2 = torch.arange(T) * 7, torch.rand(H // 2, generator=torch.Generator().manual_seed(1))
    angles, npu_angles = (torch.empty(2, T, H, dtype=dtype) for _ in range(2))
    reference.rope_angles(position_T, frequencies_H2, *angles)
    ops.rope_angles(position_T, frequencies_H2, *npu_angles)
    turned_TNH = ops.rope(qk_TNH, *npu_angles)
    reference.rope(qk_TNH, *angles)
    torch.testing.assert_close(turned_TNH, qk_TNH, **close)
    pools = [random(6, P, K, H, dtype=dtype) for _ in range(4)]
    batch = paged_batch([1, 3, 5], [6, 127, 0], [[3], [5, 1], [2]], pools[0])
    attended = [torch.empty(T, N, H, dtype=dtype) for _ in range(2)]
    for (k_pool, v_pool), out, served in zip((pools[:2], pools[2:]), attended, (ops, reference), strict=True):
        k_TKH, v_TKH = qk_TNH[:, N:], qkv_THn[:, N + K :]
        served.reshape_and_cache(k_TKH, v_TKH, k_pool, v_pool, batch)  # type: ignore[attr-defined]
        served.paged_attention(qk_TNH[:, :N], k_pool, v_pool, batch, out)  # type: ignore[attr-defined]
    torch.testing.assert_close(pools[0], pools[2], rtol=0, atol=0)
    torch.testing.assert_close(*attended, **close)
    gated_TF = torch.empty(T, D // 2, dtype=dtype)
    reference.swiglu(x_TD, gated_TF)
    torch.testing.assert_close(ops.swiglu(x_TD, torch.empty(0)), gated_TF, **close)


def test_a_mixture_of_experts_written_out() -> None:
    """Gate, sort, multiply and sum, as each row times its own experts; and over a communicator of one the same."""
    x_RD, logits_RE, weight_EDO = random(R, D, dtype=F32), random(R, E, dtype=F32), random(E, D, WIDE, dtype=F32)
    probabilities_RE = logits_RE.softmax(-1)
    expected_RO = torch.zeros(R, WIDE)
    for row in range(R):
        for expert in sorted(range(E), key=lambda e: -float(probabilities_RE[row, e]))[:TOP_K]:
            expected_RO[row] += probabilities_RE[row, expert] * (x_RD[row] @ weight_EDO[expert])
    weights_Rk, expert_Rk = calls.gate(logits_RE, TOP_K)
    sorted_XD, place_X, count_E = calls.sort_by_expert(x_RD, expert_Rk, E)
    assert count_E.tolist() == [int((expert_Rk == e).sum()) for e in range(E)]
    y_XO = calls.experts_matmul(sorted_XD, weight_EDO, count_E)
    torch.testing.assert_close(calls.sum_over_experts(y_XO, place_X, weights_Rk), expected_RO)
    sent = calls.dispatch(x_RD, expert_Rk, ALONE)
    assert torch.equal(sent.count_E, count_E)
    y_XO = calls.experts_matmul(sent.rows_XD, weight_EDO, sent.count_E)
    torch.testing.assert_close(calls.combine(y_XO, expert_Rk, weights_Rk, sent, ALONE), expected_RO)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_that_share_the_experts_compute_what_one_would(ranks: int) -> None:
    """Each rank's rows go to the experts of all, and come back weighted; whoever has the expert."""
    x_rRD, scale_rRk = random(ranks, R, D, dtype=F32), random(ranks, R, TOP_K, dtype=F32)
    weight_EDO = random(E, D, WIDE, dtype=F32)
    expert_rRk = torch.stack([experts().roll(rank, 0) for rank in range(ranks)])
    y, origin, received = [], [], []
    for rank in range(ranks):
        rows_XD, triples, count_E, counts = moe_references.dispatched(x_rRD, expert_rRk, rank, E)
        own_EDO = weight_EDO[rank * E // ranks : (rank + 1) * E // ranks]
        assert int(counts[-1]) == int(count_E.sum())
        y.append(calls.experts_matmul(rows_XD, own_EDO, count_E))
        origin.append(triples)
        received.append(counts)
    for rank in range(ranks):
        expected_RO = torch.einsum("rk,rd,rkdo->ro", scale_rRk[rank], x_rRD[rank], weight_EDO[expert_rRk[rank].long()])
        out_RO = moe_references.combined(y, origin, received, rank, scale_rRk[rank])
        torch.testing.assert_close(out_RO, expected_RO, rtol=1e-4, atol=1e-4)


def test_rows_of_the_same_expert_stay_in_order() -> None:
    """Which row went where is then a function of the routes alone."""
    x_RD = torch.arange(R).float().unsqueeze(1)
    sorted_XD, place_X, count_E = calls.sort_by_expert(x_RD, experts(), E)
    assert count_E.tolist() == [3, 4, 2, 3]
    assert sorted_XD.flatten().tolist() == [0, 2, 4, 0, 1, 4, 5, 1, 3, 2, 3, 5]
    assert place_X.tolist() == [0, 3, 4, 7, 9, 1, 8, 10, 5, 2, 6, 11]


@pytest.mark.parametrize("operator", ["npu_mm_all_reduce_base", "npu_format_cast"])
def test_one_rank_and_one_format_change_nothing(operator: str) -> None:
    """A sum over one rank is the product; a format is not seen in numbers."""
    result: Tensor = CALLS[operator]()
    expected = (
        random(R, D).float() @ random(D, WIDE).float() if operator.startswith("npu_mm") else random(D, WIDE).float()
    )
    torch.testing.assert_close(result.float(), expected, rtol=1e-2, atol=1e-2)
