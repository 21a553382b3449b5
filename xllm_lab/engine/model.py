"""Our own forward pass of the Llama family, with its mixtures of experts and latent attention."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, R rows whose logits are wanted, D hidden size, N query heads, K KV heads, H head dim,
#         V vocabulary, B blocks, P tokens per block, H2 = H / 2 rotary pairs

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.expert_parallel import ALL_TO_ALL, ExpertParallel
from xllm_lab.engine.kv import LayerKv
from xllm_lab.engine.latent_attention import LatentAttention, take_latent_attention
from xllm_lab.engine.layer_config import expert_names
from xllm_lab.engine.mixture import MixtureLayer, loads_of, take_mixture
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops.batch import PagedBatch
from xllm_lab.engine.ops.collectives import Group, join_logits, own_rows
from xllm_lab.engine.ops.linear import Linear, TorchLinear
from xllm_lab.engine.ops.table import ExpertShape, Ops, choose
from xllm_lab.engine.ops.tape import taped
from xllm_lab.engine.sharding import Shard
from xllm_lab.engine.workspace import Rows, Workspace


class HeadAttention(NamedTuple):
    """Grouped-query attention's weights, fused and packed."""

    qkv: Linear
    qk_norm_weight_NH: Tensor | None  # the weights of q's and k's norm, repeated for each of the N + K heads
    out: Linear

    def attend(
        self, normed_TD: Tensor, rows: Rows, batch: PagedBatch, kv: LayerKv, *, ops: Ops, config: ModelConfig
    ) -> None:
        """Writes what the layer adds into `rows.branch_TD`, but for other ranks' parts."""
        N, K = config.num_heads, config.num_kv_heads
        qkv_THn = rows.qkv_THn
        self.qkv(normed_TD, qkv_THn.flatten(1))
        qk_TNH = qkv_THn[:, : N + K]  # norm and rotation treat the heads of q and k as one tensor
        if self.qk_norm_weight_NH is not None:
            qk_TNH = ops.head_norm(qk_TNH, self.qk_norm_weight_NH, config.rms_norm_eps)
        qk_TNH = ops.rope(qk_TNH, rows.cos_TH, rows.sin_TH)
        ops.reshape_and_cache(qk_TNH[:, N:], qkv_THn[:, N + K :], kv.k_BPKH, kv.v_BPKH, batch)
        ops.paged_attention(qk_TNH[:, :N], kv.k_BPKH, kv.v_BPKH, batch, rows.attended_TNH, scale=config.score_scale)
        self.out(rows.attended_TNH.flatten(1), rows.branch_TD)


class Mlp(NamedTuple):
    """SwiGLU's weights, fused and packed."""

    gate_up: Linear
    down: Linear

    def feed(self, normed_TD: Tensor, rows: Rows, ops: Ops) -> Tensor:
        """What the layer adds, but for other ranks' parts."""
        self.gate_up(normed_TD, rows.gate_up_TF2)
        self.down(ops.swiglu(rows.gate_up_TF2, rows.gated_TF), rows.branch_TD)
        return rows.branch_TD


class Layer(NamedTuple):
    """A decoder layer's weights."""

    attention_norm_D: Tensor
    attention: HeadAttention | LatentAttention
    mlp_norm_D: Tensor
    mlp: Mlp | MixtureLayer


class DecoderModel:
    """A decoder ready to run: fused and packed weights, and the operators that serve them.

    Built from checked weights, which it takes over: the dictionary is emptied layer by layer, so that the peak is
    one copy of the model and not two.

    Attributes:
        ops: the operators chosen for this device, dtype and shape.
        layers: in their order.
        norm_D: behind the last of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        *,
        device: torch.device,
        without: Sequence[str] = (),
        group: Group | None = None,
        experts: ExpertParallel | None = None,
    ) -> None:
        """Takes over a whole model, or one rank's part of it.

        Args:
            config, weights: `weights` as `weights.checked` returns them; of one rank of several, both as its `Shard`
                cuts them.
            without: names implementations not to use.
            group: the ranks that have the other parts of matrices; None: they are whole.
            experts: how ranks share the experts; None: each has its part of every expert.
        """
        self.config = config
        self.dtype = weights["model.norm.weight"].dtype
        self.device = device
        self._group = group
        self._experts = experts if config.mixture is not None else None
        self._shard = shard_of(group, self._experts)
        self.ops = choose(
            *(device, self.dtype),
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            expert_shape=expert_shape(config),
            is_latent=config.latent is not None,
            without=without,
            group=group,
            exchanges=experts.group if experts is not None and experts.dispatch == ALL_TO_ALL else None,
        )

        embedding_VD = weights.pop("model.embed_tokens.weight").to(device)
        if config.tie_embeddings:
            self._head = self.ops.linear(embedding_VD, keep_rows=True)
            self._embed = self._head.rows
        else:
            self._head = self.ops.linear(weights.pop("lm_head.weight").to(device))
            self._embed = TorchLinear(embedding_VD).rows
        self.norm_D = weights.pop("model.norm.weight").to(device)
        self.layers = [self.take_layer(weights, f"model.layers.{i}.") for i in range(config.num_layers)]
        assert not weights, f"weights nobody took: {sorted(weights)}"
        self._frequencies_H2 = rope_frequencies(config).to(device)

    @property
    def is_divided(self) -> bool:
        """Whether other ranks have parts of it."""
        return self._group is not None or self._experts is not None

    @property
    def experts(self) -> ExpertParallel | None:
        """How ranks share its experts; None if they do not."""
        return self._experts

    def take_layer(self, weights: dict[str, Tensor], prefix: str) -> Layer:
        """A layer of this model's shape, for it or beside it, over the weights of that prefix, which it takes over."""

        def take(name: str) -> Tensor:
            return weights.pop(prefix + name).to(self.device)

        def fuse(block: str, parts: Sequence[str]) -> Linear:
            names = [f"{block}.{part}_proj." for part in parts]
            has_bias = f"{prefix}{names[0]}bias" in weights
            bias = torch.cat([take(n + "bias") for n in names]) if has_bias else None
            return self.ops.linear(torch.cat([take(n + "weight") for n in names]), bias)

        config = self.config
        attention: HeadAttention | LatentAttention
        mlp: Mlp | MixtureLayer
        if config.latent is not None:
            attention = take_latent_attention(take, lambda name: prefix + name in weights, self.ops.linear, config)
        else:
            qk_norm = None
            if config.qk_norm:
                q_H, k_H = take("self_attn.q_norm.weight"), take("self_attn.k_norm.weight")
                qk_norm = torch.cat([q_H.expand(config.num_heads, -1), k_H.expand(config.num_kv_heads, -1)])
            attention = HeadAttention(fuse("self_attn", "qkv"), qk_norm, fuse("self_attn", "o"))
        if config.mixture is not None and prefix + expert_names(config.architecture).router in weights:
            mlp = take_mixture(take, self.ops, config, device=self.device, parallel=self._experts)
        else:
            mlp = Mlp(fuse("mlp", ("gate", "up")), fuse("mlp", ("down",)))
        return Layer(take("input_layernorm.weight"), attention, take("post_attention_layernorm.weight"), mlp)

    def around(self, layers: Sequence[Layer], norm_D: Tensor) -> DecoderModel:
        """This embedding, head and operators around other layers, and another norm behind them. Nothing is copied."""
        other = copy.copy(self)
        other.layers, other.norm_D = list(layers), norm_D
        other.config = replace(self.config, num_layers=len(layers))
        return other

    def describe_ops(self) -> dict[str, Any]:
        """What serves each operator, and why nothing earlier in the table does; for the manifest."""
        return {op: asdict(served) for op, served in self.ops.served.items()}

    def workspace(self) -> Workspace:
        """Memory for steps of this model."""
        return Workspace(self.config, self.dtype, self.device, self._shard)

    def run_beside(self, workspace: Workspace) -> None:
        """A step of other ranks, which have tokens: what this one's experts do in it."""
        assert self._experts is not None, "nobody else's step"
        assert self._experts.has_own_tokens, "all ranks have all tokens"
        rows = workspace.rows(0)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer.mlp, Mlp):
                layer.mlp.feed(rows.normed_TD, rows, loads_of(workspace, i, None), self.ops)

    def logits(self, normed_RD: Tensor, workspace: Workspace) -> Tensor:
        """The head, of rows that `run_layers` returned.

        Returns:
            Shape [R, V], float32; they are the workspace's, and stand until the next step.
        """
        logits_RV = workspace.logits(len(normed_RD))
        if self._group is None:
            self._head(normed_RD, logits_RV)
        elif len(normed_RD):
            assert self._shard is not None, "a group has parts"
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
        """Computes T tokens and writes their keys and values into `kv`.

        Args:
            token_T, position_T: of the tokens, sequence after sequence as in `batch`.

        Returns:
            Shape [T, D], what the head reads; they stand until the next step.
        """
        self.embed(token_T, workspace.rows(len(token_T)).hidden_TD, workspace)
        return self.run_embedded(position_T, batch=batch, kv=kv, workspace=workspace)

    def run_embedded(
        self, position_T: Tensor, *, batch: PagedBatch, kv: Sequence[LayerKv], workspace: Workspace
    ) -> Tensor:
        """`run_layers` of what stands in the workspace's `hidden_TD`, which is lost."""
        ops, eps, rows = self.ops, self.config.rms_norm_eps, workspace.rows(len(position_T))
        ops.rope_angles(position_T, self._frequencies_H2, rows.cos_TH, rows.sin_TH)
        hidden_TD = rows.hidden_TD
        normed_TD = ops.rms_norm(hidden_TD, self.layers[0].attention_norm_D, eps, rows.normed_TD)
        # Each branch's result joins the residual stream in the norm that comes next, which may be the next layer's.
        next_norms = [*(layer.attention_norm_D for layer in self.layers[1:]), self.norm_D]
        for i, (layer, layer_kv, next_norm_D) in enumerate(zip(self.layers, kv, next_norms, strict=True)):
            layer.attention.attend(normed_TD, rows, batch, layer_kv, ops=ops, config=self.config)
            ops.all_reduce(rows.branch_TD)
            hidden_TD, normed_TD = ops.add_rms_norm(hidden_TD, rows.branch_TD, layer.mlp_norm_D, eps, rows.normed_TD)
            if isinstance(layer.mlp, Mlp):
                branch_TD = layer.mlp.feed(normed_TD, rows, ops)
            else:
                branch_TD = layer.mlp.feed(normed_TD, rows, loads_of(workspace, i, batch.num_tokens_1), ops)
            ops.all_reduce(branch_TD)
            hidden_TD, normed_TD = ops.add_rms_norm(hidden_TD, branch_TD, next_norm_D, eps, rows.normed_TD)
        return normed_TD

    def embed(self, token_T: Tensor, hidden_TD: Tensor, workspace: Workspace) -> None:
        """Writes the tokens' rows of the embedding."""
        if self._group is None or self._shard is None:
            self._embed(token_T, hidden_TD)
            return
        part, row_T = self._shard.vocabulary(self.config.vocab_size), workspace.own_tokens(len(token_T))
        own_rows(token_T, part.first, part.own, row_T)
        self._embed(row_T, hidden_TD)
        self.ops.all_reduce(hidden_TD)  # of one row and zeros: exact


def shard_of(group: Group | None, experts: ExpertParallel | None) -> Shard | None:
    """This rank's part of a model; None: all of it."""
    if group is None and experts is None:
        return None
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    return Shard(rank, size, None if experts is None else experts.share)


def expert_shape(config: ModelConfig) -> ExpertShape | None:
    """Of its layers' experts, if there are some."""
    if config.mixture is None:
        return None
    return ExpertShape(config.mixture.routing, config.hidden_size, config.mixture.intermediate_size)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each of the H / 2 pairs, float32."""
    exponents = torch.arange(0, config.rope_dim, 2, dtype=torch.float32) / config.rope_dim
    frequencies_H2 = 1.0 / config.rope_theta**exponents
    if config.rope_divisors:
        frequencies_H2 = frequencies_H2 / torch.tensor(config.rope_divisors, dtype=torch.float32)
    return frequencies_H2
