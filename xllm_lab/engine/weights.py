"""A checkpoint's tensors by name, checked before a model is built from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from xllm_lab.engine.layer_config import Latent, Mixture, expert_names
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.errors import ModelError

# Names some exporters write although nothing reads them: the first is a table we compute, the second is the
# embedding again when embeddings are tied.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
_HEAD = "lm_head.weight"
# A router's bias decides between scores that differ by less than 16-bit types resolve.
_FLOAT32_SUFFIX = "e_score_correction_bias"

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
                own_dtype = torch.float32 if name.endswith(_FLOAT32_SUFFIX) else dtype
                weights[name] = tensor.to(own_dtype, copy=tensor.dim() == 1)
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
    hidden = config.hidden_size
    embedding = (config.vocab_size, hidden)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": embedding, "model.norm.weight": (hidden,)}
    if not config.tie_embeddings:
        shapes[_HEAD] = embedding
    for i in range(config.num_layers):
        is_sparse = config.mixture is not None and i in config.mixture.layers
        shapes |= {f"model.layers.{i}.{n}": s for n, s in layer_shapes(config, is_sparse=is_sparse).items()}
    return shapes


def layer_shapes(config: ModelConfig, *, is_sparse: bool) -> dict[str, Shape]:
    """A layer's tensors by their names in it; `is_sparse` if it has experts."""
    hidden = config.hidden_size
    norms = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    attention = _heads_shapes(config) if config.latent is None else _latent_shapes(config, config.latent)
    if is_sparse and config.mixture is not None:
        return {**norms, **attention, **_mixture_shapes(config, config.mixture)}
    return {**norms, **attention, **_gated_shapes("mlp.", hidden, config.intermediate_size)}


def _heads_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, H = config.hidden_size, config.head_dim
    shapes: dict[str, Shape] = {}
    for part, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
        shapes[f"self_attn.{part}_proj.weight"] = (heads * H, hidden)
        if config.qkv_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (heads * H,)
    shapes["self_attn.o_proj.weight"] = (hidden, config.num_heads * H)
    if config.out_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (H,)
    return shapes


def _latent_shapes(config: ModelConfig, latent: Latent) -> dict[str, Shape]:
    hidden, N, Q = config.hidden_size, config.num_heads, latent.query_rank
    queries = N * (latent.nope_dim + latent.rope_dim)
    shapes: dict[str, Shape] = {}
    if Q:
        shapes["self_attn.q_a_proj.weight"], shapes["self_attn.q_a_layernorm.weight"] = (Q, hidden), (Q,)
        shapes["self_attn.q_b_proj.weight"] = (queries, Q)
    else:
        shapes["self_attn.q_proj.weight"] = (queries, hidden)
    shapes["self_attn.kv_a_proj_with_mqa.weight"] = (latent.width, hidden)
    shapes["self_attn.kv_a_layernorm.weight"] = (latent.rank,)
    shapes["self_attn.kv_b_proj.weight"] = (N * (latent.nope_dim + latent.value_dim), latent.rank)
    shapes["self_attn.o_proj.weight"] = (hidden, N * latent.value_dim)
    if config.qkv_bias:
        shapes["self_attn.kv_a_proj_with_mqa.bias"] = (latent.width,)
        if Q:
            shapes["self_attn.q_a_proj.bias"] = (Q,)
    if config.out_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    return shapes


def _mixture_shapes(config: ModelConfig, mixture: Mixture) -> dict[str, Shape]:
    names, hidden, size = expert_names(config.architecture), config.hidden_size, mixture.intermediate_size
    num_experts = mixture.routing.num_experts
    shapes: dict[str, Shape] = {f"{names.block}.gate.weight": (num_experts, hidden)}
    if mixture.has_bias:
        shapes[f"{names.block}.gate.e_score_correction_bias"] = (num_experts,)
    for expert in range(num_experts):
        prefix = f"{names.block}.experts.{expert}."
        shapes[f"{prefix}{names.gate}.weight"] = shapes[f"{prefix}{names.up}.weight"] = (size, hidden)
        shapes[f"{prefix}{names.down}.weight"] = (hidden, size)
    if mixture.shared_size:
        shapes |= _gated_shapes(f"{names.block}.shared_experts.", hidden, mixture.shared_size)
    return shapes


def _gated_shapes(prefix: str, hidden: int, inner: int) -> dict[str, Shape]:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


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
