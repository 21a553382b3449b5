"""Our own forward pass of the Llama family."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, R rows whose logits are wanted, D hidden size, N query heads, K KV heads, H head dim,
#         V vocabulary, B blocks, P tokens per block, H2 = H / 2 rotary pairs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.kv import LayerKv
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops.attention import PagedBatch, paged_attention, reshape_and_cache
from xllm_lab.engine.ops.elementwise import rms_norm, rope, swiglu
from xllm_lab.engine.ops.linear import Linear


class _Layer(NamedTuple):
    attention_norm_D: Tensor
    qkv: Linear
    qk_norm_weight_NH: Tensor | None  # the weights of q's and k's norm, repeated for each of the N + K heads
    out: Linear
    mlp_norm_D: Tensor
    gate_up: Linear
    down: Linear


class DecoderModel:
    """A decoder ready to run: fused and packed weights, rotary tables.

    Built from checked weights, which it takes over: the dictionary is emptied layer by layer, so that the peak is
    one copy of the model and not two.
    """

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], *, device: torch.device, packed: bool | None = None
    ) -> None:
        """Args: `weights` as `weights.checked` returns them; `packed` as in `Linear`."""
        self.config = config
        self.dtype = weights["model.norm.weight"].dtype
        self.device = device

        def take(name: str) -> Tensor:
            return weights.pop(name).to(device)

        def fuse(prefix: str, parts: Sequence[str]) -> Linear:
            names = [f"{prefix}{part}_proj." for part in parts]
            bias = torch.cat([take(n + "bias") for n in names]) if names[0] + "bias" in weights else None
            return Linear(torch.cat([take(n + "weight") for n in names]), bias, packed=packed)

        self._embedding_VD = take("model.embed_tokens.weight")
        self._head = Linear(self._embedding_VD if config.tie_embeddings else take("lm_head.weight"), packed=packed)
        self._norm_D = take("model.norm.weight")
        self._layers: list[_Layer] = []
        for i in range(config.num_layers):
            layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
            qk_norm = None
            if config.qk_norm:
                q_H, k_H = take(attention + "q_norm.weight"), take(attention + "k_norm.weight")
                qk_norm = torch.cat([q_H.expand(config.num_heads, -1), k_H.expand(config.num_kv_heads, -1)])
            self._layers.append(
                _Layer(
                    attention_norm_D=take(layer + "input_layernorm.weight"),
                    qkv=fuse(attention, "qkv"),
                    qk_norm_weight_NH=qk_norm,
                    out=fuse(attention, "o"),
                    mlp_norm_D=take(layer + "post_attention_layernorm.weight"),
                    gate_up=fuse(layer + "mlp.", ("gate", "up")),
                    down=fuse(layer + "mlp.", ("down",)),
                )
            )
        assert not weights, f"weights nobody took: {sorted(weights)}"
        self._frequencies_H2 = rope_frequencies(config).to(device)

    @property
    def linear_kind(self) -> str:
        """How the matrix products run, for the manifest; see `Linear.kind`."""
        return self._head.kind

    def forward(
        self, token_T: Tensor, position_T: Tensor, wanted_R: Tensor, batch: PagedBatch, kv: Sequence[LayerKv]
    ) -> Tensor:
        """Computes T tokens, writes their keys and values into `kv`, and returns logits.

        Args:
            token_T, position_T: of the tokens, sequence after sequence as in `batch`.
            wanted_R: indices into T.

        Returns:
            Shape [R, V], float32.
        """
        x_TD = self._embedding_VD[token_T]
        cos_T1H, sin_T1H = rope_rows(position_T, self._frequencies_H2, self.dtype)
        eps = self.config.rms_norm_eps
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            normed_TD = rms_norm(x_TD, layer.attention_norm_D, eps)
            x_TD = x_TD + self._attend(layer, normed_TD, cos_T1H, sin_T1H, batch=batch, kv=layer_kv)
            x_TD = x_TD + layer.down(swiglu(layer.gate_up(rms_norm(x_TD, layer.mlp_norm_D, eps))))
        return self._head(rms_norm(x_TD[wanted_R], self._norm_D, eps)).float()

    def _attend(
        self, layer: _Layer, x_TD: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, *, batch: PagedBatch, kv: LayerKv
    ) -> Tensor:
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        # q, k and v lie side by side as heads; norm and rotation treat the N + K heads of q and k as one tensor.
        qkv_TNH = layer.qkv(x_TD).view(-1, N + 2 * K, H)
        qk_TNH = qkv_TNH[:, : N + K]
        if layer.qk_norm_weight_NH is not None:
            qk_TNH = rms_norm(qk_TNH, torch.ones_like(sin_T1H[0, 0]), self.config.rms_norm_eps)
            qk_TNH = qk_TNH * layer.qk_norm_weight_NH
        qk_TNH = rope(qk_TNH, cos_T1H, sin_T1H)
        reshape_and_cache(qk_TNH[:, N:], qkv_TNH[:, N + K :], kv.k_BPKH, kv.v_BPKH, batch.slot_T)
        out_TNH = paged_attention(qk_TNH[:, :N], kv.k_BPKH, kv.v_BPKH, batch)
        return layer.out(out_TNH.view(-1, N * H))


class RopeRows(NamedTuple):
    """Cosine and sine of every token's angles; the first half of `sin` is negated, as `rope` wants it."""

    cos_T1H: Tensor
    sin_T1H: Tensor


def rope_rows(position_T: Tensor, frequencies_H2: Tensor, dtype: torch.dtype) -> RopeRows:
    """Angles are computed in float32 and rounded once, as transformers does.

    Anew each step: for T tokens that is nothing next to one layer, while a table is as long as the longest context.
    """
    angles = torch.outer(position_T.float(), frequencies_H2).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return RopeRows(torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype))


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each of the H / 2 pairs, float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies_H2 = 1.0 / config.rope_theta**exponents
    if config.rope_divisors:
        frequencies_H2 = frequencies_H2 / torch.tensor(config.rope_divisors, dtype=torch.float32)
    return frequencies_H2
