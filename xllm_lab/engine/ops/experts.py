"""Operators of a mixture of experts in plain PyTorch: who computes a token, the way there, the products, the way back.

    route      logits of T tokens         -> k experts of each token, and their weights
    permute    T rows                     -> X = T k rows, those of expert 0 first, and how many each expert has
    matmul     X rows, E weight matrices  -> X rows, each by its own expert's matrix
    unpermute  X rows                     -> T rows: of each token's k the weighted sum

Every shape follows from T alone, so that a step can be captured; how many rows an expert has is data on the device.
Tokens that only pad a step are nobody's: their expert is E, which sorts them behind all others, and their weight is 0.
"""

# ruff: noqa: N815, PLR0917  (shapes live in the names of fields, too; operators have many operands)
# Shapes: T packed tokens, k experts of a token, X = T k, E experts, G groups of experts, D any last dimension,
#         I inputs, O outputs of an expert's matrix

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from xllm_lab.engine.ops.linear import Linear, TorchLinear
from xllm_lab.engine.ops.tape import taped

_LEAST_SUM = 1e-20  # added to a sum of weights before it divides, as DeepSeek-V3's own code does


class Routing(NamedTuple):
    """How a router's logits become experts and weights.

    Attributes:
        num_experts: E.
        top_k: k.
        is_sigmoid: each expert's score is the sigmoid of its logit; else the softmax over all experts.
        is_normalized: the weights of a token's experts are divided by their sum.
        scale: multiplies the weights in the end.
        num_groups: groups of neighbouring experts that compete first; 1: they do not.
        top_groups: of them, only the experts of so many can be chosen.
        group_experts: a group's score is the sum of so many of its best experts' (DeepSeek-V2: 1, V3: 2).
    """

    num_experts: int
    top_k: int
    is_sigmoid: bool = False
    is_normalized: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_experts: int = 1


class Routes(NamedTuple):
    """Of each token.

    Attributes:
        weight_Tk: float32.
        expert_Tk: int32.
    """

    weight_Tk: Tensor
    expert_Tk: Tensor


class Permuted(NamedTuple):
    """Rows in the order of their experts.

    Attributes:
        rows_XD: the experts' rows, and behind them those that only pad.
        place_X: int32, where in `rows_XD` the row of (token, choice) is, token by token.
        count_E: int64, rows of each expert.
    """

    rows_XD: Tensor
    place_X: Tensor
    count_E: Tensor


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    routing: Routing,
    num_tokens_1: Tensor | None,
    out: Routes,
) -> Routes:
    """The experts of each token and their weights, in no order.

    DeepSeek-V2 (arXiv 2405.04434, section 2.2), DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).

    Args:
        logits_TE: float32.
        bias_E: float32, added to the scores by which experts are chosen, but not to their weights.
        num_tokens_1: tokens that count, int32, on the device; those behind them pad. None: all do.
        out: where to write.
    """
    weight_Tk, expert_Tk = out
    score_TE = logits_TE.sigmoid() if routing.is_sigmoid else logits_TE.softmax(-1)
    chosen_TE = score_TE if bias_E is None else score_TE + bias_E
    if routing.top_groups < routing.num_groups:
        chosen_TGe = chosen_TE.view(len(chosen_TE), routing.num_groups, -1)
        group_TG = chosen_TGe.topk(routing.group_experts, -1).values.sum(-1)
        best_Tg = group_TG.topk(routing.top_groups, -1).indices
        is_out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, best_Tg, 0)
        chosen_TE = chosen_TGe.masked_fill(is_out_TG.unsqueeze(-1), float("-inf")).flatten(1)
    index_Tk = chosen_TE.topk(routing.top_k, -1).indices
    gathered_Tk = score_TE.gather(1, index_Tk)
    if routing.is_normalized:
        gathered_Tk /= gathered_Tk.sum(-1, keepdim=True) + _LEAST_SUM
    torch.mul(gathered_Tk, routing.scale, out=weight_Tk)
    expert_Tk.copy_(index_Tk)
    if num_tokens_1 is not None:
        pads_T1 = (torch.arange(len(expert_Tk), device=expert_Tk.device) >= num_tokens_1).unsqueeze(1)
        expert_Tk.masked_fill_(pads_T1, routing.num_experts)
        weight_Tk.masked_fill_(pads_T1, 0.0)
    return out


def permute(x_TD: Tensor, expert_Tk: Tensor, rows_XD: Tensor, place_X: Tensor, count_E: Tensor) -> Permuted:
    """Each token's row once for each of its experts, sorted by expert; those of one expert in order of tokens.

    Args:
        rows_XD, place_X, count_E: where to write.
    """
    num_experts, top_k = len(count_E), expert_Tk.shape[1]
    sorted_X, order_X = expert_Tk.flatten().sort(stable=True)
    torch.index_select(x_TD, 0, order_X // top_k, out=rows_XD)
    place_X.scatter_(0, order_X, torch.arange(len(place_X), dtype=place_X.dtype, device=place_X.device))
    # Behind the last expert's rows a product may leave anything: what pads reads the first row, and weighs it with 0.
    place_X.masked_fill_(expert_Tk.flatten() == num_experts, 0)
    starts_E1 = torch.searchsorted(sorted_X, torch.arange(num_experts + 1, dtype=sorted_X.dtype, device=x_TD.device))
    torch.sub(starts_E1[1:], starts_E1[:-1], out=count_E)
    return Permuted(rows_XD, place_X, count_E)


def permute_own(
    x_TD: Tensor, slot_Tk: Tensor, rows_XD: Tensor, place_X: Tensor, count_P: Tensor, first: int, num_slots: int
) -> Permuted:
    """`permute` to some of the slots that experts are in: all others are nobody's.

    Args:
        slot_Tk: int32; those from `first` on, as many as `count_P` has, of `num_slots` are meant.
    """
    own_Tk = slot_Tk - first
    own_Tk.masked_fill_((own_Tk < 0) | (own_Tk > len(count_P)), len(count_P))
    return permute(x_TD, own_Tk, rows_XD, place_X, count_P)


def count_rows(expert_Tk: Tensor, num_tokens_1: Tensor | None, count_E: Tensor) -> None:
    """Rows of each expert, where tokens that only pad are routed like any other: without those.

    Args:
        expert_Tk, num_tokens_1: see `route`.
        count_E: where to write.
    """
    num_experts, (T, k) = len(count_E), expert_Tk.shape
    counted_Tk = expert_Tk.long()
    if num_tokens_1 is not None:
        pads_T1 = (torch.arange(T, device=expert_Tk.device) >= num_tokens_1).unsqueeze(1)
        counted_Tk = counted_Tk.masked_fill(pads_T1, num_experts)
    with_nobody_e = count_E.new_zeros(num_experts + 1)
    with_nobody_e.scatter_add_(0, counted_Tk.flatten(), count_E.new_ones(T * k))
    count_E.copy_(with_nobody_e[:num_experts])


def unpermute(rows_XD: Tensor, place_X: Tensor, weight_Tk: Tensor, shared_TD: Tensor | None, out_TD: Tensor) -> Tensor:
    """Of each token the sum over its experts of weight times row, and what it got besides.

    Args:
        shared_TD: of experts that every token meets; None: there are none.
    """
    T, k = weight_Tk.shape
    rows_TkD = rows_XD.index_select(0, place_X).view(T, k, -1)
    weight_T1k = weight_Tk.to(rows_XD.dtype).unsqueeze(1)
    torch.bmm(weight_T1k, rows_TkD, out=out_TD.unsqueeze(1))
    return out_TD if shared_TD is None else out_TD.add_(shared_TD)


class Exchange(Protocol):
    """Rows to the ranks of their slots' experts, and back as sums, without a look of the host: a graph can hold it.

    Attributes:
        most_rows: of a rank, that it takes.
    """

    most_rows: int

    def __call__(
        self,
        x_RD: Tensor,
        slot_Rk: Tensor,
        weight_Rk: Tensor,
        num_slots: int,
        compute: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of each row's experts, and how many rows our slots had, shape [P].

        Args:
            x_RD: as many rows on every rank.
            slot_Rk: int32.
            weight_Rk: float32.
            num_slots: of all ranks.
            compute: our experts, of rows in their order, so many each.
        """
        ...


class GroupedLinear(Protocol):
    """`y = x W_e'` with the weights of each row's expert, over weights that it has taken over.

    Attributes:
        kind: what serves it, for the manifest.
    """

    kind: str

    def __call__(self, x_XI: Tensor, count_E: Tensor, out_XO: Tensor) -> Tensor:
        """Where y is, perhaps in `out_XO`: of the first `count_E[0]` rows by expert 0, and so on.

        Rows behind the last expert's are anything.
        """
        ...

    def weight(self, expert: int) -> Tensor:
        """A copy of an expert's plain weights, shape [O, I]."""
        ...

    def prepared(self, weight_OI: Tensor) -> Any:
        """An expert's weights as `put` wants them, in memory of their own; nothing else changes."""
        ...

    def put(self, expert: int, prepared: Any) -> None:
        """An expert has other weights from the next call on, in captured steps, too."""
        ...


class EachLinear:
    """A layer for each expert, called for those that have rows. The host reads the counts: no driver can capture it.

    Args:
        make: the layer over an expert's weights, which it takes over.
        kind: what serves these.
    """

    def __init__(self, weight_EOI: Tensor, make: Callable[[Tensor], Linear], kind: str) -> None:
        self._linears, self._make, self.kind = [make(weight_OI) for weight_OI in weight_EOI], make, kind
        self._shape_OI, self._dtype, self._device = weight_EOI.shape[1:], weight_EOI.dtype, weight_EOI.device

    @taped
    def __call__(self, x_XI: Tensor, count_E: Tensor, out_XO: Tensor) -> Tensor:
        start = 0
        for expert, count in enumerate(count_E.tolist()):
            if count:
                self._linears[expert](x_XI[start : start + count], out_XO[start : start + count])
                start += count
        return out_XO

    def weight(self, expert: int) -> Tensor:
        """As `GroupedLinear.weight`."""
        weight_OI = torch.empty(self._shape_OI, dtype=self._dtype, device=self._device)
        self._linears[expert].rows(torch.arange(len(weight_OI), device=self._device), weight_OI)
        return weight_OI

    def prepared(self, weight_OI: Tensor) -> Linear:
        """As `GroupedLinear.prepared`."""
        return self._make(weight_OI.clone())

    def put(self, expert: int, prepared: Linear) -> None:
        """As `GroupedLinear.put`; nothing is copied."""
        self._linears[expert] = prepared


def loop_linear(weight_EOI: Tensor) -> EachLinear:
    """The reference: one product of PyTorch's an expert."""
    return EachLinear(weight_EOI, TorchLinear, "torch")


class GroupedMmLinear:
    """`torch.nn.functional.grouped_mm`, which reads the counts where they are."""

    kind = "grouped_mm"

    def __init__(self, weight_EOI: Tensor) -> None:
        self._weight_EIO = weight_EOI.transpose(1, 2)

    @taped
    def __call__(self, x_XI: Tensor, count_E: Tensor, out_XO: Tensor) -> Tensor:
        ends_E = count_E.cumsum(0, dtype=torch.int32)
        return out_XO.copy_(F.grouped_mm(x_XI, self._weight_EIO, offs=ends_E))

    def weight(self, expert: int) -> Tensor:
        """As `GroupedLinear.weight`."""
        return self._weight_EIO[expert].T.clone(memory_format=torch.contiguous_format)

    def prepared(self, weight_OI: Tensor) -> Tensor:
        """As `GroupedLinear.prepared`."""
        return weight_OI.clone()

    def put(self, expert: int, prepared: Tensor) -> None:
        """As `GroupedLinear.put`; a copy on the device, in order with its steps."""
        self._weight_EIO[expert].copy_(prepared.T)


_TRIED_COUNTS = (3, 0, 4)


@functools.cache
def grouped_mm_fails(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> str | None:
    """Why torch's grouped product cannot serve matrices of this type and shape here: it refuses, or is wrong."""
    # Small whole numbers, whose sums every type holds: the two may differ by the rounding of the result only.
    weight_EOI = (torch.arange(3 * outputs * inputs, device=device) % 5 - 2).view(3, outputs, inputs).to(dtype)
    x_XI = (torch.arange(sum(_TRIED_COUNTS) * inputs, device=device) % 3 - 1).view(-1, inputs).to(dtype)
    count_E = torch.tensor(_TRIED_COUNTS, device=device)
    found_XO, expected_XO = (x_XI.new_empty(len(x_XI), outputs) for _ in range(2))
    try:
        GroupedMmLinear(weight_EOI)(x_XI, count_E, found_XO)
    except (RuntimeError, AttributeError) as error:  # torch before 2.10 has none
        return f"grouped_mm: {' '.join(str(error).split())[:200]}"
    loop_linear(weight_EOI)(x_XI, count_E, expected_XO)
    if torch.allclose(found_XO.float(), expected_XO.float(), rtol=2e-2, atol=2e-2):
        return None
    return "grouped_mm differs from a product for each expert"
