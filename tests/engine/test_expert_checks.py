"""The validators of experts' and latent attention's operators accept what is right, and find each that is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from xllm_lab.engine.device import open_device
from xllm_lab.engine.ops.check import TOLERANCES, Sizes, check_operators
from xllm_lab.engine.ops.experts import Permuted, Routes, Routing
from xllm_lab.engine.ops.table import OF_EXPERTS, OF_LATENTS, ExpertShape, Ops, choose

CPU = open_device("cpu").torch_device
SOFTMAX = Routing(8, 3, is_normalized=True)
GROUPED = Routing(8, 3, is_sigmoid=True, is_normalized=True, scale=2.5, num_groups=4, top_groups=2, group_experts=2)


def made(dtype: torch.dtype, routing: Routing, without: tuple[str, ...] = ()) -> tuple[Ops, Sizes]:
    sizes = Sizes(6, 1, 48, 64, 16, ExpertShape(routing, 64, 32))
    ops = choose(
        *(CPU, dtype), head_dim=48, hidden_size=64, expert_shape=sizes.expert_shape, is_latent=True, without=without
    )
    return ops, sizes


def failing(ops: Ops, sizes: Sizes, dtype: torch.dtype = torch.float32) -> list[str]:
    found = list(check_operators(ops, sizes, dtype, CPU))
    assert {*OF_EXPERTS, *OF_LATENTS} <= {check.op for check in found}
    return [check.op for check in found if not check.passed]


@pytest.mark.parametrize("routing", [SOFTMAX, GROUPED])
@pytest.mark.parametrize("without", [(), ("native",), ("native", "grouped_mm")])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_operator_here_is_right(dtype: torch.dtype, without: tuple[str, ...], routing: Routing) -> None:
    assert failing(*made(dtype, routing, without), dtype) == []


class _Idle:
    """A product that leaves its output as it was."""

    kind = "idle"

    def __call__(self, x_XI: torch.Tensor, count_E: torch.Tensor, out_XO: torch.Tensor) -> torch.Tensor:
        return out_XO


BROKEN: dict[str, Callable[..., Any]] = {
    "route": lambda logits_TE, *_: Routes(*(torch.zeros(len(logits_TE), 3, dtype=t) for t in (torch.float, torch.int))),
    "permute": lambda x_TD, expert_Tk, rows_XD, place_X, count_E: Permuted(rows_XD.zero_(), place_X, count_E.zero_()),
    "grouped_matmul": lambda weight_EOI: _Idle(),
    "unpermute": lambda *args: args[-1],
    **dict.fromkeys(OF_LATENTS, lambda *_: None),
}


@pytest.mark.parametrize("op", [*OF_EXPERTS, *OF_LATENTS])
def test_one_that_does_nothing_is_found(op: str) -> None:
    ops, sizes = made(torch.float32, GROUPED)
    assert ops.experts is not None
    assert ops.latents is not None
    own: dict[str, Any] = {op: BROKEN[op]}
    if op in OF_EXPERTS:
        changed = replace(ops, experts=ops.experts._replace(**own))
    else:
        changed = replace(ops, latents=ops.latents._replace(**own))
    assert failing(changed, sizes) == [op]


def test_a_bias_that_is_forgotten_is_found() -> None:
    """It changes who is chosen, and nothing else."""
    ops, sizes = made(torch.float32, GROUPED)
    of_experts = ops.experts
    assert of_experts is not None

    def forgets(*arguments: Any) -> Routes:
        return of_experts.route(arguments[0], None, *arguments[2:])

    assert failing(replace(ops, experts=of_experts._replace(route=forgets)), sizes) == ["route"]
