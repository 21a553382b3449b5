"""Tiny checkpoints with a prediction module, of every way to write one."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.drafts.naive import NAMES
from tests.tiny_models import write_tiny_model
from xllm_lab.engine.model_config import ModelConfig, from_transformers
from xllm_lab.engine.weights import expected_shapes

_SAVED = tempfile.TemporaryDirectory(prefix="xllm_lab_mtp_")  # removed when the interpreter ends
# style -> the model around it
_MODELS: dict[str, dict[str, Any]] = {
    "mimo": {"model_type": "mimo", "num_nextn_predict_layers": 1},
    "deepseek": {"model_type": "llama", "num_nextn_predict_layers": 1, "tie_word_embeddings": True},
    "qwen": {"model_type": "qwen3", "head_dim": 16},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
    },
}


class MtpCheckpoint(NamedTuple):
    """Attributes: `weights` as they are in the file."""

    folder: Path
    config: ModelConfig
    weights: dict[str, Tensor]


@functools.cache
def mtp_checkpoint(style: str) -> MtpCheckpoint:
    return write_mtp_checkpoint(Path(_SAVED.name, style), style)


def write_mtp_checkpoint(folder: Path, style: str, **extra: Tensor) -> MtpCheckpoint:
    """A tiny model with a module of random weights, and `extra` tensors."""
    write_tiny_model(folder, **_MODELS[style])
    config = from_transformers(json.loads((folder / "config.json").read_text()), source="the tiny model")
    weights = {**load_file(folder / "model.safetensors"), **_module(config, style), **extra}
    save_file(weights, folder / "model.safetensors")
    return MtpCheckpoint(folder, config, weights)


def _module(config: ModelConfig, style: str) -> dict[str, Tensor]:
    names, D, last = NAMES[style], config.hidden_size, f"model.layers.{config.num_layers - 1}."
    shapes: dict[str, tuple[int, ...]] = {
        names.prefix + names.layer + name.removeprefix(last): shape
        for name, shape in expected_shapes(config).items()
        if name.startswith(last)
    }
    shapes[f"{names.prefix}{names.projection}.weight"] = (D, 2 * D)
    for norm in (names.token_norm, names.hidden_norm, names.norm):
        shapes[f"{names.prefix}{norm}.weight"] = (D,)
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.randn(shape, generator=generator) * (1.0 if len(shape) == 1 else 0.3)
        for name, shape in shapes.items()
    }
