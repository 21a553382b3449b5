"""The engine's operators served by those of torch_npu; signatures and meaning are those of `ops.reference`.

Most results lie in memory that the operators allocate themselves, in a captured step that of the graphs' pool.
"""

# ruff: noqa: N815, PLR0917  (shapes live in the names of fields, too; operators have many operands)
# Shapes: T packed query tokens, S sequences, N query heads, K KV heads, H head dim, D any last dimension, B blocks of
#         the pool, P tokens per block

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.ops import reference
from xllm_lab.engine.ops.batch import PagedBatch
from xllm_lab.engine.ops.collectives import Group
from xllm_lab.engine.ops.experts import Permuted, Routes, Routing
from xllm_lab.engine.ops.npu import calls, limits
from xllm_lab.engine.ops.tape import is_captured, reads_host


def causal_mask(device: torch.device) -> Tensor:
    """The pattern that sparse mode 3 wants: 1 where a query may not look."""
    return torch.ones(limits.CAUSAL_MASK, limits.CAUSAL_MASK, dtype=torch.int8, device=device).triu_(1)


def attention_fails(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the fused attention cannot be had for this type and width."""
    if dtype not in limits.ATTENTION_DTYPES:
        return f"no fused attention for {str(dtype).removeprefix('torch.')}"
    if head_dim % 16 or head_dim > limits.MAX_HEAD_DIM:
        return f"no fused attention for a head dim of {head_dim}"
    return None


def route_fails(routing: Routing) -> str | None:
    """Why the fused gate cannot be had for this routing."""
    if routing.is_sigmoid or routing.top_groups < routing.num_groups:
        return "the fused gate is a softmax over all experts"
    return None


def exchange_fails(dtype: torch.dtype) -> str | None:
    """Why the fused exchange cannot be had for this type."""
    if dtype not in limits.EXCHANGE_DTYPES:
        return f"no fused exchange for {str(dtype).removeprefix('torch.')}"
    return None


class _Captured(NamedTuple):
    """What captured attentions of as many tokens use in turn; their graphs count on its addresses."""

    q_TNH: Tensor
    lse: Tensor
    workspace: Tensor


class NpuOps:
    """One model's operators."""

    def __init__(self, device: torch.device) -> None:
        self._mask = causal_mask(device)
        self._captured: dict[int, _Captured] = {}

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor) -> Tensor:
        """As `reference.rms_norm`."""
        return calls.rms_norm(x_TD, weight_D, eps)

    def add_rms_norm(
        self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `reference.add_rms_norm`."""
        return calls.add_rms_norm(x_TD, delta_TD, weight_D, eps)

    def head_norm(self, x_TNH: Tensor, weight_NH: Tensor, eps: float) -> Tensor:
        """As `reference.head_norm`: the operator has one weight for all heads, so that it gets ones."""
        normed_TNH = calls.rms_norm(x_TNH.contiguous(), torch.ones_like(weight_NH[0]), eps)
        return normed_TNH.mul_(weight_NH)

    def rope_angles(self, position_T: Tensor, frequencies_H2: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> None:
        """As `reference.rope_angles`, but the operator has the rotation's minus itself."""
        angles_TH2 = torch.outer(position_T.float(), frequencies_H2)
        angles_TH = torch.cat([angles_TH2, angles_TH2], -1)
        cos_TH.copy_(angles_TH.cos())
        sin_TH.copy_(angles_TH.sin())

    def rope(self, x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        """As `reference.rope`."""
        return calls.rotate(x_TNH, cos_TH, sin_TH)

    def swiglu(self, gate_up_TD: Tensor, out_TD: Tensor) -> Tensor:
        """As `reference.swiglu`."""
        return calls.swiglu(gate_up_TD)

    def reshape_and_cache(
        self, k_TKH: Tensor, v_TKH: Tensor, k_BPKH: Tensor, v_BPKH: Tensor, batch: PagedBatch
    ) -> None:
        """As `reference.reshape_and_cache`."""
        calls.scatter_kv(k_TKH.contiguous(), v_TKH.contiguous(), k_BPKH, v_BPKH, batch.slot_T)

    def paged_attention(
        self,
        q_TNH: Tensor,
        k_BPKH: Tensor,
        v_BPKH: Tensor,
        batch: PagedBatch,
        out_TNH: Tensor,
        *,
        scale: float | None = None,
    ) -> None:
        """As `reference.paged_attention`. Sequences that pad a graph are attended to like any other.

        In a captured step the queries are copied to where they stay, because the lengths are put into the graph anew
        for each replay, and that call may neither allocate nor launch anything else.
        """
        if not is_captured():
            _attend(q_TNH.contiguous(), k_BPKH, v_BPKH, batch, self._mask, out_TNH, q_TNH.new_empty(1), None, scale)
            return
        if len(q_TNH) not in self._captured:
            q_copy_TNH = q_TNH.new_empty(q_TNH.shape)
            paged = _paged(q_copy_TNH, k_BPKH, v_BPKH, batch, self._mask, scale)
            self._captured[len(q_TNH)] = _Captured(q_copy_TNH, q_TNH.new_empty(1), calls.attention_workspace(paged))
        own = self._captured[len(q_TNH)]
        own.q_TNH.copy_(q_TNH)
        _attend(own.q_TNH, k_BPKH, v_BPKH, batch, self._mask, out_TNH, own.lse, own.workspace, scale)

    def route(
        self,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        routing: Routing,
        num_tokens_1: Tensor | None,
        out: Routes,
    ) -> Routes:
        """As `experts.route`, but tokens that only pad are routed like any other: the way back wants every row.

        Weights of a softmax come as they are, and are divided by their sum here.
        """
        assert route_fails(routing) is None, f"no fused gate for {routing}"
        weights_Tk, experts_Tk = calls.gate(logits_TE, routing.top_k)
        if routing.is_normalized:
            weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        return Routes(weights_Tk * routing.scale, experts_Tk)

    def permute(self, x_TD: Tensor, expert_Tk: Tensor, rows_XD: Tensor, place_X: Tensor, count_E: Tensor) -> Permuted:
        """As `experts.permute`."""
        return Permuted(*calls.sort_by_expert(x_TD, expert_Tk, len(count_E)))

    def permute_own(
        self,
        x_TD: Tensor,
        slot_Tk: Tensor,
        rows_XD: Tensor,
        place_X: Tensor,
        count_P: Tensor,
        first: int,
        num_slots: int,
    ) -> Permuted:
        """As `experts.permute_own`; the operator's place of what is not ours is -1."""
        rows_XD, place_X, count_P = calls.sort_by_expert(x_TD, slot_Tk, num_slots, (first, first + len(count_P)))
        return Permuted(rows_XD, place_X.clamp_(min=0), count_P)

    def unpermute(
        self, rows_XD: Tensor, place_X: Tensor, weight_Tk: Tensor, shared_TD: Tensor | None, out_TD: Tensor
    ) -> Tensor:
        """As `experts.unpermute`."""
        summed_TD = calls.sum_over_experts(rows_XD, place_X, weight_Tk.to(rows_XD.dtype))
        return summed_TD if shared_TD is None else summed_TD.add_(shared_TD)

    def argmax(self, logits_RV: Tensor) -> list[int]:
        """As `reference.argmax`."""
        return reference.argmax(logits_RV)


class NpuExchange:
    """As `experts.Exchange`."""

    most_rows = limits.MOST_EXCHANGED_ROWS

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(
        self,
        x_RD: Tensor,
        slot_Rk: Tensor,
        weight_Rk: Tensor,
        num_slots: int,
        compute: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """As `experts.Exchange`."""
        ranks = calls.ExpertGroup(self._group.communicator, self._group.size, self._group.rank, num_slots)
        sent = calls.dispatch(x_RD, slot_Rk, ranks)
        made_XD = compute(sent.rows_XD, sent.count_E)
        return calls.combine(made_XD, slot_Rk, weight_Rk, sent, ranks), sent.count_E


class NpuGroupedLinear:
    """As `experts.loop_linear`, in one kernel."""

    kind = "torch_npu"

    def __init__(self, weight_EOI: Tensor) -> None:
        self._weight_EIO = weight_EOI.transpose(1, 2).contiguous()

    def __call__(self, x_XI: Tensor, count_E: Tensor, out_XO: Tensor) -> Tensor:
        return calls.experts_matmul(x_XI, self._weight_EIO, count_E)

    def weight(self, expert: int) -> Tensor:
        """As `experts.GroupedLinear.weight`."""
        return self._weight_EIO[expert].T.contiguous()

    def prepared(self, weight_OI: Tensor) -> Tensor:
        """As `experts.GroupedLinear.prepared`."""
        return weight_OI.T.contiguous()

    def put(self, expert: int, prepared: Tensor) -> None:
        """As `experts.GroupedLinear.put`; a copy on the device, in order with its steps."""
        self._weight_EIO[expert].copy_(prepared)


def _paged(
    q_TNH: Tensor, k_BPKH: Tensor, v_BPKH: Tensor, batch: PagedBatch, mask: Tensor, scale: float | None
) -> calls.PagedQuery:
    cumulated_S, kv_len_S = batch.padded_lengths()
    used = cumulated_S[-1]
    return calls.PagedQuery(
        q_TNH=q_TNH[:used],
        k_BPF=k_BPKH.flatten(2),
        v_BPF=v_BPKH.flatten(2),
        mask=mask,
        cumulated_S=cumulated_S,
        kv_len_S=kv_len_S,
        table_SM=batch.block_table_SM[: len(kv_len_S)],
        scale=scale or q_TNH.shape[2] ** -0.5,
    )


@reads_host
def _attend(
    q_TNH: Tensor,
    k_BPKH: Tensor,
    v_BPKH: Tensor,
    batch: PagedBatch,
    mask: Tensor,
    out_TNH: Tensor,
    lse: Tensor,
    workspace: Tensor | None,
    scale: float | None,
) -> None:
    paged = _paged(q_TNH, k_BPKH, v_BPKH, batch, mask, scale)
    calls.attend(paged, workspace, out_TNH[: len(paged.q_TNH)], lse)
