"""Operators of a mixture of experts, against each token computed by itself."""

# Shapes: T tokens, k experts of a token, E experts, X = T k, I inputs, O outputs, D hidden size

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from xllm_lab.engine.device import open_device
from xllm_lab.engine.ops import experts, native, table
from xllm_lab.engine.ops.experts import (
    GroupedLinear,
    GroupedMmLinear,
    Permuted,
    Routes,
    Routing,
    grouped_mm_fails,
    loop_linear,
)
from xllm_lab.engine.ops.table import OF_EXPERTS, ExpertShape, choose
from xllm_lab.engine.ops.tape import Program, recording

CPU = open_device("cpu").torch_device
D, F = 16, 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Any that a config may ask for."""
    num_groups = draw(st.sampled_from([1, 2, 4]))
    in_group = draw(st.integers(2, 4))
    top_groups = draw(st.integers(1, num_groups))
    return Routing(
        num_experts=num_groups * in_group,
        top_k=draw(st.integers(1, top_groups * in_group)),
        is_sigmoid=draw(st.booleans()),
        is_normalized=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        num_groups=num_groups,
        top_groups=top_groups,
        group_experts=draw(st.integers(1, 2)),
    )


def routed(logits_TE: Tensor, bias_E: Tensor | None, routing: Routing, used: int | None = None) -> Routes:
    T, k = len(logits_TE), routing.top_k
    out = Routes(torch.empty(T, k), torch.empty(T, k, dtype=torch.int32))
    num_tokens_1 = None if used is None else torch.tensor([used], dtype=torch.int32)
    return experts.route(logits_TE, bias_E, routing, num_tokens_1, out)


def by_hand(logits: list[float], bias: list[float], routing: Routing) -> dict[int, float]:
    """One token's experts and weights, by sorting."""
    most = max(logits)
    total = sum(math.exp(x - most) for x in logits)
    scores = [1 / (1 + math.exp(-x)) if routing.is_sigmoid else math.exp(x - most) / total for x in logits]
    rank = [score + b for score, b in zip(scores, bias, strict=True)]
    in_group = routing.num_experts // routing.num_groups
    groups = [range(g * in_group, (g + 1) * in_group) for g in range(routing.num_groups)]
    groups.sort(key=lambda g: -sum(sorted((rank[e] for e in g), reverse=True)[: routing.group_experts]))
    eligible = [e for g in groups[: routing.top_groups] for e in g]
    chosen = sorted(eligible, key=lambda e: -rank[e])[: routing.top_k]
    divisor = sum(scores[e] for e in chosen) if routing.is_normalized else 1.0
    return {e: scores[e] / divisor * routing.scale for e in chosen}


@settings(max_examples=80)
@given(routings(), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_each_token_is_routed_as_by_hand(routing: Routing, tokens: int, seed: int, has_bias: bool) -> None:
    logits_TE = drawn(tokens, routing.num_experts, seed=seed)
    bias_E = drawn(routing.num_experts, seed=seed + 1) * 0.3 if has_bias else None
    weight_Tk, expert_Tk = routed(logits_TE, bias_E, routing)
    bias = [0.0] * routing.num_experts if bias_E is None else bias_E.tolist()
    for weights, chosen, logits in zip(weight_Tk, expert_Tk, logits_TE.tolist(), strict=True):
        found = dict(zip(chosen.tolist(), weights.tolist(), strict=True))
        assert found == pytest.approx(by_hand(logits, bias, routing), rel=1e-4)


def empties(tokens: int, top_k: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = tokens * top_k
    return (
        torch.full((rows, D), math.nan),
        torch.full((rows,), -1, dtype=torch.int32),
        torch.full((num_experts,), -1, dtype=torch.int64),
    )


def permuted(x_TD: Tensor, expert_Tk: Tensor, num_experts: int) -> Permuted:
    tokens, top_k = expert_Tk.shape
    return experts.permute(x_TD, expert_Tk, *empties(tokens, top_k, num_experts))


@settings(max_examples=80)
@given(routings(), st.integers(1, 8), st.integers(0, 99), st.data())
def test_rows_stand_by_expert_and_come_back(routing: Routing, tokens: int, seed: int, data: st.DataObject) -> None:
    """Counts conserve rows; each expert sees its tokens, in order; with weights of 1, each token comes back k times."""
    used = data.draw(st.integers(1, tokens))
    x_TD = drawn(tokens, D, seed=seed)
    routes = routed(drawn(tokens, routing.num_experts, seed=seed), None, routing, used)
    there = permuted(x_TD, routes.expert_Tk, routing.num_experts)
    assert there.count_E.sum() == used * routing.top_k
    rows = iter(there.rows_XD)
    for expert, count in enumerate(there.count_E.tolist()):
        tokens_here = (routes.expert_Tk == expert).any(1).nonzero().flatten().tolist()
        assert len(tokens_here) == count
        assert all(torch.equal(next(rows), x_TD[t]) for t in tokens_here)
    back_TD = experts.unpermute(*there[:2], torch.ones_like(routes.weight_Tk), None, torch.empty_like(x_TD))
    torch.testing.assert_close(back_TD[:used], x_TD[:used] * routing.top_k)


@settings(max_examples=40)
@given(routings(), st.integers(1, 8), st.integers(0, 99), st.data())
def test_rows_counted_alone_are_those_that_are_sorted(
    routing: Routing, tokens: int, seed: int, data: st.DataObject
) -> None:
    """What pads is left out, whether it was routed to nobody or like any other."""
    used = data.draw(st.integers(1, tokens))
    logits_TE, count_E = drawn(tokens, routing.num_experts, seed=seed), empties(tokens, 1, routing.num_experts)[2]
    sorted_E = permuted(drawn(tokens, D), routed(logits_TE, None, routing, used).expert_Tk, routing.num_experts).count_E
    for routes in (routed(logits_TE, None, routing), routed(logits_TE, None, routing, used)):
        experts.count_rows(routes.expert_Tk, torch.tensor([used], dtype=torch.int32), count_E)
        assert torch.equal(count_E, sorted_E)


def native_linear(weight_EOI: Tensor) -> GroupedLinear:
    if table._build_fails():
        pytest.skip("no compiled kernels here")
    return table._native_grouped(weight_EOI)


MADE: dict[str, Callable[[Tensor], GroupedLinear]] = {
    "torch": loop_linear,
    "grouped_mm": GroupedMmLinear,
    "native": native_linear,
}


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 99))
def test_each_row_is_multiplied_by_its_experts_matrix(kind: str, counts: list[int], behind: int, seed: int) -> None:
    """Whatever the counts, zeros among them; rows behind the last expert's disturb nobody."""
    assume(sum(counts) + behind)
    weight_EOI, x_XI = drawn(len(counts), F, D, seed=seed), drawn(sum(counts) + behind, D, seed=seed + 1)
    layer: GroupedLinear = MADE[kind](weight_EOI)
    found_XO = layer(x_XI, torch.tensor(counts), torch.empty(len(x_XI), F))
    owner = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for row, expert in enumerate(owner):
        torch.testing.assert_close(found_XO[row], weight_EOI[expert] @ x_XI[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=40)
@given(routings(), st.integers(1, 7), st.integers(0, 99), st.data())
def test_a_mixture_is_what_each_token_would_compute(
    kind: str, routing: Routing, tokens: int, seed: int, data: st.DataObject
) -> None:
    """The whole way; tokens behind the used ones get nothing, and no NaN, whatever lies in memory."""
    used, has_shared = data.draw(st.integers(1, tokens)), data.draw(st.booleans())
    x_TD, logits_TE = drawn(tokens, D, seed=seed), drawn(tokens, routing.num_experts, seed=seed + 1)
    weight_EDD = drawn(routing.num_experts, D, D, seed=seed + 2)
    shared_TD = drawn(tokens, D, seed=seed + 3) if has_shared else None
    routes = routed(logits_TE, None, routing, used)
    there = permuted(x_TD, routes.expert_Tk, routing.num_experts)
    # What a product leaves behind the last expert's rows is anything: here, a NaN.
    y_XD = MADE[kind](weight_EDD)(there.rows_XD, there.count_E, torch.empty_like(there.rows_XD))
    y_XD[used * routing.top_k :] = math.nan
    out_TD = experts.unpermute(y_XD, there.place_X, routes.weight_Tk, shared_TD, torch.full_like(x_TD, math.nan))
    nothing = [0.0] * routing.num_experts
    for t in range(tokens):
        expected_D = torch.zeros(D) if shared_TD is None else shared_TD[t].clone()
        if t < used:
            for expert, weight in by_hand(logits_TE[t].tolist(), nothing, routing).items():
                expected_D += weight * (weight_EDD[expert] @ x_TD[t])
        torch.testing.assert_close(out_TD[t], expected_D, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_mm_serves_where_rows_are_aligned(dtype: torch.dtype) -> None:
    """Rows of 16 bytes and their multiples, as it says itself; everything else is the loop's, with the reason.

    Where the compiled kernels serve, they are asked first.
    """
    shape = ExpertShape(Routing(4, 2), hidden_size=48, intermediate_size=24)
    served = choose(CPU, dtype, head_dim=16, hidden_size=48, expert_shape=shape, without=("native",)).served
    assert {served[op].by for op in OF_EXPERTS} == {"torch", "grouped_mm"}
    assert served["grouped_matmul"].by == "grouped_mm"
    odd = choose(
        CPU, dtype, head_dim=16, hidden_size=48, expert_shape=shape._replace(intermediate_size=23), without=("native",)
    )
    assert odd.served["grouped_matmul"].by == "torch"
    assert "16 bytes" in odd.served["grouped_matmul"].instead_of["grouped_mm"]
    assert "grouped_matmul" in odd.fallbacks


def test_a_grouped_product_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once before it serves."""
    right = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **named: right(*a, **named) + 1)
    assert grouped_mm_fails(CPU, torch.float32, 8, 4) == "grouped_mm differs from a product for each expert"
    grouped_mm_fails.cache_clear()


def test_a_captured_product_follows_the_counts_of_each_replay() -> None:
    """Kernels that a Python call calls are its own: written down beside it, they would run with the first counts."""
    weight_EOI, x_XI, out_XO = drawn(2, F, D), drawn(5, D, seed=1), torch.empty(5, F)
    layer, count_E = native_linear(weight_EOI), torch.tensor([4, 1])
    tape = Program(native.load().replay)
    with recording(tape):
        layer(x_XI, count_E, out_XO)
    replay = tape.close()
    assert (tape.num_kernels, tape.num_calls) == (0, 1)
    for counts in ((1, 4), (5, 0), (2, 3)):
        count_E.copy_(torch.tensor(counts))
        replay()
        expected_XO = loop_linear(weight_EOI)(x_XI, count_E, torch.empty(5, F))
        torch.testing.assert_close(out_XO, expected_XO)


@pytest.mark.parametrize("by", ["torch", "grouped_mm", "native"])
def test_an_expert_gets_other_weights(by: str) -> None:
    """Whoever serves the products: what is read back is what was put, and only that expert's products are others."""
    weights, other = drawn(3, 32, 16), drawn(32, 16, seed=1)
    subject = table._GROUPED[by](weights.clone())
    assert torch.equal(subject.weight(1), weights[1])
    subject.put(1, subject.prepared(other))
    assert [torch.equal(subject.weight(e), other if e == 1 else weights[e]) for e in range(3)] == [True] * 3
    x_XI, count_E = drawn(6, 16, seed=2), torch.tensor([2, 3, 1])
    found_XO = subject(x_XI, count_E, torch.empty(6, 32))
    expected_XO = torch.cat([x_XI[:2] @ weights[0].T, x_XI[2:5] @ other.T, x_XI[5:] @ weights[2].T])
    torch.testing.assert_close(found_XO, expected_XO)
