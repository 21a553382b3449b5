"""A model divided over ranks computes what it computes whole, whatever its shape; what cannot be divided is refused.

Here the ranks are threads; `test_tensor_parallel.py` has processes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.threaded_ranks import ThreadedGroup, on_ranks
from xllm_lab.engine.device import open_device
from xllm_lab.engine.graphs import Graphs
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.layer_config import Latent, Mixture
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops.collectives import Group
from xllm_lab.engine.ops.experts import Routing
from xllm_lab.engine.ops.table import choose
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.sharding import Shard, refuse_if_indivisible
from xllm_lab.engine.weights import expected_shapes
from xllm_lab.engine.workspace import Workspace
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=70,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=128,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
)
MIXTURE = Mixture(routing=Routing(4, 2), intermediate_size=9, shared_size=0, layers=frozenset({0}), has_bias=False)
WHERE = InstanceConfig(max_tokens_per_batch=64, max_seqs_per_batch=4, block_size=4, num_kv_blocks=64, max_model_len=64)


def weights(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.randn(shape, generator=generator) * (1.0 if len(shape) == 1 else 0.3)
        for name, shape in expected_shapes(config).items()
    }


def runner(config: ModelConfig, group: Group | None = None, *, shapes: VllmBuckets | None = None) -> Runner:
    """Of the whole model, or of one rank's part."""
    device, shard = open_device("cpu"), Shard() if group is None else Shard(group.rank, group.size)
    model = DecoderModel(
        shard.config(config), shard.cut(weights(config), config), device=device.torch_device, group=group
    )
    pool = KvPool(
        model.config, num_blocks=WHERE.num_kv_blocks + 1, block_size=WHERE.block_size, dtype=model.dtype, device=device
    )
    made = Runner(model, pool, device)
    if shapes is not None:
        made.graphs = Graphs(model, pool, device, made.workspace, config=WHERE, policy=shapes)
    return made


@st.composite
def divided(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """Any model that can be divided over two to four ranks: KV heads are more, as many, or fewer than ranks."""
    ranks = draw(st.integers(2, 4))
    kv_heads = draw(st.sampled_from([k for k in (1, 2, 3, 4, 6, 8) if not k % ranks or not ranks % k]))
    heads = kv_heads * draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if not kv_heads * g % ranks]))
    config = ModelConfig(
        architecture="llama",
        vocab_size=draw(st.one_of(st.integers(5, 200), st.just(64 * ranks))),
        hidden_size=draw(st.sampled_from([16, 48, 64])),
        intermediate_size=ranks * draw(st.sampled_from([3, 16, 33, 64])),
        num_layers=draw(st.integers(1, 3)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([6, 16, 32])),
        max_position=128,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )
    return config, ranks


@st.composite
def divided_mixtures(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """With experts in some layers or all, with latent attention, or both."""
    config, ranks = draw(divided())
    mixture, latent = None, None
    is_deepseek = draw(st.booleans())
    if is_deepseek:
        latent = Latent(
            query_rank=draw(st.sampled_from([0, 12])),
            rank=draw(st.sampled_from([8, 24])),
            nope_dim=draw(st.sampled_from([6, 16])),
            rope_dim=8,
            value_dim=draw(st.sampled_from([6, 10])),
            is_interleaved=draw(st.booleans()),
        )
        config = replace(config, num_kv_heads=1, head_dim=latent.width, qk_norm=False, latent=latent)
    if draw(st.booleans()) or not is_deepseek:
        mixture = Mixture(
            routing=Routing(6, draw(st.integers(1, 4)), is_sigmoid=is_deepseek, is_normalized=True),
            intermediate_size=ranks * draw(st.sampled_from([1, 8, 12])),
            shared_size=ranks * draw(st.sampled_from([0, 8])),
            layers=frozenset(draw(st.sets(st.integers(0, config.num_layers - 1), min_size=1))),
            has_bias=is_deepseek,
        )
    kind = "deepseek_v3" if is_deepseek else draw(st.sampled_from(["mixtral", "qwen3_moe"]))
    return replace(config, architecture=kind, mixture=mixture), ranks


def steps(vocab_size: int) -> list[list[SequenceChunk]]:
    """A prompt in two chunks, a second one beside it, and decodes of both; not everybody wants logits."""
    tokens = [(7 * i + 3) % vocab_size for i in range(40)]
    first, second = range(5), range(10, 14)
    return [
        [SequenceChunk(tokens[:7], 0, first, False)],
        [SequenceChunk(tokens[7:11], 7, first, True), SequenceChunk(tokens[20:25], 0, second, False)],
        [SequenceChunk(tokens[25:26], 5, second, False)],
        [SequenceChunk(tokens[11:12], 11, first, True), SequenceChunk(tokens[26:27], 6, second, True)],
    ]


def logits(subject: Runner, vocab_size: int, sizes: tuple[int | None, ...] = (None,) * 4) -> list[Tensor]:
    chunks = steps(vocab_size)
    return [subject.run(c, size).clone() for c, size in zip(chunks, sizes, strict=True)]


def assert_same(parts: list[Tensor], whole: list[Tensor]) -> None:
    """But for what another order of summation explains."""
    for ours, theirs in zip(parts, whole, strict=True):
        largest = max(1.0, *theirs.abs().flatten().tolist()) if len(theirs) else 1.0
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * largest)


@settings(max_examples=80)
@given(divided() | divided_mixtures())
def test_the_parts_compute_what_the_whole_does(case: tuple[ModelConfig, int]) -> None:
    """And all ranks have the same logits, to the last bit."""
    config, ranks = case
    parts = on_ranks(ranks, lambda group: logits(runner(config, group), config.vocab_size))
    assert_same(parts[0], logits(runner(config), config.vocab_size))
    for rank in parts[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(rank, parts[0], strict=True))


@settings(max_examples=20)
@given(divided() | divided_mixtures())
def test_parts_in_graphs_compute_what_they_do_eagerly(case: tuple[ModelConfig, int]) -> None:
    """A captured step has the exchanges between its pieces; replays of it are no captures."""
    config, ranks = case
    sizes = (8, 16, 1, 4)

    def both(group: ThreadedGroup) -> tuple[list[Tensor], list[Tensor], int]:
        subject = runner(config, group, shapes=VllmBuckets())
        graphs = subject.graphs
        assert graphs is not None
        captured = [logits(subject, config.vocab_size, sizes) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*captured, strict=True))
        return captured[0], logits(runner(config, group), config.vocab_size), graphs.counts.captures

    for captured, eager, captures in on_ranks(ranks, both):
        assert_same(captured, eager)
        assert captures == len(sizes)


@given(divided() | divided_mixtures(), st.integers(1, 40), st.integers(1, 9))
def test_a_part_plans_the_memory_that_it_takes(case: tuple[ModelConfig, int], tokens: int, rows: int) -> None:
    """What a pool of graphs is refused by."""
    config, ranks = case
    shard = Shard(ranks - 1, ranks)
    workspace = Workspace(shard.config(config), torch.float32, torch.device("cpu"), shard)
    planned = workspace.bytes_for(tokens=tokens, logits=rows)
    workspace.reserve(tokens=tokens, logits=rows)
    assert workspace.num_bytes == planned
    part, parts = workspace.logit_parts(rows)
    assert len(parts) == ranks
    assert part.shape == parts[0].shape


@given(divided() | divided_mixtures())
def test_every_weight_is_somewhere(case: tuple[ModelConfig, int]) -> None:
    """Parts are of the shapes that a smaller model has; but for repeated KV heads, norms and padding, none is twice."""
    config, ranks = case
    whole = weights(config)
    parts = [Shard(r, ranks).cut(dict(whole), config) for r in range(ranks)]
    for rank, part in enumerate(parts):
        small = expected_shapes(Shard(rank, ranks).config(config))
        for name, tensor in part.items():
            if "embed" in name or "lm_head" in name:
                assert not tensor[len(whole[name][rank * -(-config.vocab_size // ranks) :]) :].any()
            else:
                assert tuple(tensor.shape) == small[name]
        missing = set(small) - set(part)
        assert missing == ({n for n in small if n.endswith("o_proj.bias")} if rank else set())
    for name in ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "w1", "w3"):
        for full in (n for n in whole if f"{name}.weight" in n):
            assert torch.equal(torch.cat([p[full] for p in parts]), whole[full])
    for name in ("o_proj", "down_proj", "w2"):
        for full in (n for n in whole if f"{name}.weight" in n):
            assert torch.equal(torch.cat([p[full] for p in parts], 1), whole[full])
    group = max(1, ranks // config.num_kv_heads)
    for name in ("k_proj", "v_proj"):
        for full in (n for n in whole if f"{name}.weight" in n):
            assert torch.equal(torch.cat([p[full] for p in parts[::group]]), whole[full])


@pytest.mark.parametrize("by", ["gloo", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_reduce_adds_what_every_rank_has(by: str, dtype: torch.dtype) -> None:
    """Whoever serves it; the table says who."""

    def reduce(group: ThreadedGroup) -> Tensor:
        left_out = () if by == "gloo" else ("gloo",)
        ops = choose(torch.device("cpu"), dtype, head_dim=16, hidden_size=32, without=left_out, group=group)
        assert ops.served["all_reduce"].by == by
        x_TD = torch.full((3, 5), float(group.rank + 1), dtype=dtype)
        ops.all_reduce(x_TD)
        return x_TD

    for found in on_ranks(3, reduce):
        assert torch.equal(found, torch.full((3, 5), 6.0, dtype=dtype))


def test_a_rank_that_is_alone_has_nobody_to_reduce_with() -> None:
    ops = choose(torch.device("cpu"), torch.float32, head_dim=16, hidden_size=32)
    x_TD = torch.ones(2, 3)
    ops.all_reduce(x_TD)
    assert torch.equal(x_TD, torch.ones(2, 3))
    assert "all_reduce" not in ops.served


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 0, "tensor_parallel is 0, at least 1 is accepted"),
        ({}, 3, "tensor_parallel is 3; a divisor of the 4 attention heads of mine is accepted"),
        ({"mixture": MIXTURE}, 2, "a divisor of the 9 channels of an expert of mine is accepted"),
        (
            {"mixture": replace(MIXTURE, intermediate_size=8, shared_size=9)},
            2,
            "a divisor of the 9 channels of the shared experts of mine is accepted",
        ),
        ({"intermediate_size": 49}, 2, "a divisor of the 49 channels of the MLP of mine is accepted"),
        (
            {"num_heads": 12, "num_kv_heads": 6},
            4,
            "tensor_parallel is 4; a divisor or a multiple of the 6 key-value heads of mine is accepted",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(changes: dict[str, int], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_if_indivisible(replace(CONFIG, **changes), ranks, "mine")  # type: ignore[arg-type]
