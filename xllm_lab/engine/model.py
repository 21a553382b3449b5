"""Our own forward pass of the Llama family."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, R rows whose logits are wanted, D hidden size, N query heads, K KV heads, H head dim,
#         V vocabulary, B blocks, P tokens per block, H2 = H / 2 rotary pairs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.kv import LayerKv
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops.batch import PagedBatch
from xllm_lab.engine.ops.collectives import Group, join_logits, own_rows
from xllm_lab.engine.ops.linear import Linear, TorchLinear
from xllm_lab.engine.ops.table import choose
from xllm_lab.engine.ops.tape import taped
from xllm_lab.engine.sharding import Shard
from xllm_lab.engine.workspace import Rows, Workspace


class _Layer(NamedTuple):
    attention_norm_D: Tensor
    qkv: Linear
    qk_norm_weight_NH: Tensor | None  # the weights of q's and k's norm, repeated for each of the N + K heads
    out: Linear
    mlp_norm_D: Tensor
    gate_up: Linear
    down: Linear


class DecoderModel:
    """A decoder ready to run: fused and packed weights, and the operators that serve them.

    Built from checked weights, which it takes over: the dictionary is emptied layer by layer, so that the peak is
    one copy of the model and not two.

    Attributes:
        ops: the operators chosen for this device, dtype and shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        *,
        device: torch.device,
        without: Sequence[str] = (),
        group: Group | None = None,
    ) -> None:
        """Takes over a whole model, or one rank's part of it.

        Args:
            config, weights: `weights` as `weights.checked` returns them; of one rank of several, both as its `Shard`
                cuts them.
            without: names implementations not to use.
            group: the ranks that have the other parts; None: this is the whole model.
        """
        self.config = config
        self.dtype = weights["model.norm.weight"].dtype
        self.device = device
        self._group = group
        self._shard = None if group is None else Shard(group.rank, group.size)
        self.ops = choose(
            *(device, self.dtype),
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            without=without,
            group=group,
        )

        def take(name: str) -> Tensor:
            return weights.pop(name).to(device)

        def fuse(prefix: str, parts: Sequence[str]) -> Linear:
            names = [f"{prefix}{part}_proj." for part in parts]
            bias = torch.cat([take(n + "bias") for n in names]) if names[0] + "bias" in weights else None
            return self.ops.linear(torch.cat([take(n + "weight") for n in names]), bias)

        embedding_VD = take("model.embed_tokens.weight")
        if config.tie_embeddings:
            self._head = self.ops.linear(embedding_VD, keep_rows=True)
            self._embed = self._head.rows
        else:
            self._head = self.ops.linear(take("lm_head.weight"))
            self._embed = TorchLinear(embedding_VD).rows
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

    def describe_ops(self) -> dict[str, Any]:
        """What serves each operator, and why nothing earlier in the table does; for the manifest."""
        return {op: asdict(served) for op, served in self.ops.served.items()}

    def workspace(self) -> Workspace:
        """Memory for steps of this model."""
        return Workspace(self.config, self.dtype, self.device, self._shard)

    def forward(
        self,
        token_T: Tensor,
        position_T: Tensor,
        wanted_R: Tensor,
        *,
        batch: PagedBatch,
        kv: Sequence[LayerKv],
        workspace: Workspace,
    ) -> Tensor:
        """Computes T tokens, writes their keys and values into `kv`, and returns logits.

        Args:
            token_T, position_T: of the tokens, sequence after sequence as in `batch`.
            wanted_R: indices into T.

        Returns:
            Shape [R, V], float32; they are the workspace's, and stand until the next step.
        """
        normed_TD = self.run_layers(token_T, position_T, batch=batch, kv=kv, workspace=workspace)
        return self.logits(normed_TD[wanted_R], workspace)

    def logits(self, normed_RD: Tensor, workspace: Workspace) -> Tensor:
        """The head: as `forward` returns them, of rows that `run_layers` returned."""
        logits_RV = workspace.logits(len(normed_RD))
        if self._group is None or self._shard is None:
            self._head(normed_RD, logits_RV)
        elif len(normed_RD):
            part_RU, parts_nRU = workspace.logit_parts(len(normed_RD))
            self._head(normed_RD, part_RU)
            taped(self._group.all_gather)(part_RU, parts_nRU)
            join_logits(parts_nRU, self._shard.vocabulary(self.config.vocab_size).own, logits_RV)
        return logits_RV

    def run_layers(
        self,
        token_T: Tensor,
        position_T: Tensor,
        *,
        batch: PagedBatch,
        kv: Sequence[LayerKv],
        workspace: Workspace,
    ) -> Tensor:
        """`forward` without its head.

        Returns:
            Shape [T, D], what the head reads; they stand until the next step.
        """
        ops, eps, rows = self.ops, self.config.rms_norm_eps, workspace.rows(len(token_T))
        self._embed_tokens(token_T, rows.hidden_TD, workspace)
        ops.rope_angles(position_T, self._frequencies_H2, rows.cos_TH, rows.sin_TH)
        hidden_TD = rows.hidden_TD
        normed_TD = ops.rms_norm(hidden_TD, self._layers[0].attention_norm_D, eps, rows.normed_TD)
        # Each branch's result joins the residual stream in the norm that comes next, which may be the next layer's.
        next_norms = [*(layer.attention_norm_D for layer in self._layers[1:]), self._norm_D]
        for layer, layer_kv, next_norm_D in zip(self._layers, kv, next_norms, strict=True):
            self._attend(layer, normed_TD, rows, batch, layer_kv)
            hidden_TD, normed_TD = ops.add_rms_norm(hidden_TD, rows.branch_TD, layer.mlp_norm_D, eps, rows.normed_TD)
            layer.gate_up(normed_TD, rows.gate_up_TF2)
            layer.down(ops.swiglu(rows.gate_up_TF2, rows.gated_TF), rows.branch_TD)
            ops.all_reduce(rows.branch_TD)
            hidden_TD, normed_TD = ops.add_rms_norm(hidden_TD, rows.branch_TD, next_norm_D, eps, rows.normed_TD)
        return normed_TD

    def _embed_tokens(self, token_T: Tensor, hidden_TD: Tensor, workspace: Workspace) -> None:
        if self._shard is None:
            self._embed(token_T, hidden_TD)
            return
        part, row_T = self._shard.vocabulary(self.config.vocab_size), workspace.own_tokens(len(token_T))
        own_rows(token_T, part.first, part.own, row_T)
        self._embed(row_T, hidden_TD)
        self.ops.all_reduce(hidden_TD)  # of one row and zeros: exact

    def _attend(self, layer: _Layer, normed_TD: Tensor, rows: Rows, batch: PagedBatch, kv: LayerKv) -> None:
        N, K = self.config.num_heads, self.config.num_kv_heads
        qkv_THn = rows.qkv_THn
        layer.qkv(normed_TD, qkv_THn.flatten(1))
        qk_TNH = qkv_THn[:, : N + K]  # norm and rotation treat the heads of q and k as one tensor
        if layer.qk_norm_weight_NH is not None:
            qk_TNH = self.ops.head_norm(qk_TNH, layer.qk_norm_weight_NH, self.config.rms_norm_eps)
        qk_TNH = self.ops.rope(qk_TNH, rows.cos_TH, rows.sin_TH)
        self.ops.reshape_and_cache(qk_TNH[:, N:], qkv_THn[:, N + K :], kv.k_BPKH, kv.v_BPKH, batch)
        self.ops.paged_attention(qk_TNH[:, :N], kv.k_BPKH, kv.v_BPKH, batch, rows.attended_TNH)
        layer.out(rows.attended_TNH.flatten(1), rows.branch_TD)
        self.ops.all_reduce(rows.branch_TD)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each of the H / 2 pairs, float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies_H2 = 1.0 / config.rope_theta**exponents
    if config.rope_divisors:
        frequencies_H2 = frequencies_H2 / torch.tensor(config.rope_divisors, dtype=torch.float32)
    return frequencies_H2
