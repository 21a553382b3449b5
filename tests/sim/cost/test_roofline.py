"""Laws of a model that has no measurement to be compared with: floors, growth, and what division over devices saves."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.cost.cost_laws import batches, check_decode_steps, chunks, decode_batches, in_graph
from xllm_lab.errors import ConfigError
from xllm_lab.hardware import BUILT_IN, hardware, read_hardware
from xllm_lab.known_models import CONFIGS, known_model
from xllm_lab.model_spec import PRECISIONS, Precision
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.sim.cost import Batch, batch_of
from xllm_lab.sim.cost.roofline import Ceilings, Operator, RooflineCost, roofline_cost
from xllm_lab.sim.cost.sharding import Sharding, kv_blocks_that_fit
from xllm_lab.step_time import Chunk

DEVICES = tuple(read_hardware(BUILT_IN).values())
A3 = hardware("ascend-910c")
MODELS = tuple(known_model(name) for name in CONFIGS)
LLAMA, DEEPSEEK, QWEN_MOE = (known_model(name) for name in ("llama-3.1-8b", "deepseek-v3", "qwen3-30b-a3b"))
DENSE = tuple(spec for spec in MODELS if spec.experts is None)

shapes = st.sampled_from((EAGER, VllmBuckets(), VllmBuckets(cudagraph_capture_sizes="3,100")))


@st.composite
def costs(draw: st.DrawFn) -> RooflineCost:
    """Any device, model and layout, whether or not the model would fit."""
    spec = draw(st.sampled_from(MODELS))
    heads = spec.attention.num_heads
    tensor = draw(st.sampled_from([n for n in (1, 3, 4, 8, 16) if heads % n == 0]))
    data = draw(st.sampled_from((1, 2, 16)))
    sharding = Sharding(
        tensor=tensor, data=data, expert=draw(st.sampled_from((1, tensor * data))) if spec.experts else 1
    )
    device = draw(st.sampled_from(DEVICES))
    names = [n for n, p in PRECISIONS.items() if p.matrix_dtype in device.matrix_flops_per_s]
    precision = PRECISIONS[draw(st.sampled_from(names))]
    try:
        return RooflineCost(device, spec, sharding=sharding, precision=precision)
    except ConfigError as refused:
        assert "key-value heads" in str(refused)  # noqa: PT017 the one law drawn layouts may break
        return RooflineCost(device, spec, precision=precision)


@given(costs(), decode_batches(), st.integers(1, 40))
def test_steps_together_are_steps_alone(cost: RooflineCost, batch: Batch, num_steps: int) -> None:
    check_decode_steps(cost, batch, num_steps)


@given(costs(), batches())
def test_parts_make_the_step(cost: RooflineCost, batch: Batch) -> None:
    parts = cost.parts(batch)
    whole = max(parts.compute_us + parts.communication_us, parts.launch_us)
    assert cost.step(batch).us == pytest.approx(whole)
    assert cost.step(batch).us > 0
    assert not cost.step(batch).is_extrapolated


rates = st.floats(0, 1e3)
operators = st.lists(st.builds(Operator, st.just("any"), rates, rates, rates), min_size=1, max_size=20)


@given(operators, st.integers(1, 100_000))
def test_each_operator_takes_the_longer_of_arithmetic_and_bytes(made: list[Operator], tokens: int) -> None:
    one_by_one = sum(max(op.flops_us * tokens, op.weights_us + op.bytes_us * tokens) for op in made)
    assert Ceilings(made).us(tokens) == pytest.approx(one_by_one)


@given(costs(), decode_batches(), st.integers(1, 5000))
def test_more_context_is_never_faster(cost: RooflineCost, batch: Batch, more: int) -> None:
    assert cost.step(batch).us <= cost.step(batch._replace(decode_kv_tokens=batch.decode_kv_tokens + more)).us


@given(costs(), decode_batches(), st.integers(1, 2000), shapes)
def test_one_more_decode_is_never_faster(cost: RooflineCost, batch: Batch, context: int, policy: ShapesPolicy) -> None:
    """Captured or not: beyond the last graph there is no padding, but there are more tokens than in it."""
    more = batch._replace(
        num_decodes=batch.num_decodes + 1,
        decode_kv_tokens=batch.decode_kv_tokens + context,
        num_logits=batch.num_logits + 1,
    )
    us, longer_us = (cost.step(in_graph(b, policy)).us for b in (batch, more))
    assert us <= longer_us * (1 + 1e-12)


@given(costs(), chunks, st.integers(1, 3000), st.integers(1, 3000))
def test_a_longer_chunk_is_never_faster(cost: RooflineCost, chunk: Chunk, tokens: int, context: int) -> None:
    base, longer, later = (
        cost.step(Batch((c,), 0, 0, 0, 1)).us
        for c in (
            chunk,
            chunk._replace(num_tokens=chunk.num_tokens + tokens),
            chunk._replace(num_computed_tokens=chunk.num_computed_tokens + context),
        )
    )
    assert base <= longer
    assert base <= later


@given(st.sampled_from(DENSE), st.sampled_from(DEVICES), batches(), st.sampled_from(("bf16", "w4a16")))
def test_no_step_beats_reading_the_weights_or_the_arithmetic(spec, device, batch, precision) -> None:  # type: ignore[no-untyped-def]
    """At the data sheet's own figures, and counted another way: from parameters instead of operators."""
    cost = RooflineCost(device, spec, precision=PRECISIONS[precision])
    head = spec.vocab_size * spec.hidden_size
    weights = spec.weight_bytes(PRECISIONS[precision]) - 2 * spec.embedding_params * (not spec.is_tied)
    weights -= 2 * (spec.vector_params + head * (batch.num_logits == 0))
    flops = 2 * (sum(m.num_params for m in spec.matmuls) - head) * batch.num_tokens + 2 * head * batch.num_logits
    us = cost.step(batch).us
    assert us >= weights / device.hbm_bytes_per_s * 1e6
    assert us >= flops / device.matrix_flops_per_s["bf16"] * 1e6


@given(st.sampled_from(DENSE), batches())
def test_a_mixed_batch_costs_less_than_its_parts(spec, batch) -> None:  # type: ignore[no-untyped-def]
    """They share one reading of the weights."""
    cost = RooflineCost(A3, spec)
    if not batch.prefills or not batch.num_decodes:
        return
    decodes = Batch((), batch.num_decodes, batch.decode_kv_tokens, batch.max_decode_kv_tokens, batch.num_decodes)
    prefills = Batch(batch.prefills, 0, 0, 0, batch.num_logits - batch.num_decodes)
    assert cost.step(batch).us < cost.step(decodes).us + cost.step(prefills).us


@given(batches(), st.sampled_from((1, 2, 4)))
def test_tensor_parallelism_divides_compute_and_adds_communication(batch: Batch, tensor: int) -> None:
    one, two = (RooflineCost(A3, LLAMA, sharding=Sharding(tensor=n)).parts(batch) for n in (tensor, 2 * tensor))
    assert one.compute_us / 2 < two.compute_us < one.compute_us
    assert one.communication_us < two.communication_us
    assert (one.communication_us == 0) == (tensor == 1)


def test_key_value_heads_are_divided_while_they_last() -> None:
    """8 heads over 16 devices: each reads one, so KV takes as long as over 8."""
    per_token = [
        Sharding(tensor=n).kv_bytes_per_token(known_model("qwen3-32b"), Precision()) / 64 for n in (1, 4, 8, 16)
    ]
    assert per_token == [2 * 8 * 128 * 2, 2 * 2 * 128 * 2, 2 * 128 * 2, 2 * 128 * 2]
    latent = [Sharding(tensor=n).kv_bytes_per_token(DEEPSEEK, Precision()) for n in (1, 16)]
    assert latent == [70_272, 70_272]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spec", [s for s in DENSE if not s.is_tied], ids=lambda s: s.name)
def test_devices_hold_the_model_between_them(spec, precision) -> None:  # type: ignore[no-untyped-def]
    p = PRECISIONS[precision]
    each = Sharding(tensor=4).weight_bytes(spec, p)
    assert 4 * each == pytest.approx(spec.weight_bytes(p) + 3 * 2 * spec.vector_params)


def test_expert_parallelism_spreads_the_experts() -> None:
    """16 devices hold 16 of 256 experts each, in 58 layers."""
    p = PRECISIONS["w8a8"]
    alone, spread = (Sharding(tensor=1, data=n, expert=n).weight_bytes(DEEPSEEK, p) for n in (1, 16))
    experts = DEEPSEEK.experts
    assert experts is not None
    assert alone - spread == pytest.approx(240 * 58 * experts.params_per_expert)
    assert Sharding(data=288, expert=288).experts_per_device(DEEPSEEK) == 1


@given(st.integers(1, 200))
def test_a_small_batch_reads_only_the_experts_it_meets(num_decodes: int) -> None:
    """Reading all of them would take longer, and one token reads 8 of 128."""
    cost = RooflineCost(A3, QWEN_MOE)
    batch = Batch((), num_decodes, num_decodes, 1, num_decodes, graph_tokens=num_decodes)
    everything = QWEN_MOE.num_params * 2 / (A3.hbm_bytes_per_s * A3.hbm_frac) * 1e6
    kernels = RooflineCost(replace(A3, hbm_bytes_per_s=1e15), QWEN_MOE).step(batch).us
    read = cost.step(batch).us - kernels
    assert read < everything
    if num_decodes == 1:
        assert read == pytest.approx(everything * QWEN_MOE.num_active_params / QWEN_MOE.num_params, rel=0.15)


def test_decodes_of_one_bucket_cost_the_same_but_for_context() -> None:
    cost = RooflineCost(A3, LLAMA)
    nine, sixteen = (cost.step(Batch((), n, 1600 - n, 200, n, graph_tokens=16)).us for n in (9, 16))
    assert nine == sixteen
    assert cost.step(Batch((), 8, 1592, 200, 8, graph_tokens=8)).us < nine


def test_a_replayed_graph_needs_no_launches() -> None:
    """One token of a small model: eager, the host is the slower of the two."""
    slow_host = replace(A3, launch_us=50.0)
    small = known_model("smollm2-135m")
    cost, eager = RooflineCost(slow_host, small), Batch((), 1, 10, 10, 1)
    replayed = eager._replace(graph_tokens=1)
    assert cost.step(eager).us == cost.parts(eager).launch_us > cost.step(replayed).us
    assert cost.parts(replayed).launch_us == 0


def test_prompts_in_a_graph_launch_their_attention() -> None:
    """It is between the pieces."""
    cost, prompt = RooflineCost(A3, LLAMA), Batch((Chunk(2, 0),), 0, 0, 0, 1)
    replayed = cost.parts(prompt._replace(graph_tokens=2))
    assert replayed.launch_us == LLAMA.num_layers * A3.launch_us < cost.parts(prompt).launch_us
    assert replayed.compute_us == cost.parts(prompt).compute_us


def test_one_decode_of_llama_by_hand() -> None:
    """8.03e9 parameters less the embedding, read at 0.841 * 1.6 TB/s, and 32 * 7 + 32 * 3 + 32 + 4 - 32 kernels."""
    cost = RooflineCost(A3, LLAMA)
    read_us = 2 * (LLAMA.num_params - LLAMA.embedding_params) / (0.841 * 1.6e12) * 1e6
    kernels = 32 * (6 + 1 + 3) + 4
    us = cost.step(Batch((), 1, 0, 0, 1, graph_tokens=1)).us
    assert us == pytest.approx(read_us + kernels * A3.kernel_us, rel=0.01)


@given(costs(), st.integers(1, 8), st.integers(0, 5000), st.integers(1, 40))
def test_rows_that_verify_drafts_lie_between_a_decode_and_as_many(
    cost: RooflineCost, rows: int, context: int, seqs: int
) -> None:
    """They read the context once, which that many decodes do each."""
    verified = cost.step(batch_of([Chunk(rows, context)] * seqs, rows * seqs)).us
    alone = cost.step(batch_of([Chunk(1, context)] * seqs, seqs)).us
    apart = cost.step(batch_of([Chunk(1, context + k) for k in range(rows)] * seqs, rows * seqs)).us
    assert alone * (1 - 1e-9) <= verified <= apart * (1 + 1e-9)


def test_kv_blocks_that_fit() -> None:
    """0.9 * 64 GiB - 16.06 GB of weights, in blocks of 128 tokens of 128 KiB: 2728."""
    blocks = kv_blocks_that_fit(A3, LLAMA)
    assert blocks == int((0.9 * 2**36 - LLAMA.num_params * 2) / (128 * 2**17))
    assert kv_blocks_that_fit(A3, LLAMA, block_size=16) // 8 == pytest.approx(blocks, abs=1)
    assert kv_blocks_that_fit(A3, LLAMA, tensor_parallel=2) > 2 * blocks


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {},
            r"Qwen3-235B-A22B needs 437.9 GiB of weights and 0.18 MiB .* on each of 1 .* 380.3 GiB more than 90%",
        ),
        ({"tensor_parallel": 3}, "tensor_parallel is 3; a divisor of the 64 attention heads of Qwen/Qwen3-235B-A22B"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0, at least 1 is accepted"),
        ({"expert_parallel": 4}, "expert_parallel is 4; accepted are 1, or tensor times data parallel, 1"),
        ({"precision": PRECISIONS["fp8"], "tensor_parallel": 16}, "ascend-910c has no matrix units for fp8"),
        (
            {"tensor_parallel": 64, "data_parallel": 64, "expert_parallel": 4096},
            "4096 devices of ascend-910c are asked",
        ),
    ],
)
def test_impossible_layouts_are_refused(arguments: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        roofline_cost(A3, known_model("qwen3-235b-a22b"), **arguments)  # type: ignore[arg-type]


def test_experts_of_a_dense_model_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"expert_parallel is 2; meta-llama/Llama-3.1-8B has no experts, so 1 is accepted"
    ):
        RooflineCost(A3, LLAMA, sharding=Sharding(tensor=2, expert=2))


def test_it_travels_to_workers() -> None:
    cost = RooflineCost(A3, LLAMA)
    batch = Batch((Chunk(7, 3),), 2, 30, 20, 3)
    assert pickle.loads(pickle.dumps(cost)).step(batch) == cost.step(batch)
