"""What a model is made of, read from a transformers `config.json` or from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xllm_lab.errors import ModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# What XiaomiMiMo's model type adds to Qwen2 are prediction modules, which tensors of their own show.
_SAME_AS = {"mimo": "qwen2"}
ROPE_TYPES = ("default", "linear", "llama3")

# What arithmetic on values of a wrong type or a zero raises. ModelError is a ValueError, which is why that is not here.
_MALFORMED = (TypeError, AttributeError, ZeroDivisionError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder of the Llama family: RMS norm, rotary positions, grouped-query attention, SwiGLU.

    Attributes:
        architecture: one of `ARCHITECTURES`.
        max_position: context length in tokens.
        rope_theta: pair i of a head turns by `position * rope_theta ** (-2 i / head_dim)` radians,
        rope_divisors: divided by `rope_divisors[i]`; empty divides by 1. Every accepted rope type is such a list.
        qkv_bias: q, k and v projections have a bias.
        out_bias: so has the output projection of the attention.
        qk_norm: q and k are normalised per head before they are rotated.
        tie_embeddings: the output head is the embedding.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_divisors: tuple[float, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


def from_transformers(raw: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Reads a parsed `config.json`. `source` names it in errors.

    Raises:
        ModelError: an architecture, rope type or option we do not run, or a missing key.
    """
    architecture = _SAME_AS.get(raw.get("model_type", ""), raw.get("model_type"))
    if architecture not in ARCHITECTURES:
        accepted = _list((*ARCHITECTURES, *_SAME_AS))
        raise ModelError(f"{source}: model_type {architecture!r} is not supported; accepted are {accepted}")
    _refuse_other_options(raw, source)
    try:
        num_heads, hidden_size = raw["num_attention_heads"], raw["hidden_size"]
        head_dim = raw.get("head_dim") or hidden_size // num_heads
        rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}
        theta = float(rope.get("rope_theta") or 10_000.0)
        bias = bool(raw.get("attention_bias", False))
        return _checked(
            source,
            ModelConfig(
                architecture=architecture,
                vocab_size=raw["vocab_size"],
                hidden_size=hidden_size,
                intermediate_size=raw["intermediate_size"],
                num_layers=raw["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=raw.get("num_key_value_heads") or num_heads,
                head_dim=head_dim,
                max_position=raw["max_position_embeddings"],
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=theta,
                rope_divisors=_rope_divisors(rope, theta, head_dim, raw["max_position_embeddings"], source),
                qkv_bias=bias or architecture == "qwen2",
                out_bias=bias and architecture != "qwen2",
                qk_norm=architecture == "qwen3",
                tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            ),
        )
    except KeyError as error:
        raise ModelError(f"{source}: {error.args[0]} is missing") from error
    except _MALFORMED as error:
        raise ModelError(f"{source}: {error}") from error


def from_gguf(metadata: Mapping[str, Any], tensor_names: frozenset[str], *, source: str) -> ModelConfig:
    """Reads llama.cpp's metadata keys. What has a tensor of its own (biases, head) is seen from the names.

    `rope_divisors` stay empty here where the file keeps them in a tensor; the weights' reader fills them in.

    Raises:
        ModelError: an architecture or rope type we do not run, or a missing key.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{source}: general.architecture {architecture!r} is not supported; accepted are {_list(ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    rope = {"rope_type": metadata.get(prefix + "rope.scaling.type", "default")}
    rope["rope_type"] = {"none": "default"}.get(rope["rope_type"], rope["rope_type"])
    if prefix + "rope.scaling.factor" in metadata:
        rope["factor"] = metadata[prefix + "rope.scaling.factor"]
    try:
        num_heads, hidden_size = metadata[prefix + "attention.head_count"], metadata[prefix + "embedding_length"]
        head_dim = metadata.get(prefix + "attention.key_length", hidden_size // num_heads)
        theta = float(metadata.get(prefix + "rope.freq_base", 10_000.0))
        max_position = metadata[prefix + "context_length"]
        return _checked(
            source,
            ModelConfig(
                architecture=architecture,
                vocab_size=metadata.get(prefix + "vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
                hidden_size=hidden_size,
                intermediate_size=metadata[prefix + "feed_forward_length"],
                num_layers=metadata[prefix + "block_count"],
                num_heads=num_heads,
                num_kv_heads=metadata.get(prefix + "attention.head_count_kv", num_heads),
                head_dim=head_dim,
                max_position=max_position,
                rms_norm_eps=metadata[prefix + "attention.layer_norm_rms_epsilon"],
                rope_theta=theta,
                rope_divisors=_rope_divisors(rope, theta, head_dim, max_position, source),
                qkv_bias="blk.0.attn_q.bias" in tensor_names,
                out_bias="blk.0.attn_output.bias" in tensor_names,
                qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
                tie_embeddings="output.weight" not in tensor_names,
            ),
        )
    except KeyError as error:
        raise ModelError(f"{source}: {error.args[0]} is missing") from error
    except _MALFORMED as error:
        raise ModelError(f"{source}: {error}") from error


def _refuse_other_options(raw: Mapping[str, Any], source: str) -> None:
    """Options of the accepted architectures that change the computation and that we do not have."""
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; accepted is 'silu'")
    if raw.get("mlp_bias", False):
        raise ModelError(f"{source}: mlp_bias true is not supported; accepted is false")
    if raw.get("use_sliding_window", False):
        raise ModelError(f"{source}: use_sliding_window true is not supported; accepted is false")


def _checked(source: str, config: ModelConfig) -> ModelConfig:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "max_position"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{source}: {name} is {value!r}, at least 1 is accepted")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{source}: {config.num_heads} heads do not divide among {config.num_kv_heads} KV heads; "
            "accepted is a whole multiple"
        )
    if config.head_dim % 2:
        raise ModelError(f"{source}: head_dim is {config.head_dim}; rotary pairs need an even number")
    return config


def _rope_divisors(
    rope: Mapping[str, Any], theta: float, head_dim: int, max_position: int, source: str
) -> tuple[float, ...]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        partial = "" if kind not in ROPE_TYPES else " with a partial_rotary_factor"
        raise ModelError(f"{source}: rope type {kind!r}{partial} is not supported; accepted are {_list(ROPE_TYPES)}")
    if kind == "default":
        return ()
    factor = float(rope["factor"])
    if kind == "linear":
        return (factor,) * (head_dim // 2)
    original = rope.get("original_max_position_embeddings") or max_position
    return tuple(
        _llama3_divisor(
            2 * math.pi * theta ** (2 * i / head_dim),
            factor=factor,
            low=float(rope["low_freq_factor"]),
            high=float(rope["high_freq_factor"]),
            original=float(original),
        )
        for i in range(head_dim // 2)
    )


def _llama3_divisor(wavelength: float, *, factor: float, low: float, high: float, original: float) -> float:
    """Llama 3.1's stretching: short waves stay, long ones stretch by `factor`, those between interpolate.

    With s = (original / wavelength - low) / (high - low), the frequency is multiplied by (1 - s) / factor + s for
    0 <= s <= 1. Wavelengths and `original` in tokens. Source: Llama 3.1's reference code, `apply_scaling`.
    """
    s = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
    return 1.0 / ((1.0 - s) / factor + s)


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
