"""What layers of other shapes than Llama's are made of, read from a transformers `config.json`.

mixture of experts           Mixtral, Qwen3-MoE, DeepSeek-V2 and V3
latent attention (MLA)       DeepSeek-V2 and V3
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from xllm_lab.engine.ops.experts import Routing
from xllm_lab.errors import ModelError

LATENT = ("deepseek_v2", "deepseek_v3")
# Where a config has the number of experts: transformers 5 writes Qwen3's under Mixtral's name.
_NUM_EXPERTS = {
    "mixtral": ("num_local_experts",),
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "deepseek_v2": ("n_routed_experts",),
    "deepseek_v3": ("n_routed_experts",),
}
SPARSE = tuple(_NUM_EXPERTS)


class ExpertNames(NamedTuple):
    """How checkpoints name a layer's experts: `{block}.gate`, `{block}.experts.3.{gate}` and so on."""

    block: str
    gate: str
    up: str
    down: str

    @property
    def router(self) -> str:
        """Its weight's name, which only layers with experts have."""
        return f"{self.block}.gate.weight"


_USUAL = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
_NAMES = {"mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2")}


def expert_names(architecture: str) -> ExpertNames:
    """Of checkpoints of that architecture."""
    return _NAMES.get(architecture, _USUAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Experts instead of one MLP, in some of the layers.

    Attributes:
        routing: how tokens find them.
        intermediate_size: of each.
        shared_size: of what every token meets besides; 0: nothing.
        layers: numbers of the layers that have them.
        has_bias: the router has a bias by which it chooses.
    """

    routing: Routing
    intermediate_size: int
    shared_size: int
    layers: frozenset[int]
    has_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Attention over one compressed vector and one rotated key a token, for all heads; see `ops.latent`.

    Attributes:
        query_rank: width that queries are compressed to; 0: they are not.
        rank: of the compressed vector.
        nope_dim, rope_dim: of a head's query and key, the part that is not rotated and the one that is.
        value_dim: of a head's value.
        is_interleaved: the checkpoint rotates neighbours instead of halves.
    """

    query_rank: int
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    is_interleaved: bool

    @property
    def width(self) -> int:
        """Numbers in KV a token and layer."""
        return self.rank + self.rope_dim


def read_mixture(raw: Mapping[str, Any], architecture: str, num_layers: int, source: str) -> Mixture | None:
    """The experts of a config; None if it has none.

    Raises:
        ModelError: an option that we do not have, or numbers that do not fit together.
        KeyError: a field is missing.
    """
    if architecture not in _NUM_EXPERTS:
        return None
    names = _NUM_EXPERTS[architecture]
    name = next((n for n in names if n in raw), names[0])
    is_mixtral, is_latent = architecture == "mixtral", architecture in LATENT
    layers = _first_dense(raw, num_layers, source) if is_latent else _stepped(raw, num_layers)
    mixture = Mixture(
        routing=_routing(raw, architecture, raw[name], source),
        intermediate_size=raw["intermediate_size" if is_mixtral else "moe_intermediate_size"],
        shared_size=(raw.get("n_shared_experts") or 0) * raw["moe_intermediate_size"] if is_latent else 0,
        layers=frozenset(layers),
        has_bias=architecture == "deepseek_v3",
    )
    _check(mixture, name, source)
    return mixture if mixture.layers else None


def _routing(raw: Mapping[str, Any], architecture: str, num_experts: int, source: str) -> Routing:
    top_k = raw["num_experts_per_tok"]
    if architecture == "mixtral":
        return Routing(num_experts, top_k, is_normalized=True)
    # Defaults are transformers'.
    if architecture == "qwen3_moe":
        return Routing(num_experts, top_k, is_normalized=bool(raw.get("norm_topk_prob", False)))
    is_v3 = architecture == "deepseek_v3"
    _refuse_other(raw, source, "scoring_func", "sigmoid" if is_v3 else "softmax")
    groups: dict[str, Any] = {"num_groups": raw.get("n_group") or 1, "top_groups": raw.get("topk_group") or 1}
    if is_v3:
        _refuse_other(raw, source, "topk_method", "noaux_tc")
        return Routing(
            num_experts,
            top_k,
            is_sigmoid=True,
            is_normalized=bool(raw.get("norm_topk_prob", True)),
            scale=float(raw.get("routed_scaling_factor", 2.5)),
            group_experts=2,
            **groups,
        )
    _refuse_other(raw, source, "norm_topk_prob", False)
    method = raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ModelError(
            f"{source}: topk_method {method!r} is not supported; accepted are 'greedy', 'group_limited_greedy'"
        )
    return Routing(
        num_experts,
        top_k,
        scale=float(raw.get("routed_scaling_factor", 1.0)),
        **(groups if method == "group_limited_greedy" else {}),
    )


def _refuse_other(raw: Mapping[str, Any], source: str, name: str, accepted: object) -> None:
    if raw.get(name, accepted) != accepted:
        given, told = (json.dumps(value).replace('"', "'") for value in (raw[name], accepted))
        raise ModelError(f"{source}: {name} {given} is not supported; accepted is {told}")


def _first_dense(raw: Mapping[str, Any], num_layers: int, source: str) -> range:
    _refuse_other(raw, source, "moe_layer_freq", 1)
    return range(raw.get("first_k_dense_replace") or 0, num_layers)


def _stepped(raw: Mapping[str, Any], num_layers: int) -> list[int]:
    """All of them, or as Qwen's options say."""
    dense, step = raw.get("mlp_only_layers") or (), raw.get("decoder_sparse_step", 1)
    return [i for i in range(num_layers) if i not in dense and (i + 1) % step == 0]


def _check(mixture: Mixture, name: str, source: str) -> None:
    r = mixture.routing
    for what, value in (
        (name, r.num_experts),
        ("num_experts_per_tok", r.top_k),
        ("moe_intermediate_size", mixture.intermediate_size),
        ("n_group", r.num_groups),
        ("topk_group", r.top_groups),
    ):
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{source}: {what} is {value!r}, at least 1 is accepted")
    if r.num_experts % r.num_groups or r.num_experts // r.num_groups < r.group_experts:
        raise ModelError(
            f"{source}: {r.num_experts} experts do not make n_group {r.num_groups} groups; accepted is a divisor that "
            f"leaves at least {r.group_experts} in each"
        )
    most = r.num_experts // r.num_groups * r.top_groups
    if r.top_groups > r.num_groups or r.top_k > most:
        raise ModelError(
            f"{source}: num_experts_per_tok is {r.top_k} with topk_group {r.top_groups} of {r.num_groups}; at most "
            f"{min(most, r.num_experts)} experts can be chosen from"
        )


def read_latent(raw: Mapping[str, Any], architecture: str, source: str) -> Latent | None:
    """The latent attention of a config; None if it has another.

    Raises:
        ModelError: a width is none.
        KeyError: a field is missing.
    """
    if architecture not in LATENT:
        return None
    latent = Latent(
        query_rank=raw.get("q_lora_rank") or 0,
        rank=raw["kv_lora_rank"],
        nope_dim=raw["qk_nope_head_dim"],
        rope_dim=raw["qk_rope_head_dim"],
        value_dim=raw["v_head_dim"],
        is_interleaved=bool(raw.get("rope_interleave", True)) or architecture == "deepseek_v2",
    )
    for what, value in (
        ("kv_lora_rank", latent.rank),
        ("qk_nope_head_dim", latent.nope_dim),
        ("qk_rope_head_dim", latent.rope_dim),
        ("v_head_dim", latent.value_dim),
    ):
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{source}: {what} is {value!r}, at least 1 is accepted")
    return latent


def latent_score_scale(latent: Latent, rope: Mapping[str, Any]) -> float:
    """What multiplies scores: (nope + rope)^-0.5, and with YaRN the square of a gain for long contexts.

    Source of the gain: DeepSeek-V2's and V3's own `modeling_deepseek.py` (`mscale_all_dim`).
    """
    all_dims, factor = float(rope.get("mscale_all_dim") or 0.0), float(rope.get("factor") or 1.0)
    gain = yarn_gain(factor, all_dims) if all_dims else 1.0
    return math.sqrt(1.0 / (latent.nope_dim + latent.rope_dim)) * gain**2


def yarn_gain(factor: float, mscale: float = 1.0) -> float:
    """0.1 m ln(s) + 1 for a context stretched by s > 1 (Peng et al., "YaRN", arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
