"""A model divided over ranks computes what it computes whole, whatever its shape; and what cannot be divided is refused.

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
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops import reference
from xllm_lab.engine.ops.collectives import Group
from xllm_lab.engine.ops.table import choose
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.sharding import Shard, refuse_if_indivisible
from xllm_lab.engine.weights import expected_shapes
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
        vocab_size=draw(st.integers(5, 200)),
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


@settings(max_examples=60)
@given(divided())
def test_the_parts_compute_what_the_whole_does(case: tuple[ModelConfig, int]) -> None:
    """Logits agree within what another order of summation explains, and to the last bit between ranks."""
    config, ranks = case
    whole = logits(runner(config), config.vocab_size)
    parts = on_ranks(ranks, lambda group: logits(runner(config, group), config.vocab_size))
    for rank in parts:
        for ours, theirs, first in zip(rank, whole, parts[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * max(1.0, float(theirs.abs().max()))) if len(
                theirs
            ) else None
            assert torch.equal(ours, first)
