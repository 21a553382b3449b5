"""Tokens are distributed as without drafts, for every kind of proposer; and the test finds rules that are wrong.

The model's logits are a function of the last token, so that what two tokens in a row should be is two lookups in a
matrix. Requests verify, and go on until they have two: the second is a draft's successor, a bonus, or begins a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.engine.drafts.asking import ask
from xllm_lab.drafting import Proposer
from xllm_lab.engine import sampler
from xllm_lab.engine.drafts import verify as module
from xllm_lab.engine.drafts.ngram import NgramProposer
from xllm_lab.engine.drafts.suffix import SuffixParams, SuffixProposer
from xllm_lab.engine.drafts.verify import Row, draw_draft, verify
from xllm_lab.engine.sampler import Target, draw_from, target
from xllm_lab.workload import RequestId, Sampling

VOCAB, LAST = 6, 2
NUM_REQUESTS, DEPTH = 10_000, 2  # two tokens each
MODEL_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(8))
OTHER_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(9))
LEAST_P_VALUE = 1e-4
PLAIN = Sampling(temperature=1.0, seed=17)
# Three seconds each.
MORE = [
    Sampling(temperature=0.5, seed=17),
    Sampling(temperature=1.7, seed=17),
    Sampling(temperature=1.7, top_k=5, top_p=0.8, seed=17),
]


class Drafted(NamedTuple):
    tokens: Sequence[int]
    proposal: Tensor | None


# Drafts for requests, each given as (id, output so far), all at once.
Drafter = Callable[[Sequence[tuple[int, list[int]]], Sampling], list[Drafted]]


def prompts() -> list[list[int]]:
    """Their last tokens came before, followed by different ones."""
    random = np.random.default_rng(5)
    return [[*random.integers(0, VOCAB, 20).tolist(), LAST] for _ in range(50)]


def by_lookup(proposer: Proposer) -> Drafter:
    """What a proposer finds in a prompt, the output, and in requests that ended: every tenth does, and others begin."""
    given = prompts()

    def drafted(requests: Sequence[tuple[int, list[int]]], _: Sampling) -> list[Drafted]:
        drafts = []
        for number, output in requests:
            drafts += proposer.propose([ask(number, given[number % len(given)], output, DEPTH)])
            if number % 10 == 0:
                proposer.forget(RequestId(number))
        assert sum(map(len, drafts)) > len(drafts) / 2, "hardly a draft to verify"
        return [Drafted(tokens, None) for tokens in drafts]

    return drafted


def by_largest_logit(requests: Sequence[tuple[int, list[int]]], _: Sampling) -> list[Drafted]:
    """A draft model that is greedy, whatever the request is."""
    following = OTHER_VV.argmax(-1).tolist()
    first = [following[([LAST, *output])[-1]] for _, output in requests]
    return [Drafted([token, following[token]], None) for token in first]


def by_drawing(requests: Sequence[tuple[int, list[int]]], sampling: Sampling) -> list[Drafted]:
    """A draft model, or a model's own prediction module, whose drafts are drawn."""
    drafts = []
    for number, output in requests:
        tokens, proposals = [([LAST, *output])[-1]], []
        for ahead in range(DEPTH):
            token, proposal = draw_draft(OTHER_VV[tokens[-1]], sampling, RequestId(number), len(output) + ahead)
            assert proposal is not None
            tokens.append(token)
            proposals.append(proposal)
        drafts.append(Drafted(tokens[1:], torch.stack(proposals)))
    return drafts


def pairs(drafter: Drafter, sampling: Sampling, num_requests: int = NUM_REQUESTS) -> Counter[tuple[int, int]]:
    """The first two tokens of so many requests."""
    outputs: list[list[int]] = [[] for _ in range(num_requests)]
    while going := [(i, output) for i, output in enumerate(outputs) if len(output) < 2]:
        drafted = drafter(going, sampling)
        rows = [Row(sampling, RequestId(i), len(o), *d) for (i, o), d in zip(going, drafted, strict=True)]
        last = [token for (_, o), d in zip(going, drafted, strict=True) for token in (([LAST, *o])[-1], *d.tokens)]
        for (_, o), tokens in zip(going, verify(MODEL_VV[last], rows), strict=True):
            o.extend(tokens)
    return Counter((output[0], output[1]) for output in outputs)


def expected(sampling: Sampling) -> npt.NDArray[np.float64]:
    """Probabilities of the first two tokens, shape [VOCAB, VOCAB], by plain softmax, without the sampler."""
    weights: npt.NDArray[np.float64] = np.exp(MODEL_VV.double().numpy() / sampling.temperature)
    order = (-weights).argsort(-1)
    for row, largest in enumerate(order):
        if sampling.top_k:
            weights[row, largest[sampling.top_k :]] = 0
        shares = weights[row, largest].cumsum() / weights[row].sum()
        weights[row, largest[1:][shares[:-1] >= sampling.top_p]] = 0
    steps: npt.NDArray[np.float64] = weights / weights.sum(-1, keepdims=True)
    return np.asarray(steps[LAST][:, None] * steps)


def p_value(drafter: Drafter, sampling: Sampling, num_requests: int = NUM_REQUESTS) -> float:
    """Of a chi-square test; 0 if a pair came that has no probability."""
    counts = pairs(drafter, sampling, num_requests)
    wanted = expected(sampling) * num_requests
    found = np.array([[counts[a, b] for b in range(VOCAB)] for a in range(VOCAB)])
    if found[wanted == 0].any():
        return 0.0
    # Pairs that are expected fewer than five times are one cell.
    rare = (wanted < 5) & (wanted > 0)
    common = wanted >= 5
    rest = ([found[rare].sum()], [wanted[rare].sum()]) if rare.any() else ([], [])
    return float(stats.chisquare([*found[common], *rest[0]], [*wanted[common], *rest[1]]).pvalue)


@pytest.fixture(autouse=True)
def worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function under test, asked once for each of the six rows of logits that there are: a third of the time."""
    known: dict[tuple[bytes, Sampling], Target] = {}

    def remembered(logits_V: Tensor, sampling: Sampling) -> Target:
        key = (logits_V.numpy().tobytes(), sampling)
        if key not in known:
            known[key] = target(logits_V, sampling)
        return known[key]

    monkeypatch.setattr(sampler, "target", remembered)
    monkeypatch.setattr(module, "target", remembered)


@pytest.mark.parametrize(
    "sampling",
    [PLAIN, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE)],
    ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}",
)
@pytest.mark.parametrize("method", ["ngram", "suffix", "greedy", "drawn"])
def test_two_tokens_are_distributed_as_without_drafts(method: str, sampling: Sampling) -> None:
    """20,000 draws for every proposer at three temperatures, and with top_k and top_p."""
    drafters: dict[str, Drafter] = {
        "ngram": by_lookup(NgramProposer()),
        "suffix": by_lookup(SuffixProposer(SuffixParams(max_spec_factor=2.0, max_cached_requests=40))),
        "greedy": by_largest_logit,
        "drawn": by_drawing,
    }
    assert p_value(drafters[method], sampling) > LEAST_P_VALUE


def always(logits_RV: Tensor, row: Row, index: int) -> int:
    """Wrong: keeps every draft."""
    return row.drafts[index] if index < len(row.drafts) else sampler.draw(logits_RV[index], row.sampling, row.id, 0)


def not_subtracted(logits_RV: Tensor, row: Row, index: int) -> int:
    """Wrong: draws from p, and not from what p has more than q, in place of a draft that is refused."""
    p = target(logits_RV[index], row.sampling)
    random = np.random.default_rng((row.sampling.seed, row.id, row.position + index, 1))
    if index < len(row.drafts):
        draft = row.drafts[index]
        proposed = 1.0 if row.proposal is None else float(row.proposal[index, draft])
        if random.random() * proposed < float(p.dense(VOCAB)[draft]):
            return draft
    return draw_from(p, random.random())


@pytest.mark.parametrize("wrong", [always, not_subtracted])
@pytest.mark.parametrize(("right", "drafter"), [("_draw", by_largest_logit), ("_judge", by_drawing)])
def test_wrong_rules_are_found(
    monkeypatch: pytest.MonkeyPatch, right: str, drafter: Drafter, wrong: Callable[[Tensor, Row, int], int]
) -> None:
    """The same test refuses them, or it would say nothing."""
    monkeypatch.setattr(module, right, wrong)
    assert p_value(drafter, PLAIN, 4000) < LEAST_P_VALUE


def test_drafts_are_not_what_decides_them() -> None:
    """The number that draws a draft is not the one that judges it, nor the one that replaces it: all lie everywhere."""
    sampling = Sampling(temperature=1.0, seed=3)
    flat_V = torch.zeros(VOCAB)
    drawn = [draw_draft(flat_V, sampling, RequestId(i), 0)[0] for i in range(600)]
    plain = [sampler.draw(flat_V, sampling, RequestId(i), 0) for i in range(600)]
    judged = [np.random.default_rng((3, i, 0, module._JUDGE)).integers(VOCAB) for i in range(600)]
    for one, other in ((drawn, plain), (drawn, judged), (plain, judged)):
        table = np.histogram2d(one, other, bins=VOCAB)[0]
        assert stats.chi2_contingency(table).pvalue > LEAST_P_VALUE
