"""A checkpoint's tensors by name, checked before a model is built from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.errors import ModelError

# Names some exporters write although nothing reads them: the first is a table we compute, the second is the
# embedding again when embeddings are tied.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
_HEAD = "lm_head.weight"

Shape = tuple[int, ...]


def read_safetensors(folder: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of a folder with `model.safetensors` or `model.safetensors.index.json`, cast to `dtype`.

    Raises:
        ModelError: a file is missing or corrupt, or a tensor is missing, unexpected or of the wrong shape.
    """
    return checked(read_all_safetensors(folder, dtype), config, source=str(folder))


def read_all_safetensors(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whatever tensors the weight files of a folder have, cast to `dtype`.

    Raises:
        ModelError: a file is missing or corrupt.
    """
    weights: dict[str, Tensor] = {}
    for path in safetensors_files(folder):
        weights |= read_safetensors_file(path, dtype)
    return weights


def read_safetensors_file(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one file, cast to `dtype`; matrices of that dtype are views of the mapped file.

    Raises:
        ModelError: the file is missing or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    weights: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensor = opened.get_tensor(name)
                # A model packs its matrices and keeps its vectors: a view would keep the whole file mapped for them.
                weights[name] = tensor.to(dtype, copy=tensor.dim() == 1)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {_one_line(error)}") from error
    return weights


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a folder, by its index if it has one, in order of name.

    Raises:
        ModelError: there are none, or the index is unreadable or names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise ModelError(f"{folder}: no weights; accepted are model.safetensors or {index.name}")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a readable index: {_one_line(error)}") from error
    for name in names:
        if not (folder / name).exists():
            raise ModelError(f"{index}: names {name!r}, which is not in the folder")
    return [folder / name for name in names]


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor a checkpoint of this model has, by its transformers name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embedding = (config.vocab_size, hidden)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": embedding, "model.norm.weight": (hidden,)}
    if not config.tie_embeddings:
        shapes[_HEAD] = embedding
    for i in range(config.num_layers):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{attention}{part}_proj.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{attention}{part}_proj.bias"] = (rows,)
        shapes[attention + "o_proj.weight"] = (hidden, q_rows)
        if config.out_bias:
            shapes[attention + "o_proj.bias"] = (hidden,)
        if config.qk_norm:
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (config.head_dim,)
        shapes[layer + "mlp.gate_proj.weight"] = shapes[layer + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, inner)
    return shapes


def checked(weights: Mapping[str, Tensor], config: ModelConfig, *, source: str) -> dict[str, Tensor]:
    """The expected tensors, in the model's order; what is known to be superfluous is dropped.

    Raises:
        ModelError: naming `source` and the first tensors that are missing, unexpected or of the wrong shape.
    """
    if len(weights) < config.num_layers:  # before a list of names as long as a corrupt header says
        raise ModelError(f"{source}: {len(weights)} tensors are too few for {config.num_layers} layers")
    shapes = expected_shapes(config)
    superfluous = {_HEAD} if config.tie_embeddings else set()
    refuse_tensors(source, "is missing", [name for name in shapes if name not in weights])
    refuse_tensors(
        source,
        "is not part of this model",
        [n for n in weights if n not in shapes and n not in superfluous and not n.endswith(_IGNORED_SUFFIXES)],
    )
    return of_shapes(weights, shapes, source=source)


def of_shapes(weights: Mapping[str, Tensor], shapes: Mapping[str, Shape], *, source: str) -> dict[str, Tensor]:
    """The tensors of `shapes`, in that order.

    Raises:
        ModelError: naming `source` and the first that are missing, or one of another shape.
    """
    refuse_tensors(source, "is missing", [name for name in shapes if name not in weights])
    for name, shape in shapes.items():
        given = tuple(weights[name].shape)
        if given != shape:
            raise ModelError(f"{source}: tensor {name} has shape {list(given)}, {list(shape)} is accepted")
    return {name: weights[name] for name in shapes}


def refuse_tensors(source: str, what: str, names: Sequence[str]) -> None:
    """ModelError that names the first of them, if there are any."""
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ModelError(f"{source}: tensor {names[0]} {what}{more}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
