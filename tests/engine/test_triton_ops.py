"""Triton's operators against the reference: on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter shows indices, masks and arithmetic, in float32, float16 and bfloat16 (whose products it cannot do: they
are made of float32 copies, from the same rounded operands). It does not show what the compiler makes of the kernels:
`test_the_compiler_takes_every_kernel` does, without a GPU, as far as code, registers and shared memory go.
"""

# ruff: noqa: N815, PLR0917  (shapes live in the names of fields, too)

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.test_graphs import WHERE as STEPS
from tests.engine.test_graphs import captured, folder, runner, size_for, stories
from xllm_lab.engine.device import open_device
from xllm_lab.engine.graph_inputs import InputMemory
from xllm_lab.engine.graphs import Graphs
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.models import load_model
from xllm_lab.engine.ops import reference
from xllm_lab.engine.ops.batch import PagedBatch, paged_batch
from xllm_lab.engine.ops.gpu import serving
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.weights import read_safetensors
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets

triton = pytest.importorskip("triton", reason="Triton is not installed (the extra `test` brings it, on Linux)")

ON_GPU = torch.cuda.is_available()
DEVICE = open_device("cuda" if ON_GPU else "cpu")
WHERE = DEVICE.torch_device
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
EXAMPLES = 200 if ON_GPU else 30  # the interpreter takes milliseconds for each tile
NAN = float("nan")
ROWWISE = ("rms_norm", "add_rms_norm", "head_norm", "rope", "swiglu")
OPS = (*ROWWISE, "reshape_and_cache", "paged_attention")


def operators(num_cores: int = 1) -> serving.TritonOps:
    """One core never splits a sequence's keys."""
    assert ON_GPU or triton.knobs.runtime.interpret, "Triton was imported before conftest asked for its interpreter"
    return serving.TritonOps(num_cores, is_interpreted=not ON_GPU)


def close(found: Tensor, expected: Tensor) -> None:
    """float32 within the order of additions, others within a rounding of result and intermediate."""
    rtol, atol = {torch.float32: (1e-4, 2e-5), torch.float16: (2**-9, 2**-9)}.get(found.dtype, (2**-7, 2**-6))
    torch.testing.assert_close(found.float().cpu(), expected, rtol=rtol, atol=atol)


# ---- attention


class Case(NamedTuple):
    """A step, and the same step in the memory of a graph, if it is in one.

    Attributes:
        q_TNH: strided; rows of nobody are NaN, unless they are sequences that pad.
        batch: what the reference reads.
        given_batch: what the kernels read.
    """

    q_TNH: Tensor
    k_BPKH: Tensor
    v_BPKH: Tensor
    batch: PagedBatch
    given_batch: PagedBatch


def case(
    sequences: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    block_size: int,
    padding: int | None,
    seed: int = 0,
    scale: float = 1.0,
) -> Case:
    """Args: `sequences` as new and computed tokens; heads as K, group and H; `padding` rows of a graph, None: eager."""
    K, group, H = heads
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-(q + c) // block_size) for q, c in sequences]
    order = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
    tables = [order[sum(blocks[:i]) : sum(blocks[: i + 1])] for i in range(len(blocks))]
    used = sum(q for q, _ in sequences)
    wide = torch.randn(used, (group + 2) * K, H, generator=generator).to(dtype) * scale
    pools = [torch.randn(len(order) + 1, block_size, K, H, generator=generator).to(dtype) for _ in "kv"]
    queries, computed = [q for q, _ in sequences], [c for _, c in sequences]
    batch = paged_batch(queries, computed, tables, pools[0])
    _hide_what_is_nobodys(pools, tables, batch.kv_lens)
    if padding is None:
        given_batch = paged_batch(queries, computed, tables, pools[0].to(WHERE))
    else:
        chunks = [SequenceChunk([0] * q, c, t, True) for q, c, t in zip(queries, computed, tables, strict=True)]
        given_batch = in_a_graph(chunks, used + padding, block_size, nobodys=len(order))
        for pool in pools:
            pool[len(order)] = 1.0  # read by what pads, and by nobody else
        nobodys = torch.full((padding, *wide.shape[1:]), 1.0 if given_batch.is_decode else NAN, dtype=dtype)
        wide = torch.cat([wide, nobodys])
    return Case(wide[:, : group * K], pools[0], pools[1], batch, given_batch)


def _hide_what_is_nobodys(pools: Sequence[Tensor], tables: Sequence[Sequence[int]], kv_lens: Sequence[int]) -> None:
    """Whatever is read beyond a sequence shows."""
    P, rows = pools[0].shape[1], torch.ones(pools[0].shape[0] * pools[0].shape[1], dtype=torch.bool)
    for table, kv_len in zip(tables, kv_lens, strict=True):
        rows[[table[i // P] * P + i % P for i in range(kv_len)]] = False
    for pool in pools:
        pool.flatten(0, 1)[rows] = NAN


def in_a_graph(chunks: Sequence[SequenceChunk], size: int, block_size: int, *, nobodys: int) -> PagedBatch:
    is_decode = all(len(c.token_ids) == 1 for c in chunks)
    most = size if is_decode else len(chunks) + 3
    longest = max(len(c.block_table) for c in chunks)
    memory = InputMemory(
        tokens=size, sequences=most, blocks_per_sequence=longest + 1, block_size=block_size,
        padding_block=nobodys, device=DEVICE,
    )  # fmt: skip
    inputs = memory.of(size, is_decode=is_decode)
    memory.fill(inputs, [t for c in chunks for t in c.token_ids], chunks, is_decode=is_decode)
    return inputs.batch


def attend(subject: Case, num_cores: int = 1) -> None:
    """Rows of sequences as the reference has them; a decoding graph's padding is anything, the rest stays."""
    used = subject.batch.query_starts[-1]
    expected = torch.empty(used, *subject.q_TNH.shape[1:])
    reference.paged_attention(
        subject.q_TNH[:used].float(), subject.k_BPKH.float(), subject.v_BPKH.float(), subject.batch, expected
    )
    found = torch.full(subject.q_TNH.shape, 7.0, dtype=subject.q_TNH.dtype, device=WHERE)
    q_TNH, k_BPKH, v_BPKH = (strided_to(t) for t in subject[:3])
    operators(num_cores).paged_attention(q_TNH, k_BPKH, v_BPKH, subject.given_batch, found)
    close(found[:used], expected)
    if not subject.given_batch.is_decode:
        assert (found[used:] == 7.0).all()


def strided_to(tensor: Tensor) -> Tensor:
    """On the device, its rows as far apart as they were."""
    if not ON_GPU:
        return tensor
    wide = torch.empty(tensor.shape[0], tensor.stride(0), dtype=tensor.dtype, device=WHERE)
    view = wide.as_strided(tensor.shape, tensor.stride())
    view.copy_(tensor)
    return view


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Heads of any number and size, ragged lengths on both sides of blocks and tiles, scattered blocks."""
    P = draw(st.sampled_from([1, 4, 16, 24]))
    edges = st.builds(
        lambda blocks, off: max(blocks * P + off, 0), st.integers(0, 64 // P), st.sampled_from([-1, 0, 1])
    )
    computed = st.one_of(edges, st.integers(0, 100))
    queries = (
        st.just(1) if draw(st.booleans()) else st.one_of(st.just(1), edges.map(lambda n: n + 1), st.integers(1, 60))
    )
    return case(
        draw(st.lists(st.tuples(queries, computed), min_size=1, max_size=4)),
        dtype=draw(st.sampled_from(DTYPES)),
        heads=(draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.sampled_from([10, 16, 64, 80, 128]))),
        block_size=P,
        padding=draw(st.sampled_from([None, 0, 1, 5])),
        seed=draw(st.integers(0, 2**31)),
        scale=draw(st.sampled_from([0.1, 1.0, 8.0])),
    )


@settings(max_examples=EXAMPLES)
@given(subject=cases())
def test_attention_is_the_reference(subject: Case) -> None:
    """Prompts, chunks and decodes in one batch, eager or in a graph; memory that is nobody's is NaN."""
    attend(subject)


@settings(max_examples=EXAMPLES // 3)
@given(
    kv_lens=st.lists(st.sampled_from([1, 15, 255, 256, 257, 513, 1300]), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1, 16), (2, 3, 64), (1, 8, 128), (3, 5, 10)]),
    dtype=st.sampled_from(DTYPES),
    num_cores=st.sampled_from([2, 132]),
    padding=st.sampled_from([None, 2]),
    seed=st.integers(0, 2**31),
)
def test_a_decode_whose_keys_are_split_is_the_reference(
    kv_lens: list[int], heads: tuple[int, int, int], dtype: torch.dtype, num_cores: int, padding: int | None, seed: int
) -> None:
    """However many programs there are for few sequences, some without a key."""
    sequences = [(1, length - 1) for length in kv_lens]
    subject = case(sequences, dtype=dtype, heads=heads, block_size=16, padding=padding, seed=seed)
    assert operators(num_cores)._tiles(subject.q_TNH, subject.k_BPKH, subject.given_batch).grid[2] <= 6
    attend(subject, num_cores)


def test_more_sequences_than_are_looked_at_at_once() -> None:
    """Whose tile it is, is found among hundreds."""
    sequences = [(1 + i % 2, i % 7) for i in range(130)]
    attend(case(sequences, dtype=torch.float32, heads=(1, 2, 16), block_size=4, padding=3))


def test_many_query_heads_to_a_kv_head() -> None:
    """More than a tile of a prompt usually has rows."""
    attend(case([(3, 5), (1, 40)], dtype=torch.float32, heads=(1, 71, 64), block_size=16, padding=None))


class Recorded(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    operands: tuple[Any, ...]
    constants: dict[str, Any]


@pytest.mark.parametrize(
    ("size", "first", "second"),
    [
        (8, [(1, 3)], [(1, 600), (1, 15), (1, 16), (1, 0), (1, 301)]),
        (8, [], [(1, 5)] * 8),
        (8, [(3, 0), (1, 5)], [(5, 2), (2, 40)]),
        (40, [(9, 0), (1, 20)], [(1, 3), (17, 40), (1, 600), (11, 0), (2, 15)]),
        (40, [(30, 17)], [(39, 200), (1, 1)]),
    ],
)
def test_captured_launches_serve_the_next_step(
    size: int, first: list[tuple[int, int]], second: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph does: the same kernels, grids and addresses again, over memory filled for another step."""
    K, group, H, P, nobodys = 2, 3, 16, 4, 500
    is_decode = all(q == 1 for q, _ in first)
    memory = InputMemory(
        tokens=size, sequences=8, blocks_per_sequence=160, block_size=P, padding_block=nobodys, device=DEVICE
    )
    inputs = memory.of(size, is_decode=is_decode)
    wide = torch.randn(size, (group + 2) * K, H, generator=torch.Generator().manual_seed(1)).to(WHERE)
    pools = [torch.zeros(nobodys + 1, P, K, H, device=WHERE) for _ in "kv"]
    out_TNH = torch.zeros(size, group * K, H, device=WHERE)

    def fill(sequences: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        tables = [tuple((37 * i + 3 * j) % nobodys for j in range(160)) for i in range(len(sequences))]
        chunks = [SequenceChunk([1] * q, c, t, True) for (q, c), t in zip(sequences, tables, strict=True)]
        memory.fill(inputs, [1] * sum(q for q, _ in sequences), chunks, is_decode=is_decode)
        return tables

    launches: list[Recorded] = []
    launch = serving.launch

    def record(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
        launches.append(Recorded(kernel, grid, operands, constants))
        launch(kernel, grid, *operands, **constants)

    fill(first)
    with monkeypatch.context() as patch:
        patch.setattr(serving, "launch", record)
        ops, N = operators(num_cores=8), group * K
        ops.reshape_and_cache(wide[:, N : N + K], wide[:, N + K :], pools[0], pools[1], inputs.batch)
        ops.paged_attention(wide[:, :N], pools[0], pools[1], inputs.batch, out_TNH)
    assert len(launches) == (3 if is_decode else 2)  # a decode's keys are split, and merged

    tables = fill(second)
    wide.copy_(torch.randn(wide.shape, generator=torch.Generator().manual_seed(2)))
    generator = torch.Generator().manual_seed(3)
    mine = [torch.randn(pool.shape, generator=generator) for pool in pools]
    for pool, drawn in zip(pools, mine, strict=True):
        pool.copy_(drawn)
    for kernel, grid, operands, constants in launches:
        launch(kernel, grid, *operands, **constants)

    used, on_host = sum(q for q, _ in second), wide.cpu()
    batch = paged_batch([q for q, _ in second], [c for _, c in second], tables, mine[0])
    expected = torch.empty(used, N, H)
    reference.reshape_and_cache(on_host[:used, N : N + K], on_host[:used, N + K :], mine[0], mine[1], batch)
    reference.paged_attention(on_host[:used, :N], mine[0], mine[1], batch, expected)
    close(out_TNH[:used], expected)
    for pool, drawn in zip(pools, mine, strict=True):
        assert torch.equal(pool[:nobodys].cpu(), drawn[:nobodys])


# ---- rows


@settings(max_examples=EXAMPLES)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 19),
    half=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_rowwise_operators_are_the_reference(dtype: torch.dtype, tokens: int, heads: int, half: int, seed: int) -> None:
    """Widths that are no power of 2; rows are strided where the reference allows it, and what is between them stays."""
    generator, ops, H = torch.Generator().manual_seed(seed), operators(), 2 * half

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, delta, weight = drawn(tokens, H), drawn(tokens, H), drawn(H)
    found, stream = (t.to(WHERE) for t in (torch.empty_like(x), x.clone()))
    expected, sums = torch.empty(tokens, H), (x + delta).float()
    ops.rms_norm(stream, weight.to(WHERE), EPS, found)
    close(found, reference.rms_norm(x.float(), weight.float(), EPS, expected))
    ops.add_rms_norm(stream, delta.to(WHERE), weight.to(WHERE), EPS, found)
    close(stream, sums)
    close(found, reference.rms_norm(stream.float().cpu(), weight.float(), EPS, expected))

    wide, weight_NH = drawn(tokens, heads + 2, H), drawn(heads, H)
    mine, theirs = wide.clone().to(WHERE), wide.float()
    ops.head_norm(mine[:, 1:-1], weight_NH.to(WHERE), EPS)
    reference.head_norm(theirs[:, 1:-1], weight_NH.float(), EPS)
    close(mine, theirs)

    position_T, frequencies_H2 = (
        torch.randint(4000, (tokens,), generator=generator),
        torch.rand(half, generator=generator),
    )
    cos, sin = torch.empty(tokens, H, dtype=dtype), torch.empty(tokens, H, dtype=dtype)
    reference.rope_angles(position_T, frequencies_H2, cos, sin)
    mine, theirs = wide.clone().to(WHERE), wide.float()
    ops.rope(mine[:, 1:-1], cos.to(WHERE), sin.to(WHERE))
    reference.rope(theirs[:, 1:-1], cos.float(), sin.float())
    close(mine, theirs)
    assert torch.equal(mine[:, [0, -1]].cpu(), wide[:, [0, -1]])

    gate_up, gated, product = drawn(tokens, 2 * H) * 5, torch.empty(tokens, H, dtype=dtype), torch.empty(tokens, H)
    close(ops.swiglu(gate_up.to(WHERE), gated.to(WHERE)), reference.swiglu(gate_up.float(), product))


def test_wide_rows_are_cut() -> None:
    """As wide as those of large models."""
    gate_up, gated, expected = torch.randn(2, 2 * 4321), torch.empty(2, 4321), torch.empty(2, 4321)
    close(operators().swiglu(gate_up.to(WHERE), gated.to(WHERE)), reference.swiglu(gate_up, expected))
    x, weight, normed = torch.randn(2, 4321), torch.randn(4321), torch.empty(2, 4321)
    close(
        operators().rms_norm(x.to(WHERE), weight.to(WHERE), EPS, normed.to(WHERE)),
        reference.rms_norm(x, weight, EPS, torch.empty(2, 4321)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_land_in_their_slots_and_nowhere_else(dtype: torch.dtype) -> None:
    """Bit for bit; they are strided parts of wider rows."""
    pools = [torch.zeros(6, 4, 2, 20, dtype=dtype) for _ in "kvkv"]
    wide, batch = torch.randn(7, 5, 20).to(dtype), paged_batch([3, 4], [2, 0], [[5, 1], [2]], pools[0])
    reference.reshape_and_cache(wide[:, 1:3], wide[:, 3:5], pools[2], pools[3], batch)
    there, mine = wide.to(WHERE), [pool.to(WHERE) for pool in pools[:2]]
    batch = paged_batch([3, 4], [2, 0], [[5, 1], [2]], mine[0])
    operators().reshape_and_cache(there[:, 1:3], there[:, 3:5], mine[0], mine[1], batch)
    assert torch.equal(mine[0].cpu(), pools[2])
    assert torch.equal(mine[1].cpu(), pools[3])


# ---- a model


@pytest.mark.skipif(ON_GPU, reason="the model below is on the CPU")
def test_a_model_served_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chunks and decodes, in graphs, with the logits of the compiled kernels."""
    subject, expected = runner(VllmBuckets()), runner(None)
    ops = operators(num_cores=4)
    monkeypatch.setattr(subject._model, "ops", replace(subject._model.ops, **{op: getattr(ops, op) for op in OPS}))
    first, second, third = stories(3, range(60))
    alone, both, num_replays = [(first, 1)], [(first, 1), (second, 1)], 0
    for group in ([(first, 9)], [(first, 1), (second, 5)], both, both, alone, [(third, 12), (first, 1)]):
        chunks = [story.chunk(n, True) for story, n in group]
        told = expected.run(chunks).clone()
        size = size_for(VllmBuckets(), chunks)
        num_replays += size is not None
        torch.testing.assert_close(subject.run(chunks, size), told, rtol=1e-4, atol=1e-4)
    assert captured(subject).counts.captures < num_replays


# ---- the compiler


@pytest.mark.parametrize(
    ("capability", "dtype", "heads"),
    [
        (90, "bfloat16", (32, 8, 128)),
        *(
            pytest.param(capability, dtype, heads, marks=pytest.mark.slow)
            for capability, dtype, heads in [
                (80, "bfloat16", (32, 8, 128)),
                (90, "float16", (9, 3, 64)),
                (90, "bfloat16", (8, 1, 256)),
                (80, "float32", (16, 8, 128)),
            ]
        ),
    ],
)
def test_the_compiler_takes_every_kernel(
    capability: int, dtype: str, heads: tuple[int, int, int], tmp_path: Path
) -> None:
    """For real GPUs, which need not be here: products on the matrix unit, loads ahead, and all fits on any of them."""
    command = [sys.executable, "-m", "tests.engine.triton_compile", str(capability), dtype, *map(str, heads)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = Counter(one["kernel"] for one in told)
    assert kernels == {"attend": 3, "merge": 1, "rms_norm": 2} | dict.fromkeys(
        ("head_norm", "rope", "swiglu", "reshape_and_cache"), 1
    )
    for one in told:
        # What a block may have where it may have least: CUDA's C++ programming guide, compute capabilities 8.6 and 8.9.
        assert one["shared_bytes"] <= 99 << 10, one
        if one["kernel"] == "attend":
            assert one["copies"], one
            assert one["matrix_unit"] == (dtype != "float32"), one
        if dtype != "float32":
            assert one["stack_bytes"] <= 64, one  # what registers had no room for, of each thread


# ---- a real GPU


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graphs_on_a_gpu_are_whole(dtype: torch.dtype) -> None:
    """One call a replay, and the logits of eager steps, which PyTorch's own operators agree with."""
    loaded = load_model(str(folder()), device=DEVICE, dtype=dtype)
    plain = DecoderModel(
        loaded.config, read_safetensors(folder(), loaded.config, dtype), device=WHERE, without=("triton",)
    )
    runners = []
    for model in (loaded.model, loaded.model, plain):
        pool = KvPool(model.config, num_blocks=401, block_size=4, dtype=dtype, device=DEVICE)
        runners.append(Runner(model, pool, DEVICE))
    replayed, eager, reference_ = runners
    assert {op for op, served in loaded.model.ops.served.items() if served.by == "triton"} == set(OPS)
    replayed.graphs = Graphs(
        loaded.model, replayed.kv_pool, DEVICE, replayed.workspace, config=STEPS, policy=VllmBuckets()
    )
    replayed.graphs.warm()
    batch = stories(7, range(200))
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    for lengths in ([9] * 7, [1] * 7, [1, 5, 1, 12, 1, 1, 2], [1] * 3, [1] * 7, [1]):
        chunks = [story.chunk(n, True) for story, n in zip(batch, lengths, strict=False)]
        told = reference_.run(chunks)
        for found in (eager.run(chunks), replayed.run(chunks, size_for(VllmBuckets(), chunks))):
            torch.testing.assert_close(found, told, rtol=tolerance, atol=tolerance)
    counts = replayed.graphs.counts
    assert counts.calls == counts.captures < 6 + len(replayed.graphs._decode_sizes)
