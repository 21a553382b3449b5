"""GGUF files: small ones written here for every architecture, and the embedded model against transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tests.engine.tiny import VOCAB, reference_logits, tiny_model
from xllm_lab.engine.device import Device
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.models import LoadedModel, load_model
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.errors import ModelError

# llama.cpp's names, written out here a second time: a mistake in the package's own table must show.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS = [5, 9, 33, 2, 80, 41, 7]


def write_gguf(path: Path, reference: Any, *, architecture: str, divisors: list[float] | None = None) -> None:
    """Writes a transformers model as llama.cpp's converter does: Llama's q and k rows interleaved per head."""
    config = reference.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(2)
    for name, tensor in reference.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.clone()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            number, part = stem.removeprefix("model.layers.").split(".", 1)
            writer.add_tensor(f"blk.{number}.{NAMES[part]}.{kind}", values.contiguous().numpy())
        else:
            writer.add_tensor(f"{NAMES[stem]}.{kind}", values.numpy())
    if divisors:
        writer.add_tensor("rope_freqs.weight", torch.tensor(divisors).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def last_logits(model: LoadedModel, device: Device, tokens: list[int]) -> torch.Tensor:
    pool = KvPool(model.config, num_blocks=1, block_size=64, dtype=torch.float32, device=device)
    return Runner(model.model, pool, device).run([SequenceChunk(tokens, 0, [0], True)])


@pytest.mark.parametrize("variant", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_logits_of_its_model(variant: str, tmp_path: Path, device: Device) -> None:
    reference = tiny_model(variant).reference
    path = tmp_path / "model.gguf"
    write_gguf(path, reference, architecture=reference.config.model_type)
    loaded = load_model(str(path), device=device)
    expected = load_model(str(tiny_model(variant).folder), device=device).config
    assert loaded.config.rms_norm_eps == pytest.approx(expected.rms_norm_eps)  # the file has it in float32
    assert loaded.config == dataclasses.replace(expected, rms_norm_eps=loaded.config.rms_norm_eps)
    assert loaded.eos_token_ids == (2,)
    torch.testing.assert_close(
        last_logits(loaded, device, TOKENS), reference_logits(reference, TOKENS)[-1:], rtol=0, atol=1e-4
    )


def test_rope_factors_in_a_tensor(tmp_path: Path, device: Device) -> None:
    """Llama 3 files carry the divisors of the frequencies; ours from `config.json` are the same numbers."""
    tiny = tiny_model("llama3_rope")
    divisors = list(load_model(str(tiny.folder), device=device).config.rope_divisors)
    assert min(divisors) == 1.0
    assert max(divisors) == pytest.approx(4.0)
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny.reference, architecture="llama", divisors=divisors)
    torch.testing.assert_close(
        last_logits(load_model(str(path), device=device), device, TOKENS),
        reference_logits(tiny.reference, TOKENS)[-1:],
        rtol=0,
        atol=1e-4,
    )


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model("llama").reference, architecture="llama")
    return path


def refusal(path: Path, device: Device) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(path), device=device)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_a_file_that_ends_inside_a_tensor(tiny_gguf: Path, device: Device) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:-500])
    assert "ends inside tensor" in refusal(tiny_gguf, device)


@pytest.mark.parametrize("kept_bytes", [3, 10, 100, 700])
def test_a_file_that_ends_inside_its_header(tiny_gguf: Path, device: Device, kept_bytes: int) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:kept_bytes])
    assert refusal(tiny_gguf, device).startswith("FILE: ")


def test_a_file_that_is_something_else(tiny_gguf: Path, device: Device) -> None:
    tiny_gguf.write_bytes(b"PK\x03\x04" + bytes(100))
    assert refusal(tiny_gguf, device) == r"FILE: starts with b'PK\x03\x04', a GGUF file starts with b'GGUF'"


def test_every_flipped_header_byte_is_survived(tiny_gguf: Path, device: Device) -> None:
    """Noise in the header is refused with our own error, or changes nothing that stops the model from loading."""
    data = tiny_gguf.read_bytes()
    refused = 0
    for at in range(4, 1500, 7):
        tiny_gguf.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            load_model(str(tiny_gguf), device=device)
        except ModelError:
            refused += 1
    assert refused > 100


def test_an_architecture_we_do_not_run(tmp_path: Path, device: Device) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model("llama").reference, architecture="mamba")
    assert refusal(path, device) == (
        "FILE: general.architecture 'mamba' is not supported; accepted are llama, qwen2, qwen3"
    )


def test_the_tiny_vocabulary_holds_the_tokens() -> None:
    """The token list above stays inside the tiny models' vocabulary."""
    assert max(TOKENS) < VOCAB
