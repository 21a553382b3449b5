"""A layer's experts: from its weights to what they add to the residual stream; see `ops.experts`."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, D hidden size, E experts, F width of an expert, X rows of experts, S slots of all ranks, P of
#         this one

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.expert_dispatch import Dispatch, dispatch_of
from xllm_lab.engine.expert_parallel import ALL_TO_ALL, ExpertParallel, LayerSlots
from xllm_lab.engine.layer_config import Mixture, expert_names
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops.experts import GroupedLinear, Routes
from xllm_lab.engine.ops.linear import Linear
from xllm_lab.engine.ops.table import Ops
from xllm_lab.engine.workspace import Rows, Workspace


class Loads(NamedTuple):
    """Whose rows a layer's experts get.

    Attributes:
        num_tokens_1: see `ops.experts.route`.
        count_E: where each expert's number of rows is written.
        are_read: whether somebody reads it.
        slot_rows_S, own_rows_P, tokens_of_ranks: see `Workspace`.
        rows_of: the workspace of so many tokens.
    """

    num_tokens_1: Tensor | None
    count_E: Tensor
    are_read: bool
    slot_rows_S: Tensor
    own_rows_P: Tensor
    tokens_of_ranks: Sequence[int]
    rows_of: Callable[[int], Rows]


def loads_of(workspace: Workspace, layer: int, num_tokens_1: Tensor | None) -> Loads:
    """Of a layer by its number, in the step at hand."""
    w = workspace
    counted = w.expert_rows_LE[layer], w.counts_experts, w.slot_rows_LS[layer], w.own_rows_LP[layer]
    return Loads(num_tokens_1, *counted, w.tokens_of_ranks, w.rows)


class MixtureLayer(NamedTuple):
    """One layer's.

    Attributes:
        router: to a logit for each expert.
        bias_E: see `ops.experts.route`.
        gate_up, down: of the experts; with expert parallelism, of those in this rank's slots.
        shared_gate_up, shared_down: of what every token meets, if there is such.
        mixture: their configuration.
        slots: where experts are if they lie on several ranks, and
        dispatch: the way there; None: all are here.
    """

    router: Linear
    bias_E: Tensor | None
    gate_up: GroupedLinear
    down: GroupedLinear
    shared_gate_up: Linear | None
    shared_down: Linear | None
    mixture: Mixture
    slots: LayerSlots | None = None
    dispatch: Dispatch | None = None

    def feed(self, normed_TD: Tensor, rows: Rows, loads: Loads, ops: Ops) -> Tensor:
        """What the layer adds, but for other ranks' parts; it may be in `rows.branch_TD`."""
        if self.dispatch is not None:
            return self.dispatch.feed(self, normed_TD, rows, loads, ops)
        of_experts = ops.experts
        assert of_experts is not None, "operators of a model without experts"
        routes = self.route(normed_TD, rows, loads, ops)
        rows_XD, place_X = rows.expert_rows_TkD.flatten(0, 1), rows.place_Tk.flatten()
        there = of_experts.permute(normed_TD, routes.expert_Tk, rows_XD, place_X, loads.count_E)
        if loads.are_read and not of_experts.skips_padding:
            of_experts.count_rows(routes.expert_Tk, loads.num_tokens_1, loads.count_E)
        gate_up_XF2, gated_XF = rows.expert_gate_up_TkF2.flatten(0, 1), rows.expert_gated_TkF.flatten(0, 1)
        made_XD = self.compute(there.rows_XD, there.count_E, gate_up_XF2, gated_XF, ops)
        shared_TD = self.shared(normed_TD, rows, ops)
        return of_experts.unpermute(made_XD, there.place_X, routes.weight_Tk, shared_TD, rows.branch_TD)

    def route(self, normed_TD: Tensor, rows: Rows, loads: Loads, ops: Ops) -> Routes:
        """The experts of each token; what pads has none where the operators can skip it."""
        assert ops.experts is not None, "operators of a model without experts"
        self.router(normed_TD, rows.router_TE)
        used = loads.num_tokens_1 if ops.experts.skips_padding else None
        out = Routes(rows.weight_Tk, rows.expert_Tk)
        return ops.experts.route(rows.router_TE, self.bias_E, self.mixture.routing, used, out)

    def compute(self, rows_XD: Tensor, count_E: Tensor, gate_up_XF2: Tensor, gated_XF: Tensor, ops: Ops) -> Tensor:
        """Rows in order of experts, through theirs; the result may lie where they were.

        Args:
            gate_up_XF2, gated_XF: memory on the way.
        """
        gate_up_XF2 = self.gate_up(rows_XD, count_E, gate_up_XF2)
        gated_XF = ops.swiglu(gate_up_XF2, gated_XF)
        return self.down(gated_XF, count_E, rows_XD)

    def shared(self, normed_TD: Tensor, rows: Rows, ops: Ops) -> Tensor | None:
        """What every token gets besides, if there is such."""
        if self.shared_gate_up is None or self.shared_down is None:
            return None
        self.shared_gate_up(normed_TD, rows.shared_gate_up_TF2)
        self.shared_down(ops.swiglu(rows.shared_gate_up_TF2, rows.shared_gated_TF), rows.shared_TD)
        return rows.shared_TD


def take_mixture(
    take: Callable[[str], Tensor],
    ops: Ops,
    config: ModelConfig,
    *,
    device: torch.device,
    parallel: ExpertParallel | None = None,
) -> MixtureLayer:
    """From a layer's weights.

    Args:
        take: gives up a tensor by its name in the layer.
        parallel: ranks that share the experts; None: all are here.
    """
    assert ops.experts is not None, "operators of a model without experts"
    assert config.mixture is not None, "a model without experts"
    names, mixture = expert_names(config.architecture), config.mixture
    num_experts = mixture.routing.num_experts
    experts: Sequence[int] = range(num_experts)
    slots, dispatch = None, None
    if parallel is not None:
        # Where ranks have tokens of their own, the first copies would all be on the same rank.
        turn = parallel.group.rank if parallel.has_own_tokens and parallel.dispatch == ALL_TO_ALL else 0
        slots, dispatch = LayerSlots(num_experts, parallel.share, device, turn), dispatch_of(parallel)
        experts = slots.own

    def stacked(*parts: str) -> GroupedLinear:
        assert ops.experts is not None
        each = (torch.cat([take(f"{names.block}.experts.{e}.{part}.weight") for part in parts]) for e in experts)
        return ops.experts.grouped_matmul(torch.stack(list(each)))

    shared_gate_up, shared_down = None, None
    if mixture.shared_size:
        shared = f"{names.block}.shared_experts."
        shared_gate_up = ops.linear(torch.cat([take(f"{shared}{part}_proj.weight") for part in ("gate", "up")]))
        shared_down = ops.linear(take(shared + "down_proj.weight"))
    return MixtureLayer(
        router=ops.linear(take(f"{names.block}.gate.weight")),
        bias_E=take(f"{names.block}.gate.e_score_correction_bias") if mixture.has_bias else None,
        gate_up=stacked(names.gate, names.up),
        down=stacked(names.down),
        shared_gate_up=shared_gate_up,
        shared_down=shared_down,
        mixture=mixture,
        slots=slots,
        dispatch=dispatch,
    )
