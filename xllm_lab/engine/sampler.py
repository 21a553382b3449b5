"""Drawing the next token from logits."""

# Shapes: R rows, V vocabulary, C candidates of one row

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xllm_lab.engine.ops.reference import argmax
from xllm_lab.workload import RequestId, Sampling


def sample(
    logits_RV: Tensor,
    params: Sequence[Sampling],
    ids: Sequence[RequestId],
    positions: Sequence[int],
    *,
    argmax: Callable[[Tensor], list[int]] = argmax,
) -> list[int]:
    """One token a row.

    Greedy rows take the largest logit, the smallest id among equals. The draw of any other row is a function of its
    logits and (seed, request id, output position): the rest of the batch cannot move it.

    Args:
        logits_RV: float32.
        params, ids, positions: for each row, how to draw, whose it is, and which output token it becomes (0 first).
        argmax: the operator of `ops`.
    """
    assert len(logits_RV) == len(params) == len(ids) == len(positions)
    tokens = argmax(logits_RV)
    for row, sampling in enumerate(params):
        if sampling.temperature > 0:
            tokens[row] = draw(logits_RV[row], sampling, ids[row], positions[row])
    return tokens


def draw(logits_V: Tensor, sampling: Sampling, id: RequestId, position: int) -> int:
    """The token of one row that is not greedy; arguments as `sample`."""
    return draw_from(target(logits_V, sampling), np.random.default_rng((sampling.seed, id, position)).random())


class Target(NamedTuple):
    """What a row that is not greedy is drawn from: its logits after temperature, top_k and top_p.

    Attributes:
        ids: the tokens that can be drawn, shape [C].
        probabilities: of each, float64, shape [C].
        cumulated: their sums up to each. The last may be less than 1: it is what top_p left.
    """

    ids: Tensor
    probabilities: Tensor
    cumulated: Tensor

    def dense(self, vocab_size: int) -> Tensor:
        """Probabilities of all tokens, which sum to 1, float64, shape [V]."""
        probabilities_V = self.probabilities.new_zeros(vocab_size)
        probabilities_V[self.ids] = self.probabilities / self.cumulated[-1]
        return probabilities_V


def target(logits_V: Tensor, sampling: Sampling) -> Target:
    """The distribution of a row that is not greedy."""
    ids_C = _candidates(logits_V, sampling.top_k, wants_order=sampling.top_p < 1)
    probabilities_C = torch.softmax(logits_V[ids_C].double() / sampling.temperature, -1)
    cumulated_C = probabilities_C.cumsum(-1)
    if sampling.top_p < 1:
        # The smallest set that reaches top_p: everything up to the first candidate at which the sum gets there.
        kept = int(torch.searchsorted(cumulated_C, sampling.top_p)) + 1
        return Target(ids_C[:kept], probabilities_C[:kept], cumulated_C[:kept])
    return Target(ids_C, probabilities_C, cumulated_C)


def draw_from(target: Target, uniform: float) -> int:
    """Inverse transform: the first candidate whose cumulated probability exceeds a number in [0, 1)."""
    index = int(torch.searchsorted(target.cumulated, uniform * target.cumulated[-1], right=True))
    return int(target.ids[min(index, len(target.cumulated) - 1)])


def _candidates(logits_V: Tensor, top_k: int, *, wants_order: bool) -> Tensor:
    """Ids of the `top_k` largest logits (0: of all), the largest first if they are cut or `wants_order`.

    Equal logits are ordered by id, so that the same ids are kept on every device.
    """
    if 0 < top_k < len(logits_V):
        smallest_kept = logits_V.topk(top_k).values[-1]
        ids_C = (logits_V >= smallest_kept).nonzero().squeeze(-1)
        return ids_C[logits_V[ids_C].argsort(descending=True, stable=True)][:top_k]
    if wants_order:
        return logits_V.argsort(descending=True, stable=True)
    return torch.arange(len(logits_V), device=logits_V.device)
