"""A layer's experts: from its weights to what they add to the residual stream; see `ops.experts`."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, D hidden size, E experts, F width of an expert, X rows of experts

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.layer_config import Mixture, expert_names
from xllm_lab.engine.ops.experts import GroupedLinear, Routes
from xllm_lab.engine.ops.linear import Linear
from xllm_lab.engine.ops.table import Ops
from xllm_lab.engine.workspace import Rows


class Loads(NamedTuple):
    """Whose rows a layer's experts get.

    Attributes:
        num_tokens_1: see `ops.experts.route`.
        count_E: where each expert's number of rows is written.
        are_read: whether somebody reads it.
    """

    num_tokens_1: Tensor | None
    count_E: Tensor
    are_read: bool


class MixtureLayer(NamedTuple):
    """One layer's.

    Attributes:
        router: to a logit for each expert.
        bias_E: see `ops.experts.route`.
        gate_up, down: of the experts.
        shared_gate_up, shared_down: of what every token meets, if there is such.
        mixture: their configuration.
    """

    router: Linear
    bias_E: Tensor | None
    gate_up: GroupedLinear
    down: GroupedLinear
    shared_gate_up: Linear | None
    shared_down: Linear | None
    mixture: Mixture

    def feed(self, normed_TD: Tensor, rows: Rows, loads: Loads, ops: Ops) -> Tensor:
        """What the layer adds, but for other ranks' parts; it may be in `rows.branch_TD`."""
        of_experts = ops.experts
        assert of_experts is not None, "operators of a model without experts"
        self.router(normed_TD, rows.router_TE)
        used = loads.num_tokens_1 if of_experts.skips_padding else None
        routes = Routes(rows.weight_Tk, rows.expert_Tk)
        routes = of_experts.route(rows.router_TE, self.bias_E, self.mixture.routing, used, routes)
        rows_XD, place_X = rows.expert_rows_TkD.flatten(0, 1), rows.place_Tk.flatten()
        there = of_experts.permute(normed_TD, routes.expert_Tk, rows_XD, place_X, loads.count_E)
        if loads.are_read and not of_experts.skips_padding:
            of_experts.count_rows(routes.expert_Tk, loads.num_tokens_1, loads.count_E)
        gate_up_XF2 = self.gate_up(there.rows_XD, there.count_E, rows.expert_gate_up_TkF2.flatten(0, 1))
        gated_XF = ops.swiglu(gate_up_XF2, rows.expert_gated_TkF.flatten(0, 1))
        made_XD = self.down(gated_XF, there.count_E, rows_XD)
        shared_TD = self._shared(normed_TD, rows, ops)
        return of_experts.unpermute(made_XD, there.place_X, routes.weight_Tk, shared_TD, rows.branch_TD)

    def _shared(self, normed_TD: Tensor, rows: Rows, ops: Ops) -> Tensor | None:
        if self.shared_gate_up is None or self.shared_down is None:
            return None
        self.shared_gate_up(normed_TD, rows.shared_gate_up_TF2)
        self.shared_down(ops.swiglu(rows.shared_gate_up_TF2, rows.shared_gated_TF), rows.shared_TD)
        return rows.shared_TD


def take_mixture(take: Callable[[str], Tensor], ops: Ops, mixture: Mixture, architecture: str) -> MixtureLayer:
    """From a layer's weights.

    Args:
        take: gives up a tensor by its name in the layer.
    """
    assert ops.experts is not None, "operators of a model without experts"
    names = expert_names(architecture)
    experts = range(mixture.routing.num_experts)

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
    )
