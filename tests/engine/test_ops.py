"""Operators against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from xllm_lab.engine.ops.attention import chunk_mask, paged_attention, paged_batch, reshape_and_cache
from xllm_lab.engine.ops.elementwise import rms_norm, rope, swiglu
from xllm_lab.engine.ops.linear import Linear, packing_works

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_equals_plain_in_float32(rows: int, biased: bool) -> None:
    """The private oneDNN layout changes the order of additions and nothing else."""
    if not packing_works(torch.float32):
        pytest.skip("this build of torch has no packed linear")
    weight_OI, x_TI = torch.randn(33, 80), torch.randn(rows, 80)
    bias_O = torch.randn(33) if biased else None
    packed, plain = Linear(weight_OI, bias_O, packed=True), Linear(weight_OI, bias_O, packed=False)
    assert (packed.kind, plain.kind) == ("onednn_packed", "plain")
    torch.testing.assert_close(packed(x_TI), plain(x_TI), rtol=1e-5, atol=1e-5)


def test_packed_equals_plain_in_bfloat16() -> None:
    """Within one rounding of the result."""
    if not packing_works(torch.bfloat16):
        pytest.skip("this build of torch has no packed linear")
    weight_OI, x_TI = torch.randn(33, 80).bfloat16(), torch.randn(5, 80).bfloat16()
    torch.testing.assert_close(Linear(weight_OI, packed=True)(x_TI), F.linear(x_TI, weight_OI), rtol=2**-7, atol=2**-5)


def test_a_dtype_that_cannot_be_packed_falls_back_by_name() -> None:
    """The fallback is visible in `kind`, and right."""
    weight_OI, x_TI = torch.randn(4, 8).double(), torch.randn(2, 8).double()
    linear = Linear(weight_OI)
    assert linear.kind == "plain"
    torch.testing.assert_close(linear(x_TI), x_TI @ weight_OI.T)


def test_rms_norm() -> None:
    """The definition, spelled out."""
    x_TD, weight_D = torch.randn(3, 8), torch.randn(8)
    expected = x_TD / (x_TD.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight_D
    torch.testing.assert_close(rms_norm(x_TD, weight_D, 1e-5), expected)


def test_rope_turns_each_pair_as_a_complex_number() -> None:
    """(x[i], x[i + H/2]) as a complex number is multiplied by e^(i angle)."""
    x_TNH, angle = torch.randn(5, 3, 8), torch.randn(5, 1, 4)
    cos = torch.cat([angle.cos(), angle.cos()], -1)
    sin = torch.cat([-angle.sin(), angle.sin()], -1)
    turned = torch.complex(*x_TNH.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rope(x_TNH, cos, sin), torch.cat([turned.real, turned.imag], -1))


def test_swiglu() -> None:
    """Gate on the left, up on the right."""
    gate, up = torch.randn(2, 6), torch.randn(2, 6)
    torch.testing.assert_close(swiglu(torch.cat([gate, up], -1)), gate * gate.sigmoid() * up)


def test_chunk_mask_is_aligned_at_the_lower_right() -> None:
    """Two queries after three cached tokens: the first sees four keys, the second all five."""
    inf = float("inf")
    expected = torch.tensor([[0, 0, 0, 0, -inf], [0, 0, 0, 0, 0]])
    assert torch.equal(chunk_mask(2, 5, torch.float32, CPU), expected)


def test_cache_then_attend_equals_the_definition() -> None:
    """Three sequences (a decode, a chunk after a prefix, a fresh prompt), softmax written out head by head."""
    N, K, H, P = 6, 2, 8, 4
    queries, computed, tables = [1, 3, 5], [6, 4, 0], [[9, 1], [3, 4], [7, 0]]
    k_BPKH, v_BPKH = torch.randn(10, P, K, H), torch.randn(10, P, K, H)
    q_TNH, k_TKH, v_TKH = torch.randn(9, N, H), torch.randn(9, K, H), torch.randn(9, K, H)
    batch = paged_batch(queries, computed, tables, k_BPKH)
    reshape_and_cache(k_TKH, v_TKH, k_BPKH, v_BPKH, batch.slot_T)
    out_TNH = paged_attention(q_TNH, k_BPKH, v_BPKH, batch)

    row = 0
    for count, start, table in zip(queries, computed, tables, strict=True):
        for position in range(start, start + count):
            slots = [(table[i // P], i % P) for i in range(position + 1)]
            assert torch.equal(k_BPKH[slots[-1]], k_TKH[row])
            for head in range(N):
                keys = torch.stack([k_BPKH[s][head // (N // K)] for s in slots])
                values = torch.stack([v_BPKH[s][head // (N // K)] for s in slots])
                expected = torch.softmax(keys @ q_TNH[row, head] / H**0.5, 0) @ values
                torch.testing.assert_close(out_TNH[row, head], expected, rtol=1e-5, atol=1e-5)
            row += 1
    assert batch.block_table_SM.tolist() == tables
