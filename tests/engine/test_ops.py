"""Operators: the reference against definitions, and every implementation against the reference."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from xllm_lab.engine.ops import build, native, reference, table
from xllm_lab.engine.ops.batch import PagedBatch, chunk_mask, paged_batch
from xllm_lab.engine.ops.gpu import serving as gpu
from xllm_lab.engine.ops.linear import Linear, OneDnnLinear, TorchLinear, onednn_fails
from xllm_lab.engine.ops.table import OF_EXPERTS, OF_LATENTS, TABLE, choose

CPU = torch.device("cpu")
DENSE = set(TABLE) - {*OF_EXPERTS, *OF_LATENTS, "exchange"}
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def library() -> None:
    """The compiled kernels, or a skip that says why there are none."""
    try:
        native.load()
    except build.NotBuiltError as error:
        pytest.skip(f"no kernels here: {error}")


def test_rms_norm() -> None:
    """The definition, spelled out; with a branch, the sum is kept and normalised."""
    x_TD, delta_TD, weight_D, out_TD = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.empty(3, 8)
    reference.rms_norm(x_TD, weight_D, EPS, out_TD)
    torch.testing.assert_close(out_TD, x_TD / (x_TD.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_D)
    sum_TD, summed_TD = x_TD + delta_TD, torch.empty(3, 8)
    reference.rms_norm(sum_TD, weight_D, EPS, summed_TD)
    reference.add_rms_norm(x_TD, delta_TD, weight_D, EPS, out_TD)
    assert torch.equal(x_TD, sum_TD)
    assert torch.equal(out_TD, summed_TD)


def test_rope_turns_each_pair_as_a_complex_number() -> None:
    """(x[i], x[i + H/2]) as a complex number is multiplied by e^(i angle)."""
    x_TNH, angle_T1H2 = torch.randn(5, 3, 8), torch.randn(5, 1, 4)
    cos_TH, sin_TH = _rotation(angle_T1H2.squeeze(1), torch.float32)
    turned = torch.complex(*x_TNH.chunk(2, -1)) * torch.polar(torch.ones_like(angle_T1H2), angle_T1H2)
    reference.rope(x_TNH, cos_TH, sin_TH)
    torch.testing.assert_close(x_TNH, torch.cat([turned.real, turned.imag], -1))


def test_swiglu() -> None:
    """Gate on the left, up on the right."""
    gate, up, out = torch.randn(2, 6), torch.randn(2, 6), torch.empty(2, 6)
    reference.swiglu(torch.cat([gate, up], -1), out)
    torch.testing.assert_close(out, gate * gate.sigmoid() * up)


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
    batch, out_TNH = paged_batch(queries, computed, tables, k_BPKH), torch.empty(9, N, H)
    reference.reshape_and_cache(k_TKH, v_TKH, k_BPKH, v_BPKH, batch)
    reference.paged_attention(q_TNH, k_BPKH, v_BPKH, batch, out_TNH)

    row = 0
    for count, start, blocks in zip(queries, computed, tables, strict=True):
        for position in range(start, start + count):
            slots = [(blocks[i // P], i % P) for i in range(position + 1)]
            assert torch.equal(k_BPKH[slots[-1]], k_TKH[row])
            for head in range(N):
                keys = torch.stack([k_BPKH[s][head // (N // K)] for s in slots])
                values = torch.stack([v_BPKH[s][head // (N // K)] for s in slots])
                expected = torch.softmax(keys @ q_TNH[row, head] / H**0.5, 0) @ values
                torch.testing.assert_close(out_TNH[row, head], expected, rtol=1e-5, atol=1e-5)
            row += 1
    assert batch.block_table_SM.tolist() == tables


@st.composite
def attentions(draw: st.DrawFn) -> tuple[torch.dtype, Tensor, Tensor, Tensor, PagedBatch]:
    """Heads, block sizes, ragged lengths and scattered blocks; queries are a strided part of wider rows."""
    dtype, H = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([16, 48, 64, 128]))
    K, group, P = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 4, 16, 32]))
    sequences = draw(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 200)), min_size=1, max_size=4))
    queries = [1 if draw(st.booleans()) else q for q, _ in sequences]
    computed = [c for _, c in sequences]
    needed = [-(-(q + c) // P) for q, c in zip(queries, computed, strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    blocks = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    tables = [blocks[sum(needed[:i]) : sum(needed[: i + 1])] for i in range(len(needed))]
    k_BPKH, v_BPKH = (torch.randn(len(blocks), P, K, H, generator=generator).to(dtype) for _ in "kv")
    wide = torch.randn(sum(queries), (group + 2) * K, H, generator=generator).to(dtype) * draw(
        st.sampled_from([0.1, 1.0, 8.0])
    )
    return dtype, wide[:, : group * K], k_BPKH, v_BPKH, paged_batch(queries, computed, tables, k_BPKH)


@pytest.mark.usefixtures("library")
@settings(max_examples=150, deadline=None)
@given(case=attentions())
def test_native_attention_is_the_reference(case: tuple[torch.dtype, Tensor, Tensor, Tensor, PagedBatch]) -> None:
    """Both read the same pool; the yardstick computes in float32, whatever the pool holds."""
    dtype, q_TNH, k_BPKH, v_BPKH, batch = case
    expected, found = (torch.empty(q_TNH.shape, dtype=d) for d in (torch.float32, dtype))
    reference.paged_attention(q_TNH.float(), k_BPKH.float(), v_BPKH.float(), batch, expected)
    native.NativeOps(native.load(), dtype, 1).paged_attention(q_TNH, k_BPKH, v_BPKH, batch, found)
    _close(found, expected)


@pytest.mark.usefixtures("library")
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    H=st.sampled_from([48, 64, 128]),
    group=st.integers(1, 9),
    rows=st.integers(2, 9),
    computed=st.integers(0, 150),
)
def test_rows_of_one_request_attend_with_the_bits_of_plain_decoding(
    dtype: torch.dtype, H: int, group: int, rows: int, computed: int
) -> None:
    """Or a draft that is judged by them could be kept where decoding token by token draws another."""
    k_BPKH, v_BPKH = (torch.randn(-(-(computed + rows) // 16), 16, 2, H).to(dtype) for _ in "kv")
    q_TNH, table = torch.randn(rows, 2 * group, H).to(dtype), range(len(k_BPKH))
    together, alone = torch.empty_like(q_TNH), torch.empty_like(q_TNH)
    ops = native.NativeOps(native.load(), dtype, 1)
    ops.paged_attention(q_TNH, k_BPKH, v_BPKH, paged_batch([rows], [computed], [table], k_BPKH), together)
    for t in range(rows):
        batch = paged_batch([1], [computed + t], [table], k_BPKH)
        ops.paged_attention(q_TNH[t : t + 1], k_BPKH, v_BPKH, batch, alone[t : t + 1])
    assert torch.equal(together, alone)


@pytest.mark.usefixtures("library")
@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 5),
    half=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_native_elementwise_is_the_reference(
    *, dtype: torch.dtype, tokens: int, heads: int, half: int, seed: int
) -> None:
    """Odd widths leave a rest behind the last whole vector; rows are strided where the reference allows it."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ops, H = native.NativeOps(native.load(), dtype, 1), 2 * half
    x, delta, weight = drawn(tokens, H), drawn(tokens, H), drawn(H)

    def norm(op: Callable[..., Any], rms_norm: Callable[..., Any], wide: Callable[[Tensor], Tensor]) -> list[Tensor]:
        outs = [wide(torch.empty(tokens, H, dtype=dtype)) for _ in range(2)]
        stream = wide(x.clone())
        rms_norm(wide(x), wide(weight), EPS, outs[0])
        op(stream, wide(delta), wide(weight), EPS, outs[1])
        return [*outs, stream]

    exact = norm(reference.add_rms_norm, reference.rms_norm, Tensor.float)
    for mine, theirs in zip(norm(ops.add_rms_norm, ops.rms_norm, lambda t: t), exact, strict=True):
        _close(mine, theirs)

    wide_TNH, weight_NH = drawn(tokens, heads + 2, H), drawn(heads, H)
    mine, theirs = wide_TNH.clone()[:, :heads], wide_TNH.float()[:, :heads]
    ops.head_norm(mine, weight_NH, EPS)
    reference.head_norm(theirs, weight_NH.float(), EPS)
    _close(mine, theirs)

    cos_TH, sin_TH = _rotation(torch.randn(tokens, half, generator=generator), dtype)
    mine, theirs = wide_TNH.clone(), wide_TNH.float()
    ops.rope(mine[:, :heads], cos_TH, sin_TH)
    reference.rope(theirs[:, :heads], cos_TH.float(), sin_TH.float())
    _close(mine, theirs)
    assert torch.equal(mine[:, heads:], wide_TNH[:, heads:])

    gate_up, gated, expected = drawn(tokens, 2 * H) * 5, torch.empty(tokens, H, dtype=dtype), torch.empty(tokens, H)
    ops.swiglu(gate_up, gated)
    reference.swiglu(gate_up.float(), expected)
    _close(gated, expected)


@pytest.mark.usefixtures("library")
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 80),
    inputs=st.integers(1, 5).map(lambda n: n * 32),
    outputs=st.integers(1, 150),
    biased=st.booleans(),
    float32_out=st.booleans(),
    kind=st.sampled_from(["native", "onednn"]),
)
@settings(max_examples=150, deadline=None)
def test_every_linear_is_the_reference(
    *, dtype: torch.dtype, rows: int, inputs: int, outputs: int, biased: bool, float32_out: bool, kind: str
) -> None:
    """Layouts change the order of additions and nothing else; rows of the matrix come back bit for bit."""
    generator = torch.Generator().manual_seed(rows * inputs + outputs)
    weight_OI, x_TI = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (outputs, rows))
    bias_O = torch.randn(outputs, generator=generator).to(dtype) if biased else None
    linear = _linear(kind, dtype, weight_OI, bias_O)
    if linear is None:
        return
    out_TO = torch.full((rows, outputs), 7.0, dtype=torch.float32 if float32_out else dtype)
    expected = torch.empty(rows, outputs)
    linear(x_TI, out_TO)
    TorchLinear(weight_OI.float(), None if bias_O is None else bias_O.float())(x_TI.float(), expected)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-8 * inputs**0.5 + 1e-3
    torch.testing.assert_close(out_TO.float(), expected, rtol=2**-7, atol=tolerance)
    token_T = torch.randint(outputs, (rows,), generator=generator)
    rows_TI = torch.empty(rows, inputs, dtype=dtype)
    linear.rows(token_T, rows_TI)
    assert torch.equal(rows_TI, weight_OI[token_T])


def _linear(kind: str, dtype: torch.dtype, weight_OI: Tensor, bias_O: Tensor | None) -> Linear | None:
    if kind == "onednn":
        return None if onednn_fails(dtype) else OneDnnLinear(weight_OI, bias_O, keep_rows=True)
    if native.linear_fails(native.load(), dtype, weight_OI.shape[1]):
        return None
    return native.NativeLinear(native.load(), 1, weight_OI, bias_O)


@pytest.mark.usefixtures("library")
@given(rows=st.integers(1, 4), width=st.integers(1, 70), levels=st.integers(1, 30), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_native_argmax_is_the_first_of_equals(rows: int, width: int, levels: int, seed: int) -> None:
    """Few levels make many equals; infinities and NaNs are ordered as torch orders them."""
    values = torch.cat([torch.tensor([float("inf"), float("-inf"), float("nan")]), torch.arange(levels).float()])
    picks = torch.randint(len(values), (rows, width), generator=torch.Generator().manual_seed(seed))
    logits_RV = values[picks]
    assert native.NativeOps(native.load(), torch.float32, 1).argmax(logits_RV) == reference.argmax(logits_RV)


@pytest.mark.usefixtures("library")
def test_native_writes_the_slots_and_nothing_else() -> None:
    """Keys and values are strided parts of wider rows."""
    for dtype in DTYPES:
        pools = [torch.zeros(6, 4, 2, 16, dtype=dtype) for _ in range(4)]
        wide = torch.randn(7, 5, 16).to(dtype)
        batch = paged_batch([3, 4], [2, 0], [[5, 1], [2]], pools[0])
        keys, values, ops = wide[:, 1:3], wide[:, 3:5], native.NativeOps(native.load(), dtype, 1)
        ops.reshape_and_cache(keys, values, pools[0], pools[1], batch)
        reference.reshape_and_cache(keys, values, pools[2], pools[3], batch)
        assert torch.equal(pools[0], pools[2])
        assert torch.equal(pools[1], pools[3])


def test_the_table_falls_back_step_by_step_and_says_why() -> None:
    """What is left out, or cannot serve, is named with its reason; the reference serves anything."""
    ops = choose(CPU, torch.float32, head_dim=64, hidden_size=64, without=("native", "onednn"))
    alone = DENSE - {"all_reduce"}  # which nobody is asked for
    assert {op: served.by for op, served in ops.served.items()} == dict.fromkeys(alone, "torch")
    assert ops.served["linear"].instead_of == {"native": "left out on request", "onednn": "left out on request"}
    assert set(ops.fallbacks) == alone
    odd = choose(CPU, torch.float64, head_dim=8, hidden_size=8)
    assert "float64" in odd.served["rope"].instead_of["native"]
    weight_OI, x_TI, y_TO = torch.randn(4, 8).double(), torch.randn(2, 8).double(), torch.empty(2, 4).double()
    odd.linear(weight_OI)(x_TI, y_TO)
    torch.testing.assert_close(y_TO, x_TI @ weight_OI.T)


def test_without_triton_pytorch_serves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason; what Triton has no kernel for is no fallback."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ops = choose(torch.device("cuda"), torch.bfloat16, head_dim=64, hidden_size=64)
    assert {served.by for served in ops.served.values()} == {"torch"}
    assert ops.served["paged_attention"].instead_of == {"triton": "Triton is not installed"}
    lacking = {op for op, served in ops.served.items() if "triton" in served.instead_of}
    assert DENSE - lacking == {"linear", "rope_angles", "argmax", "all_reduce"}


@pytest.mark.parametrize(
    ("dtype", "capability", "head_dim", "reason"),
    [
        (torch.float64, (9, 0), 64, "no kernels for float64"),
        (torch.bfloat16, (7, 5), 64, r"compute capability \(7, 5\) is below \(8, 0\)"),
        (torch.bfloat16, (9, 0), 512, "head_dim 512 is more than 256"),
    ],
)
def test_triton_says_what_it_does_not_serve(
    dtype: torch.dtype, capability: tuple[int, int], head_dim: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is not here is described by its capability."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fails = gpu.fails(torch.device("cuda"), dtype) or gpu.attention_fails(head_dim)
    assert re.fullmatch(reason, str(fails))
    assert gpu.fails(torch.device("cuda"), torch.float16) == (None if capability >= (8, 0) else fails)


@pytest.mark.usefixtures("library")
def test_the_table_serves_natively_where_it_can() -> None:
    """And falls back for the one operator whose shape does not fit."""
    ops = choose(CPU, torch.float32, head_dim=64, hidden_size=64)
    assert not ops.fallbacks
    narrow = choose(CPU, torch.float32, head_dim=10, hidden_size=64)
    assert narrow.fallbacks == ("paged_attention",)
    assert "head_dim 10" in narrow.served["paged_attention"].instead_of["native"]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "/bin/false"])
def test_without_a_compiler_there_is_one_warning(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch serves everything, the reason is kept, and a second model does not warn again."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (native.load, table._build_fails, build._version):
        cached.cache_clear()
    try:
        with pytest.warns(UserWarning, match="CPU kernels") as caught:
            ops = choose(CPU, torch.float32, head_dim=64, hidden_size=64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            choose(CPU, torch.bfloat16, head_dim=64, hidden_size=64)
    finally:
        for cached in (native.load, table._build_fails, build._version):
            cached.cache_clear()
    assert len(caught) == 1
    assert compiler in ops.served["paged_attention"].instead_of["native"]
    assert ops.served["paged_attention"].by == "torch"
    x_TD, out_TD = torch.randn(2, 8), torch.empty(2, 8)
    ops.rms_norm(x_TD, torch.ones(8), EPS, out_TD)
    torch.testing.assert_close(out_TD, F.rms_norm(x_TD, (8,), None, EPS))


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_processes_that_compile_together_end_with_one_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them start on an empty cache; both load what is there in the end, and no half-written file remains."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-c", "from xllm_lab.engine.ops import native; native.load()"]
    children = [subprocess.Popen(command) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert [path.suffix for path in (tmp_path / "xllm-lab").iterdir()] == [".so"]


def _rotation(angle_TH2: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = angle_TH2.cos(), angle_TH2.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def _close(found: Tensor, expected: Tensor) -> None:
    """float32 within the order of additions, bfloat16 within one rounding of result and intermediate."""
    rtol, atol = (1e-4, 2e-5) if found.dtype == torch.float32 else (2**-7, 2**-6)
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)
