"""A checkpoint that is not right is refused in one line that says what and where."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.tiny import VARIANTS, reference_logits, tiny_model
from xllm_lab.engine.device import Device
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.models import load_model, model_config
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.weights import expected_shapes
from xllm_lab.errors import ModelError
from xllm_lab.model_spec import read_model_spec

WEIGHTS = "model.safetensors"
DEEPSEEK = {
    "model_type": "deepseek_v3",
    **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama").folder, tmp_path / "model"))


def refusal(name: Path | str, device: Device) -> str:
    """The one line a user reads, without the folder's name."""
    with pytest.raises(ModelError) as caught:
        load_model(str(name), device=device)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(name), "FOLDER")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS)


def test_a_truncated_file(folder: Path, device: Device) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    assert refusal(folder, device).startswith("FOLDER/model.safetensors: not a readable safetensors file: ")


def test_a_file_of_noise(folder: Path, device: Device) -> None:
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 8)
    assert refusal(folder, device).startswith("FOLDER/model.safetensors: not a readable safetensors file: ")


def test_an_empty_file(folder: Path, device: Device) -> None:
    (folder / WEIGHTS).write_bytes(b"")
    assert refusal(folder, device).startswith("FOLDER/model.safetensors: not a readable safetensors file: ")


def test_missing_tensors(folder: Path, device: Device) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        for name in [n for n in weights if n.startswith("model.layers.1.mlp")]:
            del weights[name]

    edit_weights(folder, edit)
    assert refusal(folder, device) == "FOLDER: tensor model.layers.1.mlp.gate_proj.weight is missing (and 2 more)"


def test_a_tensor_of_another_model(folder: Path, device: Device) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.layers.0.experts.weight": torch.zeros(2)}))
    assert refusal(folder, device) == "FOLDER: tensor model.layers.0.experts.weight is not part of this model"


def test_a_wrong_shape(folder: Path, device: Device) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(47)}))
    assert refusal(folder, device) == "FOLDER: tensor model.norm.weight has shape [47], [48] is accepted"


def test_superfluous_tensors_are_dropped(folder: Path, device: Device) -> None:
    """Old exporters write rotary tables, and the head again when it is tied."""
    edit_weights(
        folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    edit_config(folder, tie_word_embeddings=True)
    assert load_model(str(folder), device=device).config.tie_embeddings


def test_no_weights(folder: Path, device: Device) -> None:
    (folder / WEIGHTS).unlink()
    assert "no weights; accepted are model.safetensors or model.safetensors.index.json" in refusal(folder, device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_simulator_counts_what_the_engine_loads(variant: str) -> None:
    """Parameters and KV of a token, by two ways from the same config."""
    folder = tiny_model(variant).folder
    spec, config = read_model_spec(folder), model_config(str(folder))
    shapes = expected_shapes(config)
    router_biases = [math.prod(s) for name, s in shapes.items() if name.endswith("e_score_correction_bias")]
    assert sum(map(math.prod, shapes.values())) == spec.num_params
    assert sum(router_biases) == (8 if variant.startswith("deepseek_v3") else 0)
    assert config.kv_bytes_per_token(torch.bfloat16) == spec.kv_bytes_per_token(2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; accepted are llama, qwen2, qwen3, mixtral, qwen3_moe, deepseek_v2, "
            "deepseek_v3, mimo",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'longrope' is not supported; accepted are default, linear, llama3, yarn",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization 'fp8' is not supported; accepted are plain weights",
        ),
        ({"model_type": "mixtral"}, "num_local_experts is missing"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
            "num_experts_per_tok is 5 with topk_group 1 of 1; at most 4 experts can be chosen from",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
            "sliding_window 64 is not supported; accepted is null",
        ),
        ({**DEEPSEEK, "scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; accepted is 'sigmoid'"),
        ({**DEEPSEEK, "moe_layer_freq": 2}, "moe_layer_freq 2 is not supported; accepted is 1"),
        (
            {**DEEPSEEK, "n_group": 3},
            "8 experts do not make n_group 3 groups; accepted is a divisor that leaves at least 2 in each",
        ),
        ({**DEEPSEEK, "qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; rotary pairs need an even number"),
        ({**DEEPSEEK, "kv_lora_rank": 0}, "kv_lora_rank is 0, at least 1 is accepted"),
        (
            {**DEEPSEEK, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
            "mscale and mscale_all_dim differ: a gain of 1.06; accepted is 1",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; accepted is 'silu'"),
        ({"mlp_bias": True}, "mlp_bias true is not supported; accepted is false"),
        ({"num_key_value_heads": 4}, "6 heads do not divide among 4 KV heads; accepted is a whole multiple"),
        ({"vocab_size": 0}, "vocab_size is 0, at least 1 is accepted"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor is missing"),
    ],
)
def test_a_config_we_cannot_run(folder: Path, device: Device, changes: dict[str, Any], expected: str) -> None:
    edit_config(folder, **changes)
    assert refusal(folder, device) == f"FOLDER/config.json: {expected}"


def test_a_config_without_a_key(folder: Path, device: Device) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw["hidden_size"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert refusal(folder, device) == "FOLDER/config.json: hidden_size is missing"


def test_a_config_that_is_not_json(folder: Path, device: Device) -> None:
    (folder / "config.json").write_text("{")
    assert refusal(folder, device).startswith("FOLDER/config.json: not readable as JSON: ")


def test_shards_are_one_checkpoint(folder: Path, device: Device) -> None:
    """Two files and an index give the logits of one file."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: weights[n] for n in names if files[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    model = load_model(str(folder), device=device)
    pool = KvPool(model.config, num_blocks=1, block_size=8, dtype=torch.float32, device=device)
    logits = Runner(model.model, pool, device).run([SequenceChunk([4, 5, 6], 0, [0], True)])
    torch.testing.assert_close(
        logits, reference_logits(tiny_model("llama").reference, [4, 5, 6])[-1:], rtol=0, atol=1e-4
    )
    (folder / "model-1.safetensors").unlink()
    assert refusal(folder, device).endswith("names 'model-1.safetensors', which is not in the folder")


def test_an_unreadable_index(folder: Path, device: Device) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    assert refusal(folder, device).startswith("FOLDER/model.safetensors.index.json: not a readable index: ")


@pytest.mark.parametrize("name", ["llama-9000b", "/nowhere/at/all", "pyproject.toml"])
def test_an_unknown_name(name: str, device: Device) -> None:
    with pytest.raises(
        ModelError, match=r"accepted are 'smollm2-135m', a folder with config\.json and safetensors, or"
    ):
        load_model(name, device=device)


def test_a_folder_that_is_no_model(tmp_path: Path, device: Device) -> None:
    assert refusal(tmp_path, device).startswith("FOLDER: no config.json; accepted are ")


def test_eos_comes_from_the_generation_config_first(folder: Path, device: Device) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load_model(str(folder), device=device).eos_token_ids == (2, 7)
    (folder / "generation_config.json").unlink()
    assert load_model(str(folder), device=device).eos_token_ids == (2,)


def test_the_checksum_tells_weights_apart(folder: Path, device: Device) -> None:
    before = load_model(str(folder), device=device).checksum
    assert before == load_model(str(folder), device=device).checksum
    edit_weights(folder, lambda weights: weights["model.norm.weight"].add_(1))
    assert before != load_model(str(folder), device=device).checksum
