"""The draw is a function of logits, seed, request and position; its distribution is the one asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from xllm_lab.engine.sampler import sample
from xllm_lab.workload import RequestId, Sampling


def logits(rows: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def ids(*numbers: int) -> list[RequestId]:
    return [RequestId(n) for n in numbers]


def draws(logits_V: torch.Tensor, sampling: Sampling, count: int) -> list[int]:
    """The tokens of one request at `count` output positions, all from the same logits."""
    return sample(logits_V.expand(count, -1), [sampling] * count, ids(*[3] * count), range(count))


def test_greedy_takes_the_smallest_id_among_equals() -> None:
    """Ties are broken by id, so that engine and reference agree."""
    logits_RV = torch.tensor([[0.0, 5.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample(logits_RV, [Sampling()] * 2, ids(8, 9), [0, 0]) == [1, 0]


@given(
    order=st.permutations(range(6)),
    temperatures=st.lists(st.sampled_from([0.0, 0.7, 1.3]), min_size=6, max_size=6),
    top_k=st.sampled_from([0, 1, 5, 500]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
)
def test_the_rest_of_the_batch_cannot_move_a_draw(
    order: list[int], temperatures: list[float], top_k: int, top_p: float
) -> None:
    """A row drawn alone, and in a batch of any order, gives the same token."""
    logits_RV = logits(6)
    params = [Sampling(temperature=t, top_k=top_k, top_p=top_p, seed=11) for t in temperatures]
    alone = [sample(logits_RV[i : i + 1], [params[i]], ids(i), [2 * i])[0] for i in range(6)]
    together = sample(logits_RV[list(order)], [params[i] for i in order], ids(*order), [2 * i for i in order])
    assert together == [alone[i] for i in order]


def test_a_draw_repeats_and_its_key_matters() -> None:
    """Equal keys give equal tokens; another seed, request or position gives other tokens somewhere."""
    logits_V = logits(1)[0]
    first = draws(logits_V, Sampling(temperature=1.0, seed=5), 200)
    assert first == draws(logits_V, Sampling(temperature=1.0, seed=5), 200)
    assert first != draws(logits_V, Sampling(temperature=1.0, seed=6), 200)
    assert len(set(first)) > 5
    others = sample(logits_V.expand(200, -1), [Sampling(temperature=1.0, seed=5)] * 200, ids(*[4] * 200), range(200))
    assert first != others


def test_top_k_keeps_the_k_largest_and_the_smallest_ids_among_equals() -> None:
    """Of four equal logits, top 2 keeps the first two."""
    logits_V = torch.tensor([1.0, 4.0, 4.0, 4.0, 4.0, 0.0])
    assert set(draws(logits_V, Sampling(temperature=1.0, top_k=2), 100)) == {1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """Probabilities 0.5, 0.25, 0.15, 0.1: 0.6 needs two tokens, 0.45 needs one, 0.9 needs three."""
    logits_V = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert set(draws(logits_V, Sampling(temperature=1.0, top_p=0.6), 200)) == {1, 3}
    assert set(draws(logits_V, Sampling(temperature=1.0, top_p=0.45), 50)) == {1}
    assert set(draws(logits_V, Sampling(temperature=1.0, top_p=0.895), 200)) == {1, 3, 2}


def test_a_tiny_top_p_still_draws() -> None:
    """The most probable token is always kept."""
    assert set(draws(logits(1)[0], Sampling(temperature=1.0, top_p=1e-9), 20)) == {int(logits(1)[0].argmax())}


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0, seed=1), 12),
        (Sampling(temperature=0.6, seed=1), 12),
        (Sampling(temperature=1.0, top_k=4, seed=1), 4),
    ],
)
def test_draws_have_the_distribution_asked_for(sampling: Sampling, kept: int) -> None:
    """Chi-square of 4,000 draws against softmax(logits / temperature) over the kept tokens; the seed is fixed."""
    logits_V = torch.linspace(-1, 1, 12)
    counts = np.bincount(draws(logits_V, sampling, 4000), minlength=12)
    probabilities = torch.softmax(logits_V[-kept:].double() / sampling.temperature, -1).numpy()
    assert counts[: 12 - kept].sum() == 0
    assert stats.chisquare(counts[-kept:], 4000 * probabilities).pvalue > 0.01
