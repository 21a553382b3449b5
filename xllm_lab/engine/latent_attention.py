"""Latent attention's weights, ready to run absorbed: see `ops.latent`."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, D hidden size, N heads, Q width of compressed queries, C of the compressed vector,
#         I of a query's part that is not rotated, R of the one that is, V of a value

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.kv import LayerKv
from xllm_lab.engine.layer_config import Latent
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops.batch import PagedBatch
from xllm_lab.engine.ops.linear import Linear
from xllm_lab.engine.ops.table import Ops
from xllm_lab.engine.workspace import Rows

_EPS = 1e-6  # of the norms behind compressions, whatever the model's other norms have (DeepSeek's own code)


class LatentAttention(NamedTuple):
    """One layer's. Rotated parts are in halves here, however the checkpoint has them.

    Attributes:
        query_down, query_norm_Q: compress queries; None: nothing does.
        query_nope, query_rope: the two parts of each head's query.
        latent, latent_norm_C: compress keys and values.
        key_rope: the key that all heads share.
        up_NIC: expands the compressed vector to keys; it is applied to queries.
        value_NCV: expands it to values; it is applied to results.
        out: of all heads' values.
    """

    query_down: Linear | None
    query_norm_Q: Tensor | None
    query_nope: Linear
    query_rope: Linear
    latent: Linear
    latent_norm_C: Tensor
    key_rope: Linear
    up_NIC: Tensor
    value_NCV: Tensor
    out: Linear

    def attend(
        self, normed_TD: Tensor, rows: Rows, batch: PagedBatch, kv: LayerKv, *, ops: Ops, config: ModelConfig
    ) -> None:
        """Writes what the layer adds into `rows.branch_TD`, but for other ranks' parts."""
        assert ops.latents is not None, "operators of another attention"
        wide_TD = normed_TD
        if self.query_down is not None and self.query_norm_Q is not None:
            self.query_down(normed_TD, rows.query_down_TQ)
            wide_TD = ops.rms_norm(rows.query_down_TQ, self.query_norm_Q, _EPS, rows.query_down_TQ)
        self.query_nope(wide_TD, rows.query_nope_TNI.flatten(1))
        self.query_rope(wide_TD, rows.query_rope_TNR.flatten(1))
        self.latent(normed_TD, rows.latent_TC)
        self.key_rope(normed_TD, rows.key_rope_T1R.flatten(1))
        latent_TC = ops.rms_norm(rows.latent_TC, self.latent_norm_C, _EPS, rows.latent_TC)
        q_rope_TNR = ops.rope(rows.query_rope_TNR, rows.cos_TH, rows.sin_TH)
        k_rope_T1R = ops.rope(rows.key_rope_T1R, rows.cos_TH, rows.sin_TH)
        ops.latents.cache_latent(latent_TC, k_rope_T1R, kv.k_BPKH, batch)
        ops.latents.latent_query(rows.query_nope_TNI, q_rope_TNR, self.up_NIC, rows.query_TNH)
        ops.paged_attention(rows.query_TNH, kv.k_BPKH, kv.k_BPKH, batch, rows.attended_TNH, scale=config.score_scale)
        C = self.up_NIC.shape[2]
        ops.latents.head_linear(rows.attended_TNH[..., :C], self.value_NCV, rows.value_TNV)
        self.out(rows.value_TNV.flatten(1), rows.branch_TD)


Take = Callable[[str], Tensor]


def take_latent_attention(
    take: Take, has: Callable[[str], bool], linear: Callable[[Tensor, Tensor | None], Linear], config: ModelConfig
) -> LatentAttention:
    """From a layer's weights.

    Args:
        take: gives up a tensor by its name in the layer.
        has: whether there is one.
        linear: makes a layer.
    """
    latent = config.latent
    assert latent is not None, "a model of another attention"
    N = config.num_heads

    def bias(name: str) -> Tensor | None:
        return take(name + ".bias") if has(name + ".bias") else None

    query_down, norm_Q, query = None, None, "self_attn.q_proj"
    if latent.query_rank:
        query_down = linear(take("self_attn.q_a_proj.weight"), bias("self_attn.q_a_proj"))
        norm_Q, query = take("self_attn.q_a_layernorm.weight"), "self_attn.q_b_proj"
    query_JD = take(query + ".weight")
    query_NJD = query_JD.view(N, -1, query_JD.shape[1])
    down_HD, C = take("self_attn.kv_a_proj_with_mqa.weight"), latent.rank
    down_bias = bias("self_attn.kv_a_proj_with_mqa")
    expand_NJC = take("self_attn.kv_b_proj.weight").view(N, -1, C)
    return LatentAttention(
        query_down=query_down,
        query_norm_Q=norm_Q,
        query_nope=linear(query_NJD[:, : latent.nope_dim].flatten(0, 1).contiguous(), None),
        query_rope=linear(_in_halves(query_NJD[:, latent.nope_dim :], latent).flatten(0, 1).contiguous(), None),
        latent=linear(down_HD[:C].contiguous(), None if down_bias is None else down_bias[:C].contiguous()),
        latent_norm_C=take("self_attn.kv_a_layernorm.weight"),
        key_rope=linear(
            _in_halves(down_HD[C:], latent).contiguous(),
            None if down_bias is None else _in_halves(down_bias[C:, None], latent).flatten().contiguous(),
        ),
        up_NIC=expand_NJC[:, : latent.nope_dim].contiguous(),
        value_NCV=expand_NJC[:, latent.nope_dim :].transpose(1, 2).contiguous(),
        out=linear(take("self_attn.o_proj.weight"), bias("self_attn.o_proj")),
    )


def _in_halves(rows_RD: Tensor, latent: Latent) -> Tensor:
    """Rows (second to last dimension) 0 1 2 3 ... of neighbouring pairs as 0 2 ... 1 3 ...; scores do not change."""
    if not latent.is_interleaved:
        return rows_RD
    return torch.cat([rows_RD[..., 0::2, :], rows_RD[..., 1::2, :]], -2)
