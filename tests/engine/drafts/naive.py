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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x_TNH: Tensor, theta: float) -> Tensor:
    T, _, H = x_TNH.shape
    angles = torch.arange(T)[:, None] / theta ** (torch.arange(0, H, 2) / H)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = x_TNH.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def layer(x_TD: Tensor, w: Weights, prefix: str, config: ModelConfig) -> Tensor:
    """A decoder layer of the Llama and Qwen families."""
    T, eps, H = len(x_TD), config.rms_norm_eps, config.head_dim
    y_TD = rms_norm(x_TD, w[prefix + "input_layernorm.weight"], eps)
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
    scores = torch.einsum("tnh,snh->nts", heads["q"], k) / H**0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    mixed_TD = torch.einsum("nts,snh->tnh", scores.softmax(-1), v).reshape(T, -1)
    x_TD = x_TD + mixed_TD @ w[prefix + "self_attn.o_proj.weight"].T
    y_TD = rms_norm(x_TD, w[prefix + "post_attention_layernorm.weight"], eps)
    gate, up = (y_TD @ w[f"{prefix}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
    return x_TD + (torch.nn.functional.silu(gate) * up) @ w[prefix + "mlp.down_proj.weight"].T


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
        chained_TD = x_TD if style == "deepseek" else normed_TD
        h_TD, read = torch.cat([h_TD, chained_TD[-1:]]), [*read, int(logits[-1].argmax())]
    return read[len(tokens) - 1 :], torch.stack(logits)
