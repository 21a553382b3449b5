"""One CPU device with one thread for all engine tests.

The wait policy must be set before torch is imported: threads that spin on a busy machine make steps 50 times slower.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib
from typing import Any

import pytest
import torch

from xllm_lab.engine.device import Device, open_device
from xllm_lab.engine.gguf_file import read_gguf
from xllm_lab.engine.gguf_weights import gguf_config, gguf_tokenizer, gguf_weights
from xllm_lab.engine.models import LoadedModel, embedded_model, load_model

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when it is imported


@pytest.fixture(scope="session", autouse=True)
def device() -> Device:
    """Opened before any test computes, because oneDNN settles on an instruction set at its first operator."""
    return open_device("cpu", threads=1)


@pytest.fixture(scope="session")
def smollm2(device: Device) -> LoadedModel:
    """The embedded model in float32, loaded once."""
    return load_model("smollm2-135m", device=device, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return gguf_tokenizer(read_gguf(embedded_model()))


@pytest.fixture(scope="session")
def smollm2_reference() -> Any:
    """transformers' Llama over our own dequantised weights; `test_smollm2.py` shows that they are transformers' too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    file = read_gguf(embedded_model())
    ours = gguf_config(file)
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        max_position_embeddings=ours.max_position,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=2,
        eos_token_id=None,
        bos_token_id=1,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = gguf_weights(file, ours, torch.float32)
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are made on the meta device above
    return model.eval()


@pytest.fixture(scope="session")
def twenty_prompts(tokenizer: Any) -> list[list[int]]:
    """Short questions, which share the chat template's beginning, and passages of Python's own documentation."""
    topics = importlib.import_module("pydoc_data.topics").topics
    questions = ("What is the capital of France?", "Who wrote Hamlet?", "Name three colours.", "What is 2 + 2?")
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    passages = [tokenizer.encode(topics[name][: 150 + 40 * i]) for i, name in enumerate(sorted(topics)[5:21])]
    return [*chats, *passages]
