"""Target and prediction module from their formulas, over whole sequences: no cache, no packing, nothing of the engine.

Formulas: DeepSeek-V3 technical report, arXiv 2412.19437, equations 21 to 23; names and orders: vLLM's `mimo_mtp.py`,
`deepseek_mtp.py` and `qwen3_next_mtp.py`.
"""

# Shapes: T tokens, D hidden size, V vocabulary, N heads, H head dim

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.model_config import ModelConfig

Weights = Mapping[str, Tensor]


class Names(NamedTuple):
    """Of a module: prefix, the layer's prefix, and its four tensors."""

    prefix: str
    layer: str
    token_norm: str
    hidden_norm: str
    projection: str
    norm: str


NAMES = {
    "mimo": Names("model.mtp_layers.0.", "", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    "deepseek": Names("model.layers.2.", "", "enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "qwen": Names("mtp.", "layers.0.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
}
NAMES["deepseek_v3"] = NAMES["deepseek"]  # with latent attention and experts


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x_TNH: Tensor, theta: float) -> Tensor:
    T, _, H = x_TNH.shape
    angles = torch.arange(T)[:, None] / theta ** (torch.arange(0, H, 2) / H)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = x_TNH.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def layer(x_TD: Tensor, w: Weights, prefix: str, config: ModelConfig) -> Tensor:
    """A decoder layer."""
    eps = config.rms_norm_eps
    y_TD = rms_norm(x_TD, w[prefix + "input_layernorm.weight"], eps)
    attend = heads_mixed if config.latent is None else latent_mixed
    mixed_TD = attend(y_TD, w, prefix, config)
    x_TD = x_TD + mixed_TD @ w[prefix + "self_attn.o_proj.weight"].T
    y_TD = rms_norm(x_TD, w[prefix + "post_attention_layernorm.weight"], eps)
    if prefix + "mlp.gate.weight" in w:
        return x_TD + experts(y_TD, w, prefix + "mlp.", config)
    return x_TD + mlp(y_TD, w, prefix + "mlp.")


def mlp(y_TD: Tensor, w: Weights, prefix: str) -> Tensor:
    gate, up = (y_TD @ w[f"{prefix}{part}_proj.weight"].T for part in ("gate", "up"))
    return (torch.nn.functional.silu(gate) * up) @ w[prefix + "down_proj.weight"].T


def experts(y_TD: Tensor, w: Weights, prefix: str, config: ModelConfig) -> Tensor:
    """DeepSeek-V3's, of each token by itself: equations 12 to 16, with groups as its section 2.1.2 says."""
    assert config.mixture is not None
    r, out_TD = config.mixture.routing, mlp(y_TD, w, prefix + "shared_experts.")
    scores_TE = (y_TD @ w[prefix + "gate.weight"].T).sigmoid()
    for t, scores_E in enumerate(scores_TE):
        rank = (scores_E + w[prefix + "gate.e_score_correction_bias"]).view(r.num_groups, -1)
        best = [sum(sorted(group.tolist())[-2:]) for group in rank]
        out = sorted(range(r.num_groups), key=lambda g: best[g])[: r.num_groups - r.top_groups]
        rank[out] = -torch.inf
        chosen = rank.flatten().argsort(descending=True)[: r.top_k].tolist()
        total = sum(scores_E[e] for e in chosen)
        for e in chosen:
            out_TD[t] += r.scale * scores_E[e] / total * mlp(y_TD[t], w, f"{prefix}experts.{e}.")
    return out_TD


def latent_mixed(y_TD: Tensor, w: Weights, prefix: str, config: ModelConfig) -> Tensor:
    """DeepSeek-V2's equations 37 to 47, every key and value expanded; neighbours turn in pairs."""
    a, T, N = config.latent, len(y_TD), config.num_heads
    assert a is not None

    def times(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{prefix}self_attn.{name}.weight"].T

    q_TQ = rms_norm(times(y_TD, "q_a_proj"), w[prefix + "self_attn.q_a_layernorm.weight"], 1e-6)
    q_TNH = times(q_TQ, "q_b_proj").view(T, N, -1)
    down = times(y_TD, "kv_a_proj_with_mqa")
    latent_TC = rms_norm(down[:, : a.rank], w[prefix + "self_attn.kv_a_layernorm.weight"], 1e-6)
    kv_TNJ = times(latent_TC, "kv_b_proj").view(T, N, -1)

    def turned(x: Tensor) -> Tensor:
        return rotated(torch.cat([x[..., 0::2], x[..., 1::2]], -1), config.rope_theta)

    q = torch.cat([q_TNH[..., : a.nope_dim], turned(q_TNH[..., a.nope_dim :])], -1)
    shared = turned(down[:, None, a.rank :]).expand(T, N, -1)
    k, v = torch.cat([kv_TNJ[..., : a.nope_dim], shared], -1), kv_TNJ[..., a.nope_dim :]
    return mixed(q, k, v)


def mixed(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
    """Causal attention, heads side by side."""
    T, _, H = q_TNH.shape
    scores = torch.einsum("tnh,snh->nts", q_TNH, k_TNH) / H**0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return torch.einsum("nts,snh->tnh", scores.softmax(-1), v_TNH).reshape(T, -1)


def heads_mixed(y_TD: Tensor, w: Weights, prefix: str, config: ModelConfig) -> Tensor:
    """Of the Llama and Qwen families."""
    T, eps, H = len(y_TD), config.rms_norm_eps, config.head_dim
    heads = {}
    for part in "qkv":
        name = f"{prefix}self_attn.{part}_proj."
        heads[part] = (y_TD @ w[name + "weight"].T + w.get(name + "bias", torch.tensor(0.0))).view(T, -1, H)
    for part in "qk":
        if config.qk_norm:
            heads[part] = rms_norm(heads[part], w[f"{prefix}self_attn.{part}_norm.weight"], eps)
        heads[part] = rotated(heads[part], config.rope_theta)
    group = config.num_heads // config.num_kv_heads
    k, v = heads["k"].repeat_interleave(group, 1), heads["v"].repeat_interleave(group, 1)
    return mixed(heads["q"], k, v)


def target_hidden(tokens: list[int], w: Weights, config: ModelConfig, *, is_normed: bool) -> Tensor:
    """The target's hidden states of all tokens, [T, D]."""
    x_TD = w["model.embed_tokens.weight"][tokens]
    for i in range(config.num_layers):
        x_TD = layer(x_TD, w, f"model.layers.{i}.", config)
    return rms_norm(x_TD, w["model.norm.weight"], config.rms_norm_eps) if is_normed else x_TD


def drafts(tokens: list[int], depth: int, w: Weights, config: ModelConfig, style: str) -> tuple[list[int], Tensor]:
    """What the module drafts behind `tokens`, and its logits, [depth, V]."""
    names, eps = NAMES[style], config.rms_norm_eps

    def own(name: str) -> Tensor:
        return w[f"{names.prefix}{name}.weight"]

    h_TD = target_hidden(tokens[:-1], w, config, is_normed=style != "mimo")
    read, logits = tokens[1:], []
    for _ in range(depth):
        e_TD = rms_norm(w["model.embed_tokens.weight"][read], own(names.token_norm), eps)
        hidden_TD = rms_norm(h_TD, own(names.hidden_norm), eps)
        halves = [hidden_TD, e_TD] if style == "mimo" else [e_TD, hidden_TD]
        joined_TD = torch.cat(halves, -1) @ own(names.projection).T
        x_TD = layer(joined_TD, w, names.prefix + names.layer, config)
        normed_TD = rms_norm(x_TD, own(names.norm), eps)
        logits.append(normed_TD[-1] @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T)
        # The next draft's hidden state is the module's own: normed where its code returns it so.
        chained_TD = x_TD if style.startswith("deepseek") else normed_TD
        h_TD, read = torch.cat([h_TD, chained_TD[-1:]]), [*read, int(logits[-1].argmax())]
    return read[len(tokens) - 1 :], torch.stack(logits)
