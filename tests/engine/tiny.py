"""Tiny models of every supported shape, made and saved by transformers with random weights."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

VOCAB = 96
_SAVED = tempfile.TemporaryDirectory(prefix="xllm_lab_tiny_")  # removed when the interpreter ends

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 32,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
_SPARSE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# name -> (model type, changes to the common shape)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biased": ("llama", {"attention_bias": True}),
    "llama_one_group": ("llama", {"num_key_value_heads": 6, "num_attention_heads": 6}),
    "llama_linear_rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama3_rope": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_yarn": ("qwen3", {"rope_parameters": _YARN}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**_SPARSE, "norm_topk_prob": True}),
    "qwen3_moe_every_second": ("qwen3_moe", {**_SPARSE, "num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "deepseek_v2": (
        "deepseek_v2",
        {**_LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v2_greedy": (
        "deepseek_v2",
        {**_LATENT, "q_lora_rank": 28, "first_k_dense_replace": 0, "n_shared_experts": 1},
    ),
    "deepseek_v3": ("deepseek_v3", {**_LATENT, "q_lora_rank": 28}),
    "deepseek_v3_yarn": (
        "deepseek_v3",
        {
            **_LATENT,
            "q_lora_rank": 28,
            "attention_bias": True,
            "rope_interleave": False,
            "rope_parameters": {**_YARN, "mscale": 0.8, "mscale_all_dim": 0.8},
        },
    ),
}
EXPERTS = tuple(name for name, (kind, _) in VARIANTS.items() if kind in ("mixtral", "qwen3_moe") or "deepseek" in kind)


class TinyModel(NamedTuple):
    folder: Path
    reference: Any


@functools.cache
def tiny_model(variant: str) -> TinyModel:
    """A saved checkpoint and transformers' own model of it. Biases and norms are random too, so that each one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = VARIANTS[variant]
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if "kv_lora_rank" in changes:
        del shape["head_dim"]  # it would be taken for the width of what is rotated
    config = AutoConfig.for_model(model_type, **{**shape, **changes})
    if model_type == "qwen2":
        config.head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    reference = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        routers = [b for name, b in reference.named_buffers() if name.endswith("e_score_correction_bias")]
        for parameter in (*reference.parameters(), *routers):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    folder = Path(_SAVED.name, variant)
    reference.save_pretrained(folder)
    return TinyModel(folder, reference)


def reference_logits(reference: Any, token_ids: list[int]) -> torch.Tensor:
    """transformers' logits after each token, shape [tokens, vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = reference(input_ids=torch.tensor([token_ids])).logits[0]
    return logits
