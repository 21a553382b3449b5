"""The way of tokens to experts on several ranks, and back.

                 every rank has all tokens (tensor parallel)      each has its own (data-parallel attention)
    all-gather   each computes its experts' part of all tokens;   tokens are gathered; each computes its experts' part;
                 the layer's all-reduce adds the parts             parts are added and scattered
    all-to-all   each takes a slice of the tokens; its rows go    each takes its own tokens; likewise
                 to the ranks of their experts and come back;
                 the layer's all-reduce joins the slices

xLLM's dispatch levels 1 and 2. Rows of an all-to-all are as many as the router says: their counts are exchanged first,
and the host waits for them. Where a device has kernels that do all that by themselves, it does not; every rank then
sends as many tokens, and those that pad are counted among the rows that slots computed.
"""

# Shapes: T packed tokens, N of them ours to send, A tokens of all ranks, k experts of a token, X rows that we send, Y
#         that we get, S slots of all ranks, P of this one, n ranks, m most tokens of a rank, D hidden size

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from xllm_lab.engine.expert_parallel import ALL_GATHER, ExpertParallel, LayerSlots
from xllm_lab.engine.ops.collectives import Group
from xllm_lab.engine.ops.expert_slots import blank_if_none, keep_own, put_between
from xllm_lab.engine.ops.experts import Exchange, Routes
from xllm_lab.engine.ops.table import ExpertOps, Ops
from xllm_lab.engine.ops.tape import taped
from xllm_lab.engine.workspace import Rows

if TYPE_CHECKING:
    from xllm_lab.engine.mixture import Loads, MixtureLayer


class Dispatch(Protocol):
    """A layer's way to experts on other ranks."""

    def feed(self, layer: MixtureLayer, normed_TD: Tensor, rows: Rows, loads: Loads, ops: Ops) -> Tensor:
        """As `MixtureLayer.feed`."""
        ...


def dispatch_of(parallel: ExpertParallel) -> Dispatch:
    """The one that was chosen."""
    if parallel.dispatch != ALL_GATHER:
        return AllToAll(parallel.group, slices=not parallel.has_own_tokens)
    return GatheredTokens(parallel.group) if parallel.has_own_tokens else OwnExperts()


class OwnExperts:
    """Every rank has all tokens: what others' experts make of them comes with the all-reduce behind the layer."""

    def feed(self, layer: MixtureLayer, normed_TD: Tensor, rows: Rows, loads: Loads, ops: Ops) -> Tensor:
        """As `MixtureLayer.feed`."""
        routes = layer.route(normed_TD, rows, loads, ops)
        slot_Tk = _slots(layer).assign(routes.expert_Tk, rows.slot_Tk)
        _count(routes.expert_Tk, slot_Tk, loads, _of_experts(ops))
        shared_TD = layer.shared(normed_TD, rows, ops)
        return _own_part(
            layer, normed_TD, Routes(routes.weight_Tk, slot_Tk), shared_TD, rows=rows, loads=loads, ops=ops
        )


class GatheredTokens:
    """Each rank has its own tokens: all get all, and the sum of the parts goes back to whose tokens they are.

    What is routed is gathered and not the routes: one collective there, and one back.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def feed(self, layer: MixtureLayer, normed_TD: Tensor, rows: Rows, loads: Loads, ops: Ops) -> Tensor:
        """As `MixtureLayer.feed`; the result is whole."""
        sizes, (T, D), rank = loads.tokens_of_ranks, normed_TD.shape, self._group.rank
        assert sizes[rank] == T, f"{T} tokens, and {sizes[rank]} were told"
        shared_TD = layer.shared(normed_TD, rows, ops) if T else None
        of_all = loads.rows_of(sum(sizes))
        x_AD = self._gathered(normed_TD, sizes)
        routes = layer.route(x_AD, of_all, loads, ops)
        slot_Ak = _slots(layer).assign(routes.expert_Tk, of_all.slot_Tk)
        start = sum(sizes[:rank])
        _count(routes.expert_Tk[start : start + T], slot_Ak[start : start + T], loads, _of_experts(ops))
        part_AD = _own_part(layer, x_AD, Routes(routes.weight_Tk, slot_Ak), None, rows=of_all, loads=loads, ops=ops)
        parts_nmD = part_AD.new_zeros(len(sizes), max(sizes), D)
        for part_mD, part in zip(parts_nmD, torch.split(part_AD, list(sizes)), strict=True):
            part_mD[: len(part)] = part
        sum_mD = part_AD.new_empty(max(sizes), D)
        self._group.reduce_scatter(parts_nmD, sum_mD)
        rows.branch_TD.copy_(sum_mD[:T])
        return rows.branch_TD if shared_TD is None else rows.branch_TD.add_(shared_TD)

    def _gathered(self, x_TD: Tensor, sizes: Sequence[int]) -> Tensor:
        most, D = max(sizes), x_TD.shape[1]
        x_mD = x_TD.new_zeros(most, D)
        x_mD[: len(x_TD)] = x_TD
        x_nmD = x_TD.new_empty(len(sizes), most, D)
        self._group.all_gather(x_mD, x_nmD)
        return torch.cat([part_mD[:size] for part_mD, size in zip(x_nmD, sizes, strict=True)])


class AllToAll:
    """Rows go to the ranks that compute them, and come back.

    Args:
        slices: every rank has all tokens, and sends a slice of them; else all that it has.
    """

    def __init__(self, group: Group, *, slices: bool) -> None:
        self._group, self._slices = group, slices

    def feed(self, layer: MixtureLayer, normed_TD: Tensor, rows: Rows, loads: Loads, ops: Ops) -> Tensor:
        """As `MixtureLayer.feed`; the result is whole where each rank has its own tokens."""
        of_experts, most = _of_experts(ops), self._most(len(normed_TD), loads)
        fused = of_experts.exchange if of_experts.exchange and most <= of_experts.exchange.most_rows else None
        if not len(normed_TD):
            return self._nothing(layer, rows, loads, ops, fused=fused, most=most)
        routes = layer.route(normed_TD, rows, loads, ops)
        slot_Tk = _slots(layer).assign(routes.expert_Tk, rows.slot_Tk)
        _count(routes.expert_Tk, slot_Tk, loads, of_experts)
        shared_TD = layer.shared(normed_TD, rows, ops)
        first, end = self._ours(len(normed_TD))
        if fused is not None:
            ours = normed_TD[first:end], Routes(routes.weight_Tk[first:end], slot_Tk[first:end])
            part_ND = self._fused(fused, layer, *ours, most=most, loads=loads, ops=ops)
            return _joined(part_ND, first, shared_TD, rows.branch_TD)
        rows_XD, place_X = rows.expert_rows_TkD[first:end].flatten(0, 1), rows.place_Tk[first:end].flatten()
        count_S = torch.zeros(len(_slots(layer).slots), dtype=torch.int64, device=normed_TD.device)
        if end > first:
            there = of_experts.permute(normed_TD[first:end], slot_Tk[first:end], rows_XD, place_X, count_S)
            rows_XD, place_X, count_S = there
        self._exchange(layer, rows_XD, count_S, loads, ops)
        part_ND = rows.branch_TD[first:end]
        if end > first:
            part_ND = of_experts.unpermute(rows_XD, place_X, routes.weight_Tk[first:end], None, part_ND)
        return _joined(part_ND, first, shared_TD, rows.branch_TD)

    def _nothing(
        self, layer: MixtureLayer, rows: Rows, loads: Loads, ops: Ops, *, fused: Exchange | None, most: int
    ) -> Tensor:
        """Others have tokens."""
        loads.count_E.zero_()
        loads.slot_rows_S.zero_()
        if fused is not None:
            nobody = Routes(rows.weight_Tk, rows.slot_Tk)
            self._fused(fused, layer, rows.branch_TD, nobody, most=most, loads=loads, ops=ops)
            return rows.branch_TD
        self._exchange(layer, rows.expert_rows_TkD.flatten(0, 1), torch.zeros_like(loads.slot_rows_S), loads, ops)
        return rows.branch_TD

    def _ours(self, num_tokens: int) -> tuple[int, int]:
        if not self._slices:
            return 0, num_tokens
        share = -(-num_tokens // self._group.size)
        first = min(self._group.rank * share, num_tokens)
        return first, min(first + share, num_tokens)

    def _most(self, num_tokens: int, loads: Loads) -> int:
        """Tokens that a rank sends at most."""
        return -(-num_tokens // self._group.size) if self._slices else max(loads.tokens_of_ranks, default=0)

    def _fused(
        self,
        exchange: Exchange,
        layer: MixtureLayer,
        x_ND: Tensor,
        routes: Routes,
        *,
        most: int,
        loads: Loads,
        ops: Ops,
    ) -> Tensor:
        """In the device's own kernels, for which every rank has as many rows: those that pad go anywhere."""
        N, (weight_Nk, slot_Nk) = len(x_ND), routes
        if most > N:
            k, padding = slot_Nk.shape[1], most - N
            x_ND = torch.cat([x_ND, x_ND.new_zeros(padding, x_ND.shape[1])])
            anywhere_Rk = torch.arange(k, dtype=slot_Nk.dtype, device=slot_Nk.device).expand(padding, k)
            slot_Nk = torch.cat([slot_Nk, anywhere_Rk])
            weight_Nk = torch.cat([weight_Nk, weight_Nk.new_zeros(padding, k)])
        width = layer.mixture.intermediate_size

        def compute(rows_XD: Tensor, count_P: Tensor) -> Tensor:
            X = len(rows_XD)
            return layer.compute(rows_XD, count_P, rows_XD.new_empty(X, 2 * width), rows_XD.new_empty(X, width), ops)

        num_slots = len(_slots(layer).slots)
        made_RD, count_P = exchange(x_ND.contiguous(), slot_Nk.contiguous(), weight_Nk.float(), num_slots, compute)
        loads.own_rows_P.copy_(count_P)
        return made_RD[:N]

    @taped
    def _exchange(self, layer: MixtureLayer, rows_XD: Tensor, count_S: Tensor, loads: Loads, ops: Ops) -> None:
        """The first rows are replaced by what their slots' experts make of them."""
        n, P = self._group.size, _slots(layer).num_own
        coming_S = torch.empty_like(count_S)
        self._group.all_to_all(count_S, coming_S, [P] * n, [P] * n)
        sent, received = (torch.stack([count_S, coming_S]).view(2, n, P).sum(2)).tolist()
        coming_nP, out_XD = coming_S.view(n, P), rows_XD[: sum(sent)]
        came_YD = rows_XD.new_empty(sum(received), rows_XD.shape[1])
        self._group.all_to_all(out_XD, came_YD, sent, received)
        loads.own_rows_P.copy_(coming_nP.sum(0))
        if len(came_YD):
            came_YD = _computed(layer, came_YD, coming_nP, ops)
        self._group.all_to_all(came_YD, out_XD, received, sent)


def _computed(layer: MixtureLayer, came_YD: Tensor, coming_nP: Tensor, ops: Ops) -> Tensor:
    """Of rows that came rank by rank, each rank's in order of slots."""
    of_experts, (n, P), Y = _of_experts(ops), coming_nP.shape, len(came_YD)
    slot_P = torch.arange(P, dtype=torch.int32, device=came_YD.device)
    slot_Y1 = slot_P.repeat(n).repeat_interleave(coming_nP.flatten(), output_size=Y).unsqueeze(1)
    place_Y = torch.empty(Y, dtype=torch.int32, device=came_YD.device)
    count_P = torch.empty(P, dtype=torch.int64, device=came_YD.device)
    there = of_experts.permute(came_YD, slot_Y1, torch.empty_like(came_YD), place_Y, count_P)
    width = layer.mixture.intermediate_size
    made_YD = layer.compute(
        there.rows_XD, there.count_E, came_YD.new_empty(Y, 2 * width), came_YD.new_empty(Y, width), ops
    )
    return made_YD[there.place_X.long()]


def _own_part(
    layer: MixtureLayer,
    x_TD: Tensor,
    routes: Routes,
    shared_TD: Tensor | None,
    *,
    rows: Rows,
    loads: Loads,
    ops: Ops,
) -> Tensor:
    """What our slots make of the tokens. Args: `routes` has slots for experts; weights of others' are lost."""
    slots, of_experts = _slots(layer), _of_experts(ops)
    weight_Tk, slot_Tk = routes
    keep_own(slot_Tk, slots.first, slots.num_own, weight_Tk)
    rows_XD, place_X = rows.expert_rows_TkD.flatten(0, 1), rows.place_Tk.flatten()
    there = of_experts.permute_own(x_TD, slot_Tk, rows_XD, place_X, loads.own_rows_P, slots.first, len(slots.slots))
    if there.count_E is not loads.own_rows_P:
        _copy(there.count_E, loads.own_rows_P)
    gate_up_XF2, gated_XF = rows.expert_gate_up_TkF2.flatten(0, 1), rows.expert_gated_TkF.flatten(0, 1)
    made_XD = layer.compute(there.rows_XD, there.count_E, gate_up_XF2, gated_XF, ops)
    blank_if_none(made_XD, there.count_E)
    return of_experts.unpermute(made_XD, there.place_X, weight_Tk, shared_TD, rows.branch_TD)


def _joined(part_ND: Tensor, first: int, shared_TD: Tensor | None, branch_TD: Tensor) -> Tensor:
    """The slice among what every token gets besides; it may lie where it goes."""
    if len(part_ND) == len(branch_TD):
        return part_ND if shared_TD is None else _add(part_ND, shared_TD)
    put_between(part_ND, first, shared_TD, branch_TD)
    return branch_TD


def _count(expert_Tk: Tensor, slot_Tk: Tensor, loads: Loads, of_experts: ExpertOps) -> None:
    if loads.are_read:
        of_experts.count_rows(expert_Tk, loads.num_tokens_1, loads.count_E)
        of_experts.count_rows(slot_Tk, loads.num_tokens_1, loads.slot_rows_S)


def _slots(layer: MixtureLayer) -> LayerSlots:
    assert layer.slots is not None, "experts that are all here"
    return layer.slots


def _of_experts(ops: Ops) -> ExpertOps:
    assert ops.experts is not None, "operators of a model without experts"
    return ops.experts


_copy: Callable[[Tensor, Tensor], object] = taped(lambda source, to: to.copy_(source))
_add: Callable[[Tensor, Tensor], Tensor] = taped(lambda part_TD, other_TD: part_TD.add_(other_TD))
