"""What a model computes and reads per token, from its transformers `config.json` alone; no weights, no torch.

A forward pass is the weight matrices of `matmuls`, the experts of `experts`, and one attention a layer. Norms,
rotations and gates have next to no arithmetic; they count as parameters and as kernels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from xllm_lab.errors import ModelError


@dataclass(frozen=True, slots=True)
class Precision:
    """How numbers are stored and multiplied.

    Attributes:
        weight_bytes: of a number of a quantised matrix; the others take 2.
        matrix_dtype: format in which quantised matrices are multiplied; the others in bf16.
        kv_bytes: of a number in KV.
    """

    weight_bytes: float = 2.0
    matrix_dtype: str = "bf16"
    kv_bytes: float = 2.0

    @property
    def activation_bytes(self) -> float:
        """Of a number that enters a quantised matrix."""
        return 1.0 if self.matrix_dtype in ("int8", "fp8") else 2.0


# As engines name them: weights, then activations.
PRECISIONS = {
    "bf16": Precision(),
    "w8a8": Precision(weight_bytes=1.0, matrix_dtype="int8"),
    "w4a8": Precision(weight_bytes=0.5, matrix_dtype="int8"),
    "w4a16": Precision(weight_bytes=0.5),
    "fp8": Precision(weight_bytes=1.0, matrix_dtype="fp8"),
}


@dataclass(frozen=True, slots=True)
class Matmul:
    """A weight matrix of shape [inputs, outputs], once in each of `count` layers.

    Attributes:
        shard: what tensor parallelism divides: the heads' or channels' side of the matrix, the key-value heads (never
            below one), or nothing, so that each device has all of it.
        is_quantized: whether a quantised checkpoint stores it in few bits; embeddings, routers and heads stay as is.
    """

    name: str
    inputs: int
    outputs: int
    count: int
    shard: Literal["channels", "kv_heads", "none"]
    is_quantized: bool = True

    @property
    def num_params(self) -> int:
        return self.inputs * self.outputs * self.count


class GroupedAttention(NamedTuple):
    """Multi-head attention whose query heads share key-value heads in groups (GQA)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def kv_width(self) -> int:
        """Numbers kept in KV per token and layer."""
        return 2 * self.num_kv_heads * self.head_dim

    def prefill_flops(self, num_heads: int) -> int:
        """Per query and visible key: scores, and the weighted values."""
        return 4 * num_heads * self.head_dim

    def decode_flops(self, num_heads: int) -> int:
        """The same: nothing is absorbed."""
        return self.prefill_flops(num_heads)


class LatentAttention(NamedTuple):
    """Multi-head latent attention (MLA): KV holds one compressed vector and one rotated key for all heads.

    DeepSeek-V2 technical report, arXiv 2405.04434, section 2.1. Prefill expands the latents to heads; decode absorbs
    the expansion into queries and outputs, and computes on the latents.
    """

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def kv_width(self) -> int:
        """Numbers kept in KV per token and layer; every device of a tensor-parallel group keeps them all."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def prefill_flops(self, num_heads: int) -> int:
        """Per query and visible key, on expanded heads."""
        return 2 * num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)

    def decode_flops(self, num_heads: int) -> int:
        """Per query and visible key, absorbed: scores over latent and rotated key, values are latents."""
        return 2 * num_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)

    def expansion_flops(self, num_heads: int) -> int:
        """Per cached token that a prefill chunk expands again."""
        return 2 * num_heads * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)


class Experts(NamedTuple):
    """Routed experts of a mixture: each token goes to `num_per_token` of `num_experts`, in `num_layers` layers."""

    num_experts: int
    num_per_token: int
    hidden_size: int
    intermediate_size: int
    num_layers: int

    @property
    def params_per_expert(self) -> int:
        """Gate, up and down projection of one expert in one layer."""
        return 3 * self.hidden_size * self.intermediate_size

    def num_activated(self, num_tokens: float) -> float:
        """Expected experts that get any of `num_tokens` when routing is uniform: E (1 - (1 - k/E)^T)."""
        idle_frac = 1.0 - self.num_per_token / self.num_experts
        return float(self.num_experts * (1.0 - idle_frac**num_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model.

    Attributes:
        matmuls: every weight matrix but the embedding and the routed experts; the last is the head.
        vector_params: norms and biases.
        num_dense_layers: layers without routed experts.
        is_qk_normed: queries and keys are normalised per head.
        is_tied: the head is the embedding.
        max_position: context in tokens.
    """

    name: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    attention: GroupedAttention | LatentAttention
    experts: Experts | None
    matmuls: tuple[Matmul, ...]
    vector_params: int
    num_dense_layers: int
    is_qk_normed: bool
    is_tied: bool
    max_position: int

    @property
    def is_mixture(self) -> bool:
        """Whether it has routed experts."""
        return self.experts is not None

    @property
    def embedding_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def _resident_params(self) -> int:
        tied = self.embedding_params if self.is_tied else 0
        return sum(m.num_params for m in self.matmuls) + self.vector_params + self.embedding_params - tied

    @property
    def num_params(self) -> int:
        """All parameters."""
        e = self.experts
        return self._resident_params + (e.params_per_expert * e.num_experts * e.num_layers if e else 0)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets, embedding and head included."""
        e = self.experts
        return self._resident_params + (e.params_per_expert * e.num_per_token * e.num_layers if e else 0)

    def weight_bytes(self, precision: Precision = PRECISIONS["bf16"]) -> float:
        """All weights, as stored."""
        quantized = sum(m.num_params for m in self.matmuls if m.is_quantized)
        e = self.experts
        quantized += e.params_per_expert * e.num_experts * e.num_layers if e else 0
        return quantized * precision.weight_bytes + (self.num_params - quantized) * 2.0

    def kv_bytes_per_token(self, kv_bytes: float = 2) -> float:
        """KV of one token in all layers, at `kv_bytes` a number; before any division over devices."""
        return self.num_layers * self.attention.kv_width * kv_bytes

    def flops_per_token(self, context_tokens: int = 0) -> float:
        """Arithmetic of one decoded token after `context_tokens`: two a parameter it meets, and attention."""
        matmuls = 2 * sum(m.num_params for m in self.matmuls)
        e = self.experts
        routed = 2 * e.params_per_expert * e.num_per_token * e.num_layers if e else 0
        attention = self.attention.decode_flops(self.attention.num_heads) * self.num_layers * (context_tokens + 1)
        return float(matmuls + routed + attention)


def read_model_spec(path: str | Path) -> ModelSpec:
    """The spec of a `config.json`, or of the folder that holds one.

    Raises:
        ModelError: no such file, no JSON object in it, or as `model_spec`.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file}: no transformers config.json can be read there ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: holds a JSON {type(config).__name__}; a transformers config, an object, is accepted")
    return model_spec(config, source=str(file))


def model_spec(config: Mapping[str, Any], *, source: str) -> ModelSpec:
    """The spec of a parsed `config.json`; `source` names it in errors.

    Raises:
        ModelError: a model type we do not know, a missing or impossible field, or sliding-window attention.
    """
    c = _Config(config, source)
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise ModelError(f"{source}: model_type {kind!r} is not known; accepted are {', '.join(sorted(_KINDS))}")
    _refuse_windows(c)
    traits = _KINDS[kind]
    attention, matmuls, vectors = (_latent if traits.is_latent else _grouped)(c, traits)
    hidden, num_layers = c.count("hidden_size"), c.count("num_hidden_layers")
    experts, num_dense, mlp, mlp_vectors = _feed_forward(c, traits)
    head = Matmul("head", hidden, c.count("vocab_size"), 1, "channels", is_quantized=False)
    return ModelSpec(
        name=str(config.get("_name_or_path") or source),
        hidden_size=hidden,
        vocab_size=c.count("vocab_size"),
        num_layers=num_layers,
        attention=attention,
        experts=experts,
        matmuls=(*matmuls, *mlp, head),
        vector_params=num_layers * (vectors + 2 * hidden) + mlp_vectors + hidden,
        num_dense_layers=num_dense,
        is_qk_normed=traits.is_qk_normed or bool(config.get("use_qk_norm")),
        is_tied=bool(config.get("tie_word_embeddings", traits.is_tied)),
        max_position=c.count("max_position_embeddings"),
    )


class _Traits(NamedTuple):
    """What a model type implies that its config does not say."""

    is_latent: bool = False
    qkv_bias: bool | None = None  # None: as `attention_bias` says
    is_qk_normed: bool = False
    num_experts_key: str = ""
    expert_size_key: str = "moe_intermediate_size"
    has_router_bias: bool = False
    is_tied: bool = False


_KINDS = {
    "llama": _Traits(),
    "mistral": _Traits(qkv_bias=False),
    "qwen2": _Traits(qkv_bias=True),
    "qwen3": _Traits(is_qk_normed=True),
    "qwen2_moe": _Traits(qkv_bias=True, num_experts_key="num_experts"),
    "qwen3_moe": _Traits(is_qk_normed=True, num_experts_key="num_experts"),
    "mixtral": _Traits(qkv_bias=False, num_experts_key="num_local_experts", expert_size_key="intermediate_size"),
    "minimax_m2": _Traits(
        qkv_bias=False,
        is_qk_normed=True,
        num_experts_key="num_local_experts",
        expert_size_key="intermediate_size",
        has_router_bias=True,
    ),
    "deepseek_v2": _Traits(is_latent=True, num_experts_key="n_routed_experts"),
    "deepseek_v3": _Traits(is_latent=True, num_experts_key="n_routed_experts", has_router_bias=True),
    "kimi_k2": _Traits(is_latent=True, num_experts_key="n_routed_experts", has_router_bias=True),
}


class _Config:
    """Fields of a config, checked as they are read."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.source}: {key} is missing; a whole number of at least {least} is accepted")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ModelError(f"{self.source}: {key} is {value!r}; a whole number of at least {least} is accepted")
        return value


def _refuse_windows(c: _Config) -> None:
    window = c.raw.get("sliding_window")
    if window is None or c.raw.get("use_sliding_window") is False:
        return
    if window < c.count("max_position_embeddings"):
        raise ModelError(
            f"{c.source}: sliding_window is {window}; attention over the whole context is accepted, null or at least "
            f"max_position_embeddings"
        )


_Attended = tuple[GroupedAttention | LatentAttention, tuple[Matmul, ...], int]


def _grouped(c: _Config, traits: _Traits) -> _Attended:
    hidden, layers, heads = c.count("hidden_size"), c.count("num_hidden_layers"), c.count("num_attention_heads")
    kv_heads = c.count("num_key_value_heads", heads)
    if c.raw.get("head_dim") is None and hidden % heads:
        raise ModelError(f"{c.source}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    dim = c.count("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelError(
            f"{c.source}: num_key_value_heads is {kv_heads}; a divisor of num_attention_heads {heads} is accepted"
        )
    matmuls = (
        Matmul("q_proj", hidden, heads * dim, layers, "channels"),
        Matmul("kv_proj", hidden, 2 * kv_heads * dim, layers, "kv_heads"),
        Matmul("o_proj", heads * dim, hidden, layers, "channels"),
    )
    bias = bool(c.raw.get("attention_bias")) if traits.qkv_bias is None else traits.qkv_bias
    vectors = (heads + 2 * kv_heads) * dim if bias else 0
    if bias and traits.qkv_bias is None and c.raw["model_type"] in ("llama", "qwen3", "qwen3_moe"):
        vectors += hidden  # these put one on the output projection too
    if traits.is_qk_normed:
        # MiniMax-M2 norms all heads together, Qwen3 each with the same weights.
        vectors += (heads + kv_heads) * dim if c.raw["model_type"] == "minimax_m2" else 2 * dim
    return GroupedAttention(heads, kv_heads, dim), matmuls, vectors


def _latent(c: _Config, traits: _Traits) -> _Attended:
    hidden, layers = c.count("hidden_size"), c.count("num_hidden_layers")
    a = LatentAttention(
        num_heads=c.count("num_attention_heads"),
        q_lora_rank=c.count("q_lora_rank", 0, least=0),
        kv_lora_rank=c.count("kv_lora_rank"),
        qk_nope_head_dim=c.count("qk_nope_head_dim"),
        qk_rope_head_dim=c.count("qk_rope_head_dim"),
        v_head_dim=c.count("v_head_dim"),
    )
    queries = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    values = a.num_heads * a.v_head_dim
    if a.q_lora_rank:
        down = (Matmul("q_a_proj", hidden, a.q_lora_rank, layers, "none"),)
        query: tuple[Matmul, ...] = (*down, Matmul("q_b_proj", a.q_lora_rank, queries, layers, "channels"))
    else:
        query = (Matmul("q_proj", hidden, queries, layers, "channels"),)
    matmuls = (
        *query,
        Matmul("kv_a_proj", hidden, a.kv_width, layers, "none"),
        # Absorbed into two matrices a layer for decodes; the same numbers and the same arithmetic per token.
        Matmul("kv_b_proj", a.kv_lora_rank, a.num_heads * a.qk_nope_head_dim + values, layers, "channels", False),
        Matmul("o_proj", values, hidden, layers, "channels"),
    )
    vectors = a.q_lora_rank + a.kv_lora_rank
    if c.raw.get("attention_bias"):
        vectors += (a.q_lora_rank + a.kv_width if a.q_lora_rank else a.kv_width) + hidden
    return a, matmuls, vectors


_FedForward = tuple[Experts | None, int, tuple[Matmul, ...], int]


def _feed_forward(c: _Config, traits: _Traits) -> _FedForward:
    """Routed experts, number of dense layers, weight matrices of dense layers and shared experts, biases."""
    hidden, layers = c.count("hidden_size"), c.count("num_hidden_layers")
    if not traits.num_experts_key:
        size = c.count("intermediate_size")
        bias = layers * (2 * size + hidden) if c.raw.get("mlp_bias") else 0
        return None, layers, _gated("", hidden, size, layers), bias
    dense = _num_dense_layers(c, layers)
    sparse = layers - dense
    # transformers 5 writes the number under one name for all models.
    num_experts_key = traits.num_experts_key if traits.num_experts_key in c.raw else "num_local_experts"
    num_experts_key = num_experts_key if num_experts_key in c.raw else traits.num_experts_key
    experts = Experts(
        c.count(num_experts_key),
        c.count("num_experts_per_tok"),
        hidden,
        c.count(traits.expert_size_key),
        sparse,
    )
    if experts.num_per_token > experts.num_experts:
        raise ModelError(
            f"{c.source}: num_experts_per_tok is {experts.num_per_token}; at most the {experts.num_experts} experts "
            f"of {num_experts_key} are accepted"
        )
    matmuls = [Matmul("router", hidden, experts.num_experts, sparse, "none", False)]
    if dense:
        matmuls += _gated("", hidden, c.count("intermediate_size"), dense)
    if shared := _shared_size(c, experts):
        matmuls += _gated("shared_", hidden, shared, sparse)
        if c.raw["model_type"] == "qwen2_moe":
            matmuls.append(Matmul("shared_gate", hidden, 1, sparse, "none", False))
    return experts, dense, tuple(matmuls), sparse * experts.num_experts if traits.has_router_bias else 0


def _gated(prefix: str, hidden: int, size: int, count: int) -> tuple[Matmul, ...]:
    return (
        Matmul(f"{prefix}gate_up_proj", hidden, 2 * size, count, "channels"),
        Matmul(f"{prefix}down_proj", size, hidden, count, "channels"),
    )


def _num_dense_layers(c: _Config, layers: int) -> int:
    """Layers with an ordinary feed-forward: DeepSeek's first few, or Qwen's `mlp_only_layers` and sparse step."""
    if c.raw.get("first_k_dense_replace") is not None:
        return min(layers, c.count("first_k_dense_replace", least=0))
    only, step = c.raw.get("mlp_only_layers") or [], c.count("decoder_sparse_step", 1)
    return sum(1 for layer in range(layers) if layer in only or (layer + 1) % step)


def _shared_size(c: _Config, experts: Experts) -> int:
    """Width of the experts that every token meets."""
    if c.raw.get("shared_expert_intermediate_size"):
        return c.count("shared_expert_intermediate_size")
    return c.count("n_shared_experts", 0, least=0) * experts.intermediate_size
