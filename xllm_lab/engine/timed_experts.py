"""A layer's experts with their time taken as one operator, and as many of them activated as is asked for."""

# Shapes: T tokens, k experts of a token, E experts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xllm_lab.engine.mixture import Loads, MixtureLayer
from xllm_lab.engine.ops.experts import Routes, Routing
from xllm_lab.engine.ops.table import Ops
from xllm_lab.engine.workspace import Rows


class Activation:
    """How many experts a step's tokens are spread over.

    Attributes:
        num_experts: those of the following steps; None: as the router says.
    """

    def __init__(self) -> None:
        self.num_experts: int | None = None

    def spread(self, routes: Routes, routing: Routing) -> Routes:
        """The tokens in turns over so many experts, which lie evenly among all."""
        if self.num_experts is None:
            return routes
        turn_Tk = torch.arange(routes.expert_Tk.numel(), device=routes.expert_Tk.device).view(routes.expert_Tk.shape)
        expert_Tk = turn_Tk % self.num_experts * routing.num_experts // self.num_experts
        return Routes(routes.weight_Tk, routes.expert_Tk.copy_(expert_Tk))


class TimedMixture:
    """Stands for a `MixtureLayer` in the model.

    Args:
        layer: what it does.
        ops: the operators, of which nobody takes the time inside.
        watched: takes the time of what it is given.
    """

    def __init__(
        self,
        layer: MixtureLayer,
        ops: Ops,
        activation: Activation,
        watched: Callable[[str, Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        of_experts = ops.experts
        assert of_experts is not None, "operators of a model without experts"
        routing = layer.mixture.routing

        def route(*arguments: Any) -> Routes:
            return activation.spread(of_experts.route(*arguments), routing)

        own: Any = of_experts._replace(route=route)
        self._feed, self._ops = watched("mixture", layer.feed), replace(ops, experts=own)

    def feed(self, normed_TD: Tensor, rows: Rows, loads: Loads, ops: Ops) -> Tensor:
        """As `MixtureLayer.feed`."""
        branch_TD: Tensor = self._feed(normed_TD, rows, loads, self._ops)
        return branch_TD
