"""Shapes of well-known models: the fields of their published `config.json` that decide cost.

Source: `config.json` in each model's own repository on huggingface.co, named in `_name_or_path`, as of 2026-08. Facts
only; for any other model give its `config.json` to `model_spec.read_model_spec`.
"""

from __future__ import annotations

from typing import Any

from xllm_lab.errors import ModelError
from xllm_lab.model_spec import ModelSpec, model_spec

# Hidden size, layers, heads, key-value heads, feed-forward size.
_Shape = tuple[int, int, int, int, int]


def _llama(name: str, shape: _Shape, **other: Any) -> dict[str, Any]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    common = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072}
    return {"_name_or_path": name, **dict(zip(keys, shape, strict=True)), **common, **other}


def _qwen3(name: str, shape: _Shape, **other: Any) -> dict[str, Any]:
    common = {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960}
    return _llama(f"Qwen/{name}", shape, **{**common, **other})


def _deepseek(name: str, **other: Any) -> dict[str, Any]:
    return {
        "_name_or_path": name,
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "vocab_size": 129_280,
        "max_position_embeddings": 163_840,
        **other,
    }


def _sparse(num_experts: int, size: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "num_experts": num_experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": size,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        (576, 30, 9, 3, 1536),
        vocab_size=49_152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _llama("meta-llama/Llama-3.1-8B", (4096, 32, 32, 8, 14_336)),
    "llama-3.1-70b": _llama("meta-llama/Llama-3.1-70B", (8192, 80, 64, 8, 28_672)),
    "mistral-7b-v0.3": _llama(
        "mistralai/Mistral-7B-v0.3",
        (4096, 32, 32, 8, 14_336),
        model_type="mistral",
        vocab_size=32_768,
        max_position_embeddings=32_768,
    ),
    "mixtral-8x7b": _llama(
        "mistralai/Mixtral-8x7B-v0.1",
        (4096, 32, 32, 8, 14_336),
        model_type="mixtral",
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32_000,
        max_position_embeddings=32_768,
    ),
    "qwen2.5-7b": _llama("Qwen/Qwen2.5-7B", (3584, 28, 28, 4, 18_944), model_type="qwen2", vocab_size=152_064),
    "qwen3-0.6b": _qwen3("Qwen3-0.6B", (1024, 28, 16, 8, 3072), tie_word_embeddings=True),
    "qwen3-1.7b": _qwen3("Qwen3-1.7B", (2048, 28, 16, 8, 6144), tie_word_embeddings=True),
    "qwen3-4b": _qwen3("Qwen3-4B", (2560, 36, 32, 8, 9728), tie_word_embeddings=True),
    "qwen3-8b": _qwen3("Qwen3-8B", (4096, 36, 32, 8, 12_288)),
    "qwen3-14b": _qwen3("Qwen3-14B", (5120, 40, 40, 8, 17_408)),
    "qwen3-32b": _qwen3("Qwen3-32B", (5120, 64, 64, 8, 25_600)),
    "qwen3-30b-a3b": _qwen3("Qwen3-30B-A3B", (2048, 48, 32, 4, 6144), **_sparse(128, 768)),
    "qwen3-30b-a3b-instruct-2507": _qwen3(
        "Qwen3-30B-A3B-Instruct-2507", (2048, 48, 32, 4, 6144), max_position_embeddings=262_144, **_sparse(128, 768)
    ),
    "qwen3-235b-a22b": _qwen3("Qwen3-235B-A22B", (4096, 94, 64, 4, 12_288), **_sparse(128, 1536)),
    "minimax-m2": _llama(
        "MiniMaxAI/MiniMax-M2",
        (3072, 62, 48, 8, 1536),
        model_type="minimax_m2",
        head_dim=128,
        num_local_experts=256,
        num_experts_per_tok=8,
        vocab_size=200_064,
        max_position_embeddings=196_608,
    ),
    "deepseek-v3": _deepseek("deepseek-ai/DeepSeek-V3"),
    "deepseek-r1": _deepseek("deepseek-ai/DeepSeek-R1"),
    "deepseek-v2": _deepseek(
        "deepseek-ai/DeepSeek-V2",
        model_type="deepseek_v2",
        hidden_size=5120,
        num_hidden_layers=60,
        intermediate_size=12_288,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        vocab_size=102_400,
    ),
    "deepseek-v2-lite": _deepseek(
        "deepseek-ai/DeepSeek-V2-Lite",
        model_type="deepseek_v2",
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        intermediate_size=10_944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        vocab_size=102_400,
    ),
    "kimi-k2": _deepseek(
        "moonshotai/Kimi-K2-Instruct",
        model_type="kimi_k2",
        num_attention_heads=64,
        n_routed_experts=384,
        first_k_dense_replace=1,
        vocab_size=163_840,
        max_position_embeddings=131_072,
    ),
}


def known_model(name: str) -> ModelSpec:
    """The spec of a model of `CONFIGS`, by its key or by its repository's name, in any case.

    Raises:
        ModelError: none of them.
    """
    for key, config in CONFIGS.items():
        full = str(config["_name_or_path"])
        if name.lower() in (key, full.lower(), full.lower().partition("/")[2]):
            return model_spec(config, source=key)
    raise ModelError(f"no model {name!r} is known; accepted are {', '.join(CONFIGS)}, or a path to a config.json")
