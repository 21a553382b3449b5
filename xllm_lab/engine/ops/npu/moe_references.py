"""What the operators of mixtures of experts compute, in plain torch; see `references`."""

# ruff: noqa: PLR0917  (signatures are the operators' own)
# Shapes: R rows (tokens), k experts of a row, D hidden size, E experts, X rows times experts

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and experts of each row, the largest first, and the row's place in what the experts get.

    A finished row goes to expert E, which is nobody's.
    """
    weights_Rk, expert_Rk = x.float().softmax(-1).topk(k, -1)
    if finished is not None:
        expert_Rk = expert_Rk.masked_fill(finished.unsqueeze(-1), x.shape[-1])
    rows = weights_Rk.numel() // k
    row_Rk = torch.arange(rows * k, device=x.device).view(k, rows).T.reshape(weights_Rk.shape)
    return weights_Rk.to(x.dtype), expert_Rk.int(), row_Rk.int()


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by expert, where each went (type 0) or came from (type 1), counts, and scales that nobody set."""
    assert (drop_pad_mode, expert_tokens_num_type, quant_mode) == (0, 1, -1), "no reference for this mode"
    top_k, (start, end) = expert_idx.shape[1], active_expert_range or (0, expert_num)
    expert_X = expert_idx.flatten().long()
    is_active_X = (expert_X >= start) & (expert_X < end)
    order_X = torch.where(is_active_X, expert_X, expert_num).argsort(stable=True)
    available = int(is_active_X.sum())
    expanded_XD = torch.zeros(len(expert_X), x.shape[1], dtype=x.dtype, device=x.device)
    expanded_XD[:available] = x[order_X[:available] // top_k]
    row_X = torch.full_like(expert_X, -1)
    if row_idx_type == 0:
        row_X[order_X[:available]] = torch.arange(available, device=x.device)
    else:
        row_X[:available] = order_X[:available]
    count_E = torch.bincount(expert_X[is_active_X] - start, minlength=end - start)
    return expanded_XD, row_X.int(), count_E, torch.zeros(len(expert_X), device=x.device)


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor,
    split_item: int = 0,
    group_type: int = -1,
    group_list_type: int = 0,
) -> list[Tensor]:
    """Each expert's rows times its weight; rows behind the last group are zero."""
    assert (group_type, split_item) in ((0, 2), (0, 3)), "no reference for this mode"
    rows_XD, weight_EIO = x[0], weight[0]
    count_E = group_list if group_list_type == 1 else group_list.diff(prepend=group_list.new_zeros(1))
    out_XO = torch.zeros(len(rows_XD), weight_EIO.shape[2], dtype=rows_XD.dtype, device=rows_XD.device)
    start = 0
    for expert, count in enumerate(count_E.tolist()):
        part = slice(start, start + count)
        out_XO[part] = (rows_XD[part].float() @ weight_EIO[expert].float()).to(rows_XD.dtype)
        start += count
    return [out_XO]


def npu_moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False
) -> Tensor:
    """The sum over a token's experts of probability times row."""
    assert not padded_mode, "no reference for padded mode"
    top_k = 1 if probs is None else probs.shape[1]
    rows_RkD = permuted_tokens[sorted_indices.long()].view(-1, top_k, permuted_tokens.shape[1]).float()
    if probs is not None:
        rows_RkD = rows_RkD * probs.float().unsqueeze(-1)
    return rows_RkD.sum(1).to(permuted_tokens.dtype)


def npu_moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    quant_mode: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a rank that is alone; of several, `dispatched` is the same where their rows meet."""
    assert (ep_world_size, expert_token_nums_type, quant_mode) == (1, 1, 0), "no reference for this mode"
    rows_XD, origin, count_E, receive_counts = dispatched(x.unsqueeze(0), expert_ids.unsqueeze(0), 0, moe_expert_num)
    nothing = torch.zeros(0, device=x.device)
    scales_X = torch.zeros(len(rows_XD), device=x.device)
    return rows_XD, scales_X, origin, count_E, receive_counts, nothing.int(), nothing


def npu_moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    global_bs: int = 0,
) -> Tensor:
    """Of a rank that is alone; of several, `combined` is the same where their rows meet."""
    assert ep_world_size == 1, "several ranks' rows meet in a communicator only"
    return combined([expand_x], [assist_info_for_combine], [ep_send_counts], 0, expert_scales)


def dispatched(x_rRD: Tensor, expert_rRk: Tensor, rank: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one of r ranks gets: rows by expert, then by rank and row they come from.

    Args:
        x_rRD, expert_rRk: of all ranks.

    Returns:
        Rows for our experts, as many as there could be; (rank, row, place among the row's experts) of each, as numbers
        one after another; rows of each of our experts; those by expert and rank they come from, cumulated.
    """
    ranks, rows, top_k = expert_rRk.shape
    own = num_experts // ranks
    expert_X = expert_rRk.flatten().long() - rank * own
    chosen_X = ((expert_X >= 0) & (expert_X < own)).nonzero().flatten()
    chosen_X = chosen_X[expert_X[chosen_X].argsort(stable=True)]
    from_X = chosen_X // (rows * top_k)
    most = ranks * rows * min(own, top_k)
    rows_XD = x_rRD.new_zeros(most, x_rRD.shape[-1])
    rows_XD[: len(chosen_X)] = x_rRD.flatten(0, 1)[chosen_X // top_k]
    origin = torch.zeros(max(rows * top_k, most * 128), dtype=torch.int32, device=x_rRD.device)
    triples_X3 = torch.stack([from_X, chosen_X // top_k % rows, chosen_X % top_k], -1)
    origin[: triples_X3.numel()] = triples_X3.flatten().int()
    count_E = torch.bincount(expert_X[chosen_X], minlength=own)
    received = torch.bincount(expert_X[chosen_X] * ranks + from_X, minlength=own * ranks).cumsum(0)
    return rows_XD, origin, count_E, received.int()


def combined(
    y: Sequence[Tensor], origin: Sequence[Tensor], received: Sequence[Tensor], rank: int, scale_Rk: Tensor
) -> Tensor:
    """One rank's rows again: the sum over a row's experts of scale times what came of it, on whatever rank.

    Args:
        y, origin, received: of all ranks, as `dispatched` returned them.
    """
    out_RD = torch.zeros(len(scale_Rk), y[0].shape[1], device=y[0].device)
    for y_XD, numbers, counts in zip(y, origin, received, strict=True):
        used = int(counts[-1])
        from_X, row_X, place_X = numbers[: 3 * used].view(-1, 3).long().T
        ours = from_X == rank
        scaled_XD = y_XD[:used][ours].float() * scale_Rk[row_X[ours], place_X[ours]].unsqueeze(-1)
        out_RD.index_add_(0, row_X[ours], scaled_XD)
    return out_RD.to(y[0].dtype)
