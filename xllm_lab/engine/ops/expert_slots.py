"""Operators where experts lie in slots of several ranks: which slot computes a token, and what of it is ours.

Every shape follows from the tokens alone. A token that only pads goes to slot S, which is nobody's.
"""

# Shapes: T packed tokens, k experts of a token, X = T k, E experts, C copies of an expert at most, S slots of all
#         ranks, P of this one, D hidden size

from __future__ import annotations

import torch
from torch import Tensor

from xllm_lab.engine.ops.tape import taped


@taped
def assign(expert_Tk: Tensor, slot_EC: Tensor, num_copies_E: Tensor | None, first: int, slot_Tk: Tensor) -> None:
    """The slot of each token's experts. Copies of an expert take turns in order of tokens, so they get as many, or one
    more: whoever knows the tokens knows the slots.

    Args:
        slot_EC: int32, the slots of each expert, and in row E those of nobody.
        num_copies_E: int32, of each expert, 1 of nobody; None: all have one.
        first: the copy whose turn it is first.
        slot_Tk: int32, where to write.
    """
    expert_X = expert_Tk.flatten().long()
    if num_copies_E is None:
        slot_Tk.copy_(slot_EC[:, 0][expert_X].view_as(slot_Tk))
        return
    sorted_X, order_X = expert_X.sort(stable=True)
    turn_X = torch.arange(len(sorted_X), device=sorted_X.device) - torch.searchsorted(sorted_X, sorted_X)
    copy_X = (turn_X + first) % num_copies_E[sorted_X]
    slot_Tk.view(-1).scatter_(0, order_X, slot_EC[sorted_X, copy_X])


@taped
def keep_own(slot_Tk: Tensor, first: int, num_own: int, weight_Tk: Tensor) -> None:
    """Slots of other ranks weigh nothing."""
    weight_Tk.masked_fill_((slot_Tk < first) | (slot_Tk >= first + num_own), 0.0)


@taped
def blank_if_none(rows_XD: Tensor, count_P: Tensor) -> None:
    """Whoever computed no row has a first one of zeros: what others compute reads it, and weighs it with 0."""
    rows_XD[:1].masked_fill_(count_P.sum() == 0, 0.0)


@taped
def put_between(part_ND: Tensor, first: int, around_TD: Tensor | None, out_TD: Tensor) -> None:
    """Some tokens' rows from `first` on, which may lie there already, and what every token has besides, if any."""
    part_ND = part_ND.clone()
    if around_TD is None:
        out_TD.zero_()
    else:
        out_TD.copy_(around_TD)
    out_TD[first : first + len(part_ND)] += part_ND
