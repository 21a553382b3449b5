"""How we call each operator of torch_npu: the modes that we use are written here, and nowhere else.

Arguments are passed as torch_npu 2.10.0.post4 and 2.13.0 both accept them, which `tests/npu/test_contract.py` shows.
"""

# ruff: noqa: N815, PLR0917  (shapes live in the names of fields, too; operators have many operands)
# Shapes: T packed query tokens, R rows, S sequences, N query heads, K KV heads, H head dim, D any last dimension,
#         B blocks of the pool, P tokens per block, M blocks of the longest table, E experts, k experts of a row,
#         X rows times experts, I inputs, O outputs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from xllm_lab.engine.ops.npu import limits, moe_references, references
from xllm_lab.engine.ops.npu.operators import Send, adapts

# Formats of the Ascend computing language (aclFormat).
ND, FRACTAL_NZ = 2, 29


class PagedQuery(NamedTuple):
    """What attention is computed of; lists are the host's.

    Attributes:
        q_TNH: contiguous.
        k_BPF, v_BPF: pools with heads side by side, F = K * H.
        mask: `limits.CAUSAL_MASK` squared, 1 above the diagonal, int8.
        cumulated_S: tokens of this and all sequences before it; the last is T.
        kv_len_S: tokens in the pool, those of this step included.
        table_SM: int32.
        scale: of the scores.
    """

    q_TNH: Tensor
    k_BPF: Tensor
    v_BPF: Tensor
    mask: Tensor
    cumulated_S: Sequence[int]
    kv_len_S: Sequence[int]
    table_SM: Tensor
    scale: float

    def named(self) -> dict[str, Any]:
        """Packed (TND), causal and aligned at the right end (sparse mode 3)."""
        _, N, H = self.q_TNH.shape
        return {
            "atten_mask": self.mask,
            "actual_seq_lengths": self.cumulated_S,
            "actual_seq_lengths_kv": self.kv_len_S,
            "block_table": self.table_SM,
            "num_heads": N,
            "scale": self.scale,
            "input_layout": "TND",
            "num_key_value_heads": self.k_BPF.shape[2] // H,
            "sparse_mode": 3,
            "block_size": self.k_BPF.shape[1],
        }


@adapts(
    "npu_fused_infer_attention_score.out",
    limits.npu_fused_infer_attention_score,
    references.npu_fused_infer_attention_score,
)
def attend(op: Send, paged: PagedQuery, workspace: Tensor | None, out_TNH: Tensor, lse: Tensor) -> None:
    """Attention into `out_TNH`. `lse` is asked for but not written: one element."""
    op(*paged[:3], **paged.named(), workspace=workspace, out=[out_TNH, lse])


@adapts(
    "_npu_fused_infer_attention_score_get_max_workspace",
    limits.npu_fused_infer_attention_score,
    references.npu_fused_infer_attention_score_get_max_workspace,
)
def attention_workspace(op: Send, paged: PagedQuery) -> Tensor:
    """Memory that `attend` computes in, enough for any lengths of as many sequences."""
    workspace: Tensor = op(*paged[:3], **paged.named())
    return workspace


@adapts("npu_scatter_pa_kv_cache", limits.npu_scatter_pa_kv_cache, references.npu_scatter_pa_kv_cache)
def scatter_kv(op: Send, k_TKH: Tensor, v_TKH: Tensor, k_BPKH: Tensor, v_BPKH: Tensor, slot_T: Tensor) -> None:
    """Keys and values into their slots of plain pools (the operator's own default is the fractal layout)."""
    op(k_TKH, v_TKH, k_BPKH, v_BPKH, slot_T, cache_mode="Norm")


@adapts("npu_rms_norm", limits.npu_rms_norm, references.npu_rms_norm)
def rms_norm(op: Send, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The normalised rows."""
    normed_TD: Tensor = op(x_TD, weight_D, eps)[0]
    return normed_TD


@adapts("npu_add_rms_norm", limits.npu_add_rms_norm, references.npu_add_rms_norm)
def add_rms_norm(op: Send, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, and the sum normalised."""
    normed_TD, _, summed_TD = op(x_TD, delta_TD, weight_D, eps)
    return summed_TD, normed_TD


@adapts("npu_rotary_mul", limits.npu_rotary_mul, references.npu_rotary_mul)
def rotate(op: Send, x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Heads turned by their token's angle, as one sequence of T tokens; `sin` without the rotation's minus."""
    turned_1TNH: Tensor = op(x_TNH.unsqueeze(0), *(a_TH[None, :, None] for a_TH in (cos_TH, sin_TH)), "half")
    return turned_1TNH[0]


@adapts("npu_swiglu", limits.npu_swiglu, references.npu_swiglu)
def swiglu(op: Send, gate_up_TF2: Tensor) -> Tensor:
    """`silu(gate) * up`, gate first."""
    gated_TF: Tensor = op(gate_up_TF2, -1)
    return gated_TF


@adapts("npu_mm_all_reduce_base", limits.npu_mm_all_reduce_base, references.npu_mm_all_reduce_base)
def matmul_all_reduce(op: Send, x_TI: Tensor, weight_IO: Tensor, communicator: str) -> Tensor:
    """A product summed over the ranks of a communicator (`get_hccl_comm_name`)."""
    y_TO: Tensor = op(x_TI, weight_IO, communicator, reduce_op="sum")
    return y_TO


@adapts("npu_prefetch", limits.npu_prefetch, references.npu_prefetch)
def prefetch(op: Send, weight: Tensor, after: Tensor | None, num_bytes: int) -> None:
    """Begins to load a weight into the L2 cache; on a stream of its own, or it is waited for."""
    op(weight, after, num_bytes, 0)


@adapts("npu_format_cast", limits.npu_format_cast, references.npu_format_cast)
def format_cast(op: Send, weight: Tensor, acl_format: int) -> Tensor:
    """The same numbers as `ND` or `FRACTAL_NZ`, which matrix units read without reordering."""
    cast: Tensor = op(weight, acl_format)
    return cast


@adapts(
    "npu_moe_gating_top_k_softmax", limits.npu_moe_gating_top_k_softmax, moe_references.npu_moe_gating_top_k_softmax
)
def gate(op: Send, logits_RE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and experts (int32) of each row, the largest first."""
    weights_Rk, expert_Rk, _ = op(logits_RE, None, top_k)
    return weights_Rk, expert_Rk


@adapts("npu_moe_init_routing_v2", limits.npu_moe_init_routing_v2, moe_references.npu_moe_init_routing_v2)
def sort_by_expert(
    op: Send, x_RD: Tensor, expert_Rk: Tensor, num_experts: int, own: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of each expert together, where each (row, expert) went, and the rows of each expert (int64).

    Args:
        own: experts from the first to below the second alone; the place of others' rows is -1.
    """
    sorted_XD, place_X, count_E, _ = op(
        x_RD,
        expert_Rk,
        active_num=expert_Rk.numel(),
        expert_num=num_experts,
        drop_pad_mode=0,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, num_experts] if own is None else list(own),
        row_idx_type=0,
    )
    return sorted_XD, place_X, count_E


@adapts("npu_grouped_matmul", limits.npu_grouped_matmul, moe_references.npu_grouped_matmul)
def experts_matmul(op: Send, sorted_XI: Tensor, weight_EIO: Tensor, count_E: Tensor) -> Tensor:
    """Each expert's rows times its weight."""
    (y_XO,) = op([sorted_XI], [weight_EIO], group_list=count_E, split_item=2, group_type=0, group_list_type=1)
    out_XO: Tensor = y_XO
    return out_XO


@adapts("npu_moe_token_unpermute", limits.npu_moe_token_unpermute, moe_references.npu_moe_token_unpermute)
def sum_over_experts(op: Send, sorted_XD: Tensor, place_X: Tensor, weights_Rk: Tensor) -> Tensor:
    """Rows back in order, each the weighted sum of what its experts made of it."""
    out_RD: Tensor = op(sorted_XD, place_X, weights_Rk)
    return out_RD


class ExpertGroup(NamedTuple):
    """Ranks that share the experts evenly: the communicator's name (`get_hccl_comm_name`), and ours among them."""

    communicator: str
    size: int
    rank: int
    num_experts: int


class Dispatched(NamedTuple):
    """Rows that our experts got, how many each, and what sends them back."""

    rows_XD: Tensor
    origin: Tensor
    count_E: Tensor
    receive_counts: Tensor


@adapts(
    "npu_moe_distribute_dispatch_v2",
    limits.npu_moe_distribute_dispatch_v2,
    moe_references.npu_moe_distribute_dispatch_v2,
)
def dispatch(op: Send, x_RD: Tensor, expert_Rk: Tensor, group: ExpertGroup) -> Dispatched:
    """Rows to the ranks of their experts; every rank has the same number of rows."""
    made = op(x_RD, expert_Rk, *group, global_bs=0, expert_token_nums_type=1, quant_mode=0)
    return Dispatched(made[0], made[2], made[3], made[4])


@adapts(
    "npu_moe_distribute_combine_v2",
    limits.npu_moe_distribute_combine_v2,
    moe_references.npu_moe_distribute_combine_v2,
)
def combine(
    op: Send, y_XD: Tensor, expert_Rk: Tensor, weights_Rk: Tensor, sent: Dispatched, group: ExpertGroup
) -> Tensor:
    """Rows back at their ranks, weighted (float32) and summed over experts."""
    out_RD: Tensor = op(y_XD, expert_Rk, sent.origin, sent.receive_counts, weights_Rk, *group, global_bs=0)
    return out_RD
