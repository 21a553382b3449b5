"""Captured steps: the tokens of eager ones whatever the shapes, no captures and no memory in a steady run, all counted.

Most of it is on a model that the compiled kernels serve whole; where there is no compiler, PyTorch serves, in pieces.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.test_engine_serving import STEP_TIME, config, crowd
from tests.laws import obey_the_laws
from tests.small_runs import batch_policies, busy_workloads, tight_configs
from tests.tiny_models import VOCAB_SIZE, tiny_model, write_tiny_model
from xllm_lab.engine.device import open_device
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.graph_inputs import InputMemory
from xllm_lab.engine.graphs import Graphs
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.models import load_model
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.weights import read_safetensors
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapePlan, ShapesPolicy, ShapeView
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.records import Records
from xllm_lab.runs import read_run
from xllm_lab.sim.parity import parity
from xllm_lab.step_shape import StepShape, decide_shape
from xllm_lab.workload import Workload

WHERE = InstanceConfig(
    max_tokens_per_batch=96, max_seqs_per_batch=20, block_size=4, num_kv_blocks=400, max_model_len=128
)
EVERYTHING = VllmBuckets()  # replays prompts, too
CAPTURING: tuple[ShapesPolicy, ...] = (
    EVERYTHING,
    PowersOfTwo(max_graph_tokens=16, graphs_prefill=True),
    XllmBuckets(),
    XllmBuckets(acl_graph_decode_batch_size_limit=5, enable_graph_mode_decode_no_padding=True),
    XllmBuckets(enable_prefill_piecewise_graph=True, max_tokens_for_graph_mode=40),
)


@functools.cache
def folder() -> Path:
    """A model whose every operator the kernels serve, in either type: widths are multiples of vectors and tiles."""
    return write_tiny_model(
        tiny_model() / "vectors", hidden_size=64, intermediate_size=128, head_dim=64, tie_word_embeddings=True
    )


@functools.cache
def model(dtype: torch.dtype, without: tuple[str, ...] = ()) -> DecoderModel:
    device, loaded = open_device("cpu"), load_model(str(folder()), device=open_device("cpu"), dtype=dtype)
    weights = read_safetensors(folder(), loaded.config, dtype)
    return DecoderModel(loaded.config, weights, device=device.torch_device, without=without)


def runner(
    shapes: ShapesPolicy | None,
    *,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
    pool_bytes: int | None = None,
    where: InstanceConfig = WHERE,
) -> Runner:
    device, subject = open_device("cpu"), model(dtype, without)
    pool = KvPool(
        subject.config,
        num_blocks=where.num_kv_blocks + 1,
        block_size=where.block_size,
        dtype=subject.dtype,
        device=device,
    )
    made = Runner(subject, pool, device)
    if shapes is not None:
        made.graphs = Graphs(subject, pool, device, made.workspace, config=where, policy=shapes, pool_bytes=pool_bytes)
    return made


def captured(subject: Runner) -> Graphs:
    assert subject.graphs is not None
    return subject.graphs


def size_for(shapes: ShapesPolicy, chunks: Sequence[SequenceChunk], where: InstanceConfig = WHERE) -> int | None:
    shape = StepShape(
        num_tokens=sum(len(c.token_ids) for c in chunks),
        num_seqs=len(chunks),
        is_decode=all(len(c.token_ids) == 1 for c in chunks),
        max_context_tokens=max(c.num_computed_tokens + len(c.token_ids) for c in chunks),
        max_tokens_per_batch=where.max_tokens_per_batch,
        max_seqs_per_batch=where.max_seqs_per_batch,
        max_model_len=where.max_model_len,
    )
    return decide_shape(shapes, shape).num_tokens


@dataclass
class Story:
    """A sequence with its own blocks, and what both runners have computed of it."""

    blocks: tuple[int, ...]
    computed: int = 0

    def chunk(self, num_tokens: int, num_logits: bool) -> SequenceChunk:
        tokens = [(7 * (self.computed + i) + self.blocks[0]) % VOCAB_SIZE for i in range(num_tokens)]
        made = SequenceChunk(tokens, self.computed, self.blocks, num_logits)
        self.computed += num_tokens
        return made


def stories(count: int, order: Sequence[int]) -> list[Story]:
    """Of 64 tokens at most, on blocks in any order."""
    return [Story(tuple(order[16 * i : 16 * i + 16])) for i in range(count)]


def same(one: Tensor, other: Tensor, *, exactly: bool, dtype: torch.dtype) -> None:
    if exactly:
        assert torch.equal(one, other)
    else:
        # bfloat16 products of PyTorch round otherwise at other numbers of rows.
        tolerance = 1e-4 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "without"),
    [(torch.float32, ()), (torch.bfloat16, ()), (torch.float32, ("native",)), (torch.float32, ("native", "onednn"))],
)
@pytest.mark.parametrize("shapes", CAPTURING, ids=lambda p: type(p).__name__)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_walk_over_the_edges_of_graphs(
    shapes: ShapesPolicy, dtype: torch.dtype, without: tuple[str, ...], data: st.DataObject
) -> None:
    """Batches grow, shrink, sit on both sides of a bucket's edge, mix prompts and decodes, and want any logits.

    Rows do not see each other in our kernels, so that the logits are the same to the last bit.
    """
    subject, eager = runner(shapes, dtype=dtype, without=without), runner(None, dtype=dtype, without=without)
    order = data.draw(st.permutations(range(WHERE.num_kv_blocks)))
    alive = stories(20, order)
    exactly = {s.by for s in model(dtype, without).ops.served.values()} == {"native"}
    num_replays = 0
    for _ in range(data.draw(st.integers(2, 8))):
        count = data.draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 19, 20]))
        group = data.draw(st.permutations(alive))[:count]
        longest = data.draw(st.sampled_from([1, 1, 1, 2, 9]))
        lengths = [data.draw(st.integers(1, longest)) for _ in group]
        chunks = [
            s.chunk(n, data.draw(st.booleans()))
            for s, n in zip(group, lengths, strict=True)
            if s.computed + n <= 64 and sum(lengths) <= WHERE.max_tokens_per_batch
        ]
        if not chunks:
            continue
        size = size_for(shapes, chunks)
        event("eager" if size is None else "replayed")
        num_replays += size is not None
        same(subject.run(chunks, size), eager.run(chunks), exactly=exactly, dtype=dtype)
    assert captured(subject).counts.captures <= num_replays


def test_padding_touches_no_block_of_a_request() -> None:
    """Only the step's slots, and the block that nobody gets, are written."""
    subject = runner(EVERYTHING)
    (first, second) = stories(2, range(32))
    pool = captured(subject)._kv_pool
    for layer in pool.layers:
        layer.k_BPKH.fill_(3.0)
        layer.v_BPKH.fill_(3.0)
    captured(subject).warm()
    for chunks in ([first.chunk(5, True)], [first.chunk(1, True), second.chunk(1, True), Story((40,)).chunk(1, True)]):
        size = size_for(EVERYTHING, chunks)
        assert size is not None
        assert size > sum(len(c.token_ids) for c in chunks)
        subject.run(chunks, size)
    for layer in pool.layers:
        for tensor in layer:
            written = (tensor != 3.0).flatten(2).any(-1)
            slots = {(b, p) for b, p in written.nonzero().tolist() if b != WHERE.num_kv_blocks}
            assert slots == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (16, 0), (40, 0)}


def test_padding_reads_one_token_whatever_was_there_before() -> None:
    """A batch that shrank leaves nothing of those who went: neither their lengths nor their blocks and slots."""
    nobodys, sizes = 9, {"tokens": 8, "sequences": 8, "blocks_per_sequence": 3}
    memory = InputMemory(**sizes, block_size=4, padding_block=nobodys, device=open_device("cpu"))
    decode, mixed = memory.of(8, is_decode=True), memory.of(8, is_decode=False)
    memory.fill(decode, [5] * 8, [SequenceChunk([5], 9, (i, 8, 7), True) for i in range(8)], is_decode=True)
    memory.fill(decode, [6], [SequenceChunk([6], 5, (1, 2), True)], is_decode=True)
    assert decode.batch.kv_len_S.tolist() == [6] + [1] * 7
    assert decode.batch.block_table_SM[:, 0].tolist() == [1] + [nobodys] * 7
    assert decode.batch.slot_T.tolist() == [9, *(36 + i % 4 for i in range(7))]
    assert decode.batch.padded_lengths() == (list(range(1, 9)), [6] + [1] * 7)
    assert decode.batch.starts_S1.tolist() == list(range(9))
    assert (decode.token_T.tolist(), decode.position_T.tolist()) == ([6] + [0] * 7, [5] + [0] * 7)
    memory.fill(mixed, [6, 7, 8], [SequenceChunk([6, 7, 8], 3, (1, 2), True)], is_decode=False)
    assert mixed.batch.slot_T.tolist() == [7, 8, 9, 36, 37, 38, 39, 36]
    assert mixed.batch.padded_lengths() == ([3], [6])
    assert mixed.batch.kv_len_S.tolist() == [6] + [0] * 7
    assert mixed.batch.starts_S1.tolist() == [0] + [3] * 8
    assert (mixed.batch.query_starts, mixed.batch.kv_lens) == ([0, 3], [6])
    assert memory._host.nbytes == InputMemory.bytes_for(**sizes)


def allocating(profiled: torch.profiler.profile) -> set[str]:
    """Operators that took tensor memory."""
    events = profiled.events()  # type: ignore[no-untyped-call]
    return {e.name for e in events if e.self_cpu_memory_usage > 0}


def test_steady_decoding_captures_nothing_and_allocates_nothing() -> None:
    """PyTorch's own profiler sees no tensor memory come; inputs and logits lie where they lay."""
    subject = runner(EVERYTHING)
    if {s.by for s in model(torch.float32).ops.served.values()} != {"native"}:
        pytest.skip("no compiled kernels here")
    captured(subject).warm()
    before = captured(subject).counts.captures
    batch = stories(7, range(200))
    at, model_ops = set(), model(torch.float32).ops
    model_ops.argmax(subject.run([s.chunk(1, True) for s in batch], 8))
    steps = [[s.chunk(1, True) for s in batch] for _ in range(30)]
    with torch.profiler.profile(profile_memory=True) as profiled:
        for chunks in steps:
            logits_RV = subject.run(chunks, 8)
            model_ops.argmax(logits_RV)
            at.add(logits_RV.data_ptr())
    assert allocating(profiled) == set()
    assert len(at) == 1
    counts = captured(subject).counts
    assert counts.captures == before


def test_the_profiler_would_see_an_allocation() -> None:
    """Without this, the test above would prove nothing: an eager step allocates its indices."""
    subject = runner(None)
    story = Story(tuple(range(16)))
    with torch.profiler.profile(profile_memory=True) as profiled:
        subject.run([story.chunk(1, True)])
    assert "aten::empty" in allocating(profiled)


def test_a_replay_of_kernels_is_one_call() -> None:
    """And where PyTorch serves, a call for each operator, with the kernels between them in one."""
    for without in ((), ("native",)):
        subject = runner(XllmBuckets(), without=without)
        captured(subject).warm()
        counts = captured(subject).counts
        served = [s.by for s in model(torch.float32, without).ops.served.values()]
        if set(served) == {"native"}:
            assert counts.calls == counts.captures == 5
            assert counts.kernels > 10 * counts.calls
        else:
            assert counts.calls > 10 * counts.captures


def test_a_rehearsal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels load when they are first launched, a step runs before it is captured, and again."""
    subject, eager = runner(EVERYTHING), runner(None)
    monkeypatch.setattr(captured(subject)._recorder, "rehearses", True)
    batch = stories(3, range(60))
    for length in (5, 1, 1):
        chunks = [s.chunk(length, True) for s in batch]
        same(subject.run(chunks, size_for(EVERYTHING, chunks)), eager.run(chunks), exactly=False, dtype=torch.float32)
    for mine, theirs in zip(captured(subject)._kv_pool.layers, eager.kv_pool.layers, strict=True):
        torch.testing.assert_close(mine.k_BPKH[:-1], theirs.k_BPKH[:-1])


def test_the_pool_is_planned_before_anything_is_captured() -> None:
    """To the byte: what the workspace and the inputs hold afterwards, whatever ran meanwhile."""
    subject = runner(EVERYTHING)
    plan, graphs = captured(subject).plan, captured(subject)
    graphs.warm()
    batch = stories(20, range(400))
    for length in (4, 1, 1, 3):
        chunks = [s.chunk(length, True) for s in batch]
        subject.run(chunks, size_for(EVERYTHING, chunks))
        subject.run([chunks[0]])
    assert subject.workspace.num_bytes == plan.workspace_bytes
    assert graphs._memory._host.nbytes == plan.input_bytes
    assert graphs.describe()["pool_bytes"] == plan.num_bytes


def test_a_pool_that_does_not_fit_is_refused_with_the_numbers() -> None:
    """One byte less than planned; just enough is enough."""
    need = captured(runner(EVERYTHING)).plan.num_bytes
    runner(EVERYTHING, pool_bytes=need)
    with pytest.raises(ConfigError, match=rf"need a pool of {need} bytes.*accepted: {need - 1} \(graph_pool_bytes\)"):
        runner(EVERYTHING, pool_bytes=need - 1)


def test_a_captured_workspace_cannot_grow() -> None:
    """Graphs count on its addresses."""
    subject = runner(EVERYTHING)
    with pytest.raises(AssertionError, match="graphs count on addresses here"):
        subject.workspace.reserve(tokens=WHERE.max_tokens_per_batch + 1, logits=0)


# ---- served by the engine


@functools.cache
def engine(kernels: bool = True) -> Engine:
    """With a model that the kernels serve whole, or one whose heads are too narrow for their attention."""
    return Engine(EngineOptions(model=str(folder() if kernels else tiny_model()), device="cpu", dtype="float32"))


def outputs(
    workload: Workload, where: InstanceConfig, policy: BatchPolicy, shapes: ShapesPolicy
) -> dict[int, list[int]]:
    records = Records()
    engine().serve(workload, where, Policies(policy, shapes=shapes), records, step_time=STEP_TIME)
    obey_the_laws(workload, where, records.sort(), vocab_size=VOCAB_SIZE)
    return {r.id: r.output_token_ids.tolist() for r in records.requests}


@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
@pytest.mark.parametrize("name", policies("shapes"))
def test_whatever_the_shapes_the_tokens_are_the_same(name: str, mode: str) -> None:
    """With steps planned ahead on tokens that are still being drawn, too."""
    where, fcfs = config(async_scheduling=mode, max_seqs_per_batch=6), make_policy("batch", "fcfs")
    expected = outputs(crowd(), config(max_seqs_per_batch=6), fcfs, make_policy("shapes", "eager"))
    assert outputs(crowd(), where, fcfs, make_policy("shapes", name)) == expected


@settings(max_examples=12, deadline=None)
@given(
    workload=busy_workloads(),
    where=tight_configs(),
    policy=batch_policies(),
    shapes=st.sampled_from(CAPTURING),
    mode=st.sampled_from(ASYNC_SCHEDULING),
)
def test_any_run_keeps_the_laws_and_the_tokens(
    workload: Workload, where: InstanceConfig, policy: BatchPolicy, shapes: ShapesPolicy, mode: str
) -> None:
    """Preemptions, cancellations, tight pools. Who is cancelled keeps as many tokens as there was time for."""
    num_blocks = max(where.num_kv_blocks, -(-60 // where.block_size) + 1)
    where = replace(where, max_model_len=60, num_kv_blocks=num_blocks, async_scheduling=mode)
    replayed, expected = (outputs(workload, where, policy, one) for one in (shapes, make_policy("shapes", "eager")))
    assert replayed.keys() == expected.keys()
    for request, tokens in replayed.items():
        both = min(len(tokens), len(expected[request]))
        assert tokens[:both] == expected[request][:both]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_run_tells_of_its_graphs(mode: str, kernels: bool, tmp_path: Path) -> None:
    """Counts in the manifest, sizes in the records, as the policy in the manifest says again; and parity holds."""
    where = config(async_scheduling=mode, max_seqs_per_batch=6, max_tokens_per_batch=64)
    shapes = XllmBuckets(acl_graph_decode_batch_size_limit=4, enable_prefill_piecewise_graph=True)
    engine(kernels).replay(
        crowd(), where, Policies(make_policy("batch", "decode-first"), shapes=shapes), out=tmp_path / "run"
    )
    run = read_run(tmp_path / "run")
    assert parity(run).is_identical
    assert run.manifest.instance_policies().shapes == shapes
    counts, padded, eager = run.manifest.graphs, 0, Counter[str]()
    assert counts is not None
    for step in run.records.steps:
        shape = StepShape(
            num_tokens=sum(step.num_tokens),
            num_seqs=len(step.ids),
            is_decode=max(step.num_tokens) == 1,
            max_context_tokens=max(map(sum, zip(step.num_tokens, step.num_computed_tokens, strict=True))),
            max_tokens_per_batch=where.max_tokens_per_batch,
            max_seqs_per_batch=where.max_seqs_per_batch,
            max_model_len=where.max_model_len,
        )
        plan = decide_shape(shapes, shape)
        assert step.graph_tokens == plan.num_tokens
        if plan.num_tokens is None:
            eager[plan.reason] += 1
        else:
            padded += plan.num_tokens - shape.num_tokens
    assert counts["eager"] == dict(eager) == {"decode batch above the limit": sum(eager.values())}
    assert counts["replays"] == len(run.records.steps) - sum(eager.values()) > 0
    assert counts["padded_tokens"] == padded > 0
    assert counts["captures"] <= counts["replays"]


def test_eager_runs_have_no_graphs(tmp_path: Path) -> None:
    """Nothing is captured, counted, or padded."""
    run = engine().replay(crowd(3), config(), Policies(make_policy("batch", "fcfs")), out=tmp_path / "run")
    assert run.manifest.graphs is None
    assert run.manifest.policies["shapes"] == {"name": "eager"}
    assert {s.graph_tokens for s in run.records.steps} == {None}


def test_an_engine_refuses_graphs_that_do_not_fit() -> None:
    """Before it serves anybody."""
    small = Engine(EngineOptions(model=str(tiny_model()), device="cpu", graph_pool_bytes=1000))
    with pytest.raises(ConfigError, match=r"accepted: 1000 \(graph_pool_bytes\)"):
        small.serve(crowd(), config(), Policies(make_policy("batch", "fcfs"), shapes=XllmBuckets()), Records())
    small.serve(crowd(2), config(), Policies(make_policy("batch", "fcfs")), Records())
    with pytest.raises(ConfigError, match="graph_pool_bytes is -1, at least 0 is accepted"):
        Engine(EngineOptions(model=str(tiny_model()), device="cpu", graph_pool_bytes=-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrinks:
    """Forgets prompts: a graph for the sequences only."""

    decides: ClassVar[str] = "shapes"

    def decide(self, view: ShapeView) -> ShapePlan:
        return ShapePlan(num_tokens=view.num_seqs, reason="one each")


def test_an_illegal_plan_ends_the_run() -> None:
    """Rather than computing a part of a step."""
    with pytest.raises(PolicyError, match="shrinks runs a step of 2 tokens, 1 sequences, in a graph of 1"):
        engine().serve(crowd(), config(), Policies(make_policy("batch", "fcfs"), shapes=Shrinks()), Records())
