"""What a model is made of, read from a transformers `config.json` or from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xllm_lab.engine.layer_config import (
    SPARSE,
    Latent,
    Mixture,
    latent_score_scale,
    read_latent,
    read_mixture,
    yarn_gain,
)
from xllm_lab.errors import ModelError

DENSE = ("llama", "qwen2", "qwen3")
ARCHITECTURES = (*DENSE, *SPARSE)
# What XiaomiMiMo's model type adds to Qwen2 are prediction modules, which tensors of their own show.
_SAME_AS = {"mimo": "qwen2"}
_QK_NORMED = ("qwen3", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# What arithmetic on values of a wrong type or a zero raises. ModelError is a ValueError, which is why that is not here.
_MALFORMED = (TypeError, AttributeError, ZeroDivisionError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family: RMS norm, rotary positions, grouped-query or latent attention, SwiGLU or experts.

    Attributes:
        architecture: one of `ARCHITECTURES`.
        intermediate_size: of the MLP of layers that have one.
        num_kv_heads, head_dim: of KV; latent attention is attention with one KV head whose values are its keys.
        max_position: context length in tokens.
        rope_theta: pair i of a head turns by `position * rope_theta ** (-2 i / rope_dim)` radians,
        rope_divisors: divided by `rope_divisors[i]`; empty divides by 1. Every accepted rope type is such a list.
        qkv_bias: q, k and v projections have a bias.
        out_bias: so has the output projection of the attention.
        qk_norm: q and k are normalised per head before they are rotated.
        tie_embeddings: the output head is the embedding.
        score_scale: of the attention's scores; None: head_dim ** -0.5.
        mixture: the experts, if there are some.
        latent: what heads are expanded from, if KV holds that instead of heads.
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
    score_scale: float | None = None
    mixture: Mixture | None = None
    latent: Latent | None = None

    @property
    def kv_sides(self) -> int:
        """Keys and values, or one row a token that is both."""
        return 2 if self.latent is None else 1

    @property
    def rope_dim(self) -> int:
        """Width of what is rotated."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in all layers."""
        return self.kv_sides * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


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
        num_heads, hidden_size, num_layers = raw["num_attention_heads"], raw["hidden_size"], raw["num_hidden_layers"]
        latent = read_latent(raw, architecture, source)
        kv_heads = 1 if latent else raw.get("num_key_value_heads") or num_heads
        head_dim = latent.width if latent else raw.get("head_dim") or hidden_size // num_heads
        rope_dim = latent.rope_dim if latent else head_dim
        rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}
        theta = float(rope.get("rope_theta") or (1_000_000.0 if architecture == "mixtral" else 10_000.0))
        bias = bool(raw.get("attention_bias", False))
        divisors = _rope_divisors(rope, theta, rope_dim, raw["max_position_embeddings"], source)
        return _checked(
            source,
            ModelConfig(
                architecture=architecture,
                vocab_size=raw["vocab_size"],
                hidden_size=hidden_size,
                intermediate_size=raw["intermediate_size"],
                num_layers=num_layers,
                num_heads=num_heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                max_position=raw["max_position_embeddings"],
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=theta,
                rope_divisors=divisors,
                qkv_bias=(bias and architecture != "mixtral") or architecture == "qwen2",
                out_bias=bias and architecture not in ("qwen2", "mixtral"),
                qk_norm=architecture in _QK_NORMED,
                tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
                score_scale=_score_scale(rope, latent, head_dim, source),
                mixture=read_mixture(raw, architecture, num_layers, source),
                latent=latent,
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
    if architecture not in DENSE:
        raise ModelError(
            f"{source}: general.architecture {architecture!r} is not supported; accepted are {_list(DENSE)}"
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
    if raw.get("model_type") == "mixtral" and raw.get("sliding_window") is not None:
        raise ModelError(f"{source}: sliding_window {raw['sliding_window']} is not supported; accepted is null")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelError(f"{source}: quantization {method!r} is not supported; accepted are plain weights")


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
    if config.rope_dim % 2:
        name = "head_dim" if config.latent is None else "qk_rope_head_dim"
        raise ModelError(f"{source}: {name} is {config.rope_dim}; rotary pairs need an even number")
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
    if kind == "yarn":
        return _yarn_divisors(rope, factor, theta, head_dim, float(original))
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


def _yarn_divisors(
    rope: Mapping[str, Any], factor: float, theta: float, dim: int, original: float
) -> tuple[float, ...]:
    """YaRN's stretching, by pairs: the first, which turn often, stay, the last stretch, those between interpolate.

    Source: Peng et al., arXiv 2309.00071, section 3.2, and its reference code for the range of pairs. `original` in
    tokens.
    """

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(rope.get("beta_fast") or 32), pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    stretched = [min(1.0, max(0.0, (i - low) / width)) for i in range(dim // 2)]
    return tuple(1.0 / (s / factor + (1.0 - s)) for s in stretched)


def _score_scale(rope: Mapping[str, Any], latent: Latent | None, head_dim: int, source: str) -> float | None:
    """YaRN's gain on rotated queries and keys, as one on the scores of heads that rotate whole."""
    kind, gain = rope.get("rope_type") or rope.get("type") or "default", 1.0
    if kind == "yarn":
        factor, dims, all_dims = float(rope["factor"]), rope.get("mscale"), rope.get("mscale_all_dim")
        told = rope.get("attention_factor")
        gain = yarn_gain(factor, dims) / yarn_gain(factor, all_dims) if dims and all_dims else yarn_gain(factor)
        gain = float(told) if told is not None else gain
    if latent is None:
        return None if gain == 1.0 else head_dim**-0.5 * gain**2
    if gain != 1.0:
        raise ModelError(f"{source}: mscale and mscale_all_dim differ: a gain of {gain:.3g}; accepted is 1")
    return latent_score_scale(latent, rope if kind != "default" else {})


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
