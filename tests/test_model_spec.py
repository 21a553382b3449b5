"""Parameters, KV and arithmetic of a model, from its config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.errors import ModelError
from xllm_lab.known_models import CONFIGS, known_model
from xllm_lab.model_spec import Experts, GroupedAttention, model_spec, read_model_spec

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SPARSE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "head_dim": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"head_dim": 16, "sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}),
    ("qwen2_moe", {**SPARSE, "shared_expert_intermediate_size": 40}),
    ("qwen3_moe", {**SPARSE, "head_dim": 16}),
    ("qwen3_moe", {**SPARSE, "head_dim": 16, "mlp_only_layers": [0]}),
    ("minimax_m2", {"head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    ("deepseek_v2", {**LATENT}),
    ("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    ("deepseek_v3", {**LATENT}),
    ("deepseek_v3", {**LATENT, "attention_bias": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_parameters_are_those_that_transformers_makes(kind: str, changes: dict[str, Any]) -> None:
    """Counted on the meta device, parameter by parameter, to the last one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {**TINY, **changes}
    config = transformers.AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    # A router's correction is a buffer there; checkpoints store it, and published counts contain it.
    counted += sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    spec = model_spec({"model_type": kind, **fields}, source="tiny")
    assert spec.num_params == counted


def test_parameters_are_those_of_the_engines_tiny_model() -> None:
    tiny_models = pytest.importorskip("tests.tiny_models")
    from safetensors import safe_open

    folder = tiny_models.tiny_model()
    with safe_open(folder / "model.safetensors", framework="np") as weights:
        counted = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118
    assert read_model_spec(folder).num_params == counted
    assert read_model_spec(folder).kv_bytes_per_token(4) == tiny_models.KV_BYTES_PER_TOKEN


# Billions as in each model's own card or report; of the active ones some count the embedding, some do not.
PUBLISHED = {
    "smollm2-135m": 0.1345,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "mixtral-8x7b": 46.7,
    "qwen2.5-7b": 7.61,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "deepseek-v3": 671,
    "deepseek-v2": 236,
    "deepseek-v2-lite": 15.7,
    "minimax-m2": 230,
}
PUBLISHED_ACTIVE = {
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22,
    "deepseek-v3": 37,
    "deepseek-v2": 21,
    "mixtral-8x7b": 12.9,
    "kimi-k2": 32,
}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_published_parameters(name: str, billions: float) -> None:
    assert known_model(name).num_params == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_ACTIVE.items())
def test_published_active_parameters_lie_between_the_two_ways_to_count(name: str, billions: float) -> None:
    spec = known_model(name)
    last_digit = 10.0 ** -len(str(billions).partition(".")[2])
    least = spec.num_active_params - spec.embedding_params
    assert least / 1e9 - last_digit / 2 <= billions <= spec.num_active_params / 1e9 + last_digit / 2


def test_kv_of_known_models() -> None:
    """128 KiB a token for Llama-3.1-8B; 70,272 bytes for DeepSeek-V3: (512 + 64) numbers in 61 layers."""
    assert known_model("meta-llama/Llama-3.1-8B").kv_bytes_per_token() == 128 * 1024
    assert known_model("DeepSeek-V3").kv_bytes_per_token() == 61 * 576 * 2 == 70_272
    assert known_model("DeepSeek-V3").kv_bytes_per_token(1) == 61 * 576


def test_arithmetic_per_token() -> None:
    """Two operations a parameter that multiplies, four a head's number and visible key."""
    spec = known_model("llama-3.1-8b")
    matrices = spec.num_params - spec.embedding_params - spec.vector_params
    assert spec.flops_per_token() == 2 * matrices + 32 * 4 * 32 * 128
    assert spec.flops_per_token(1000) - spec.flops_per_token() == 32 * 4 * 32 * 128 * 1000


@given(st.integers(1, 300), st.data())
def test_activated_experts(num_experts: int, data: st.DataObject) -> None:
    """Those of one token for one token, never more than there are, and the more the more tokens."""
    k = data.draw(st.integers(1, num_experts))
    tokens = data.draw(st.integers(1, 5000))
    experts = Experts(num_experts, k, 8, 8, 1)
    assert experts.num_activated(1) == pytest.approx(k)
    assert k * 0.999 <= experts.num_activated(tokens) <= min(num_experts, k * tokens) * 1.001
    assert experts.num_activated(tokens) <= experts.num_activated(tokens + 1)


def test_activated_experts_as_simulated() -> None:
    """Uniform routing, drawn: 3 of 16 experts for each of 7 tokens."""
    import numpy as np

    rng = np.random.default_rng(5)
    drawn = [len({int(e) for _ in range(7) for e in rng.choice(16, 3, replace=False)}) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(Experts(16, 3, 8, 8, 1).num_activated(7), rel=0.01)


def test_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3-8b"]), encoding="utf-8")
    spec = read_model_spec(tmp_path)
    assert spec == read_model_spec(tmp_path / "config.json")
    assert spec.attention == GroupedAttention(32, 8, 128)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not known; accepted are deepseek_v2"),
        ({"hidden_size": None}, "hidden_size is missing; a whole number of at least 1"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; a divisor of num_attention_heads 32"),
        ({"sliding_window": 512}, "sliding_window is 512; attention over the whole context"),
        ({"hidden_size": 4097}, "hidden_size 4097 is not divisible"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=f"my.json: {told}"):
        model_spec({**CONFIGS["llama-3.1-8b"], **changes}, source="my.json")


def test_more_experts_per_token_than_experts_are_refused() -> None:
    with pytest.raises(ModelError, match="num_experts_per_tok is 9; at most the 8 experts of num_local_experts"):
        model_spec({**CONFIGS["mixtral-8x7b"], "num_experts_per_tok": 9}, source="my.json")


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_files_that_are_no_config_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="config"):
        read_model_spec(tmp_path)


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(ModelError, match="no model 'gpt-9' is known; accepted are smollm2-135m"):
        known_model("gpt-9")
