"""What the model keeps of its drafts: the tokens are distributed as without them, and mostly the same.

A step computes `1 + d` rows for a request with d drafts: the logits behind its last known token, which judge the first
draft, and those behind each draft, which judge the next one. A draft is kept if all before it were, and

- in a greedy request, if it has the largest logit;
- if nobody drew it (`proposal` is None), if it is what its row draws anyway, by the sampler's own key. The tokens are
  those of plain decoding, whatever is drafted and however deep. A draft x is kept with probability p(x), as much as by
  rejection sampling, to which such a proposal is certain of x;
- if it was drawn from a distribution q, with probability min(1, p(x) / q(x)). In place of the first that is not kept, a
  token is drawn from max(p - q, 0), normalised (Leviathan et al., "Fast Inference from Transformers via Speculative
  Decoding", ICML 2023, appendix A.1; xLLM's rejection sampler does the same). Tokens are distributed as p, but which
  ones they are depends on what was drafted.

p is what the sampler draws from, after temperature, top_k and top_p. Every number drawn is a function of seed, request,
output position and purpose: neither the rest of the batch nor drafts that were dropped move it.
"""

# Shapes: R rows, V vocabulary, D drafts of a request, C tokens that can be drawn

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from xllm_lab.engine.ops.reference import argmax
from xllm_lab.engine.sampler import Target, draw, draw_from, target
from xllm_lab.workload import RequestId, Sampling

# A fourth word of the key; the sampler's has three, which is as if it were 0.
_JUDGE, _DRAFT = 1, 2


class Row(NamedTuple):
    """One request of a step: `1 + len(drafts)` rows of its logits.

    Attributes:
        position: which output token the first row draws, 0 first.
        drafts: none for a request that does not speculate.
        proposal: what each draft was drawn from, shape [D, V]; None if they were not drawn. Greedy requests ignore it.
    """

    sampling: Sampling
    id: RequestId
    position: int
    drafts: Sequence[int] = ()
    proposal: Tensor | None = None


def verify(
    logits_RV: Tensor, rows: Sequence[Row], *, argmax: Callable[[Tensor], list[int]] = argmax
) -> list[list[int]]:
    """The next tokens of each request, at least 1: the drafts that are kept, and one that is drawn behind them.

    Args:
        logits_RV: float32; for each request in turn a row more than it has drafts.
        argmax: the operator of `ops`; called once.
    """
    assert len(logits_RV) == sum(1 + len(row.drafts) for row in rows)
    largest = argmax(logits_RV)
    tokens, start = [], 0
    for row in rows:
        end = start + 1 + len(row.drafts)
        if row.sampling.temperature == 0:
            drawn: Callable[[int], int] = largest[start:end].__getitem__
        else:
            drawn = partial(_draw if row.proposal is None else _judge, logits_RV[start:end], row)
        tokens.append(_kept(row.drafts, drawn))
        start = end
    return tokens


def draw_draft(logits_V: Tensor, sampling: Sampling, id: RequestId, position: int) -> tuple[int, Tensor | None]:
    """A draft by the logits of a draft model, float32, for an output position, and what it was drawn from, shape [V].

    A greedy request drafts the largest logit, the smallest id among equals, which is not drawn.
    """
    if sampling.temperature == 0:
        return argmax(logits_V[None])[0], None
    proposal = target(logits_V, sampling)
    uniform = np.random.default_rng((sampling.seed, id, position, _DRAFT)).random()
    return draw_from(proposal, uniform), proposal.dense(len(logits_V))


def kept_until_stop(tokens: Sequence[int], stops: Callable[[int], bool]) -> list[int]:
    """Tokens up to the first that ends the request, which is kept."""
    for index, token in enumerate(tokens):
        if stops(token):
            return list(tokens[: index + 1])
    return list(tokens)


def _kept(drafts: Sequence[int], drawn: Callable[[int], int]) -> list[int]:
    """What rows draw, up to the first that does not draw its draft; those behind it are never asked."""
    tokens: list[int] = []
    for index in range(len(drafts) + 1):
        tokens.append(drawn(index))
        if index < len(drafts) and tokens[-1] != drafts[index]:
            break
    return tokens


def _draw(logits_RV: Tensor, row: Row, index: int) -> int:
    """As the sampler does."""
    return draw(logits_RV[index], row.sampling, row.id, row.position + index)


def _judge(logits_RV: Tensor, row: Row, index: int) -> int:
    """The draft with probability min(1, p / q), else one of what p has more than q; behind all drafts, one of p."""
    if index == len(row.drafts):
        return _draw(logits_RV, row, index)
    assert row.proposal is not None
    draft, q_V = row.drafts[index], row.proposal[index]
    p_V = target(logits_RV[index], row.sampling).dense(len(q_V))
    random = np.random.default_rng((row.sampling.seed, row.id, row.position + index, _JUDGE))
    likely, proposed = float(p_V[draft]), float(q_V[draft])
    assert proposed > 0, f"token {draft} was not drawn from its proposal"
    if random.random() * proposed < likely:
        return draft
    # The draft is not among them, as q has more of it than p if it was refused: that ends the walk over the rows.
    rest_V = (p_V - q_V).clamp(min=0)
    ids_C = rest_V.nonzero().squeeze(-1)
    if not len(ids_C):  # p and q are the same but for rounding, which is why the draft was refused
        return draft
    return draw_from(Target(ids_C, rest_V[ids_C], rest_V[ids_C].cumsum(-1)), random.random())
