"""What becomes of drafts in simulated time: the same coins for any depth, and what was recorded comes back."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workload_strategies import plain_request
from xllm_lab.errors import ConfigError
from xllm_lab.sim.acceptance import GivenAcceptance, LearntAcceptance, MethodProcess, Process, Rates
from xllm_lab.sim.acceptance_fit import Verification, fit_acceptance
from xllm_lab.sim.drafts import Acceptance
from xllm_lab.workload import Request

fracs = st.floats(0, 1)


@st.composite
def rates(draw: st.DrawFn) -> Rates:
    mean = draw(st.lists(fracs, min_size=1, max_size=4))
    return Rates(tuple(mean), tuple(draw(fracs) for _ in mean))


processes = st.builds(Process, drafted=rates(), kept=rates(), num_requests=st.just(1))
given_acceptance = st.builds(GivenAcceptance, st.lists(fracs, min_size=1, max_size=4).map(tuple), st.integers(0, 99))
learnt_acceptance = st.builds(
    LearntAcceptance,
    st.fixed_dictionaries(
        {"ngram": st.builds(MethodProcess, processes, st.dictionaries(st.sampled_from(("", "code")), processes))}
    ),
    st.integers(0, 99),
)


@given(given_acceptance | learnt_acceptance, st.integers(0, 50), st.integers(0, 5000), st.integers(1, 8))
def test_fewer_drafts_are_the_beginning_of_more(acceptance: Acceptance, number: int, position: int, depth: int) -> None:
    """And none is kept that was not there. Asked again, the answer is the same."""
    request = plain_request(number)
    drafted, kept = acceptance.outcome(request, "ngram", position, depth)
    assert 0 <= kept <= drafted <= depth
    deeper = acceptance.outcome(request, "ngram", position, depth + 1)
    assert (drafted, kept) == (min(deeper[0], depth), min(deeper[1], depth))
    assert acceptance.outcome(request, "ngram", position, depth) == (drafted, kept)


def test_the_same_in_any_process() -> None:
    told = "from tests.sim.test_acceptance import some_outcomes; print(some_outcomes())"
    other = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(some_outcomes())


def some_outcomes() -> list[tuple[int, int]]:
    learnt = LearntAcceptance({"ngram": MethodProcess(Process(Rates((0.7,), (0.2,)), Rates((0.6,), (0.3,)), 9))})
    return [learnt.outcome(plain_request(k), "ngram", k * k, 5) for k in range(30)]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("frac", [0.0, 0.3, 0.8, 1.0])
def test_a_given_fraction_yields_its_geometric_series(frac: float, depth: int) -> None:
    """(1 - a^(k+1)) / (1 - a) tokens a verification."""
    acceptance = GivenAcceptance((frac,))
    series = depth + 1 if frac == 1 else (1 - frac ** (depth + 1)) / (1 - frac)
    assert acceptance.tokens_per_step(depth) == pytest.approx(series)
    kept = [acceptance.outcome(plain_request(r), "mtp", p, depth) for r in range(40) for p in range(100)]
    assert {drafted for drafted, _ in kept} == {depth}
    yields = [1 + k for _, k in kept]
    error = statistics.stdev(yields) / len(yields) ** 0.5
    assert statistics.mean(yields) == pytest.approx(series, abs=4 * error + 1e-9)


@pytest.mark.parametrize("fracs", [(), (1.1,), (0.5, -0.1), (float("nan"),)])
def test_what_is_no_fraction_is_refused(fracs: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="fractions from 0 to 1"):
        GivenAcceptance(fracs)


KNOWN = Process(Rates((0.9, 0.8), (0.1, 0.05)), Rates((0.6, 0.7), (0.2, 0.1)), 1)


def recorded(
    acceptance: Acceptance, requests: Sequence[Request], *, depth: int = 3, output_tokens: int = 400
) -> list[Verification]:
    """What an engine would record: a verification yields what is kept and one token, and the next one follows."""
    made = []
    for request in requests:
        position = 1
        while position < output_tokens:
            drafted, kept = acceptance.outcome(request, "ngram", position, depth)
            made.append(Verification("ngram", request.kind, (0, request.id), depth, drafted, kept))
            position += 1 + kept
    return made


def learn(acceptance: Acceptance, requests: Sequence[Request]) -> LearntAcceptance:
    learnt = fit_acceptance(recorded(acceptance, requests))
    assert learnt is not None
    return learnt


def test_means_and_what_differs_between_requests_come_back() -> None:
    """Of 400 requests: means within four standard errors, spreads within a third of themselves."""
    truth = LearntAcceptance({"ngram": MethodProcess(KNOWN)}, seed=5)
    found = learn(truth, [plain_request(k) for k in range(400)]).by_method["ngram"].overall
    assert found.num_requests == 400
    for learnt, known in ((found.drafted, KNOWN.drafted), (found.kept, KNOWN.kept)):
        for k in range(2):
            mean, spread = known.mean[k], known.spread[k]
            error = (mean * (1 - mean) * spread / 400) ** 0.5 + 0.002  # few trials beside few requests
            assert learnt.mean[k] == pytest.approx(mean, abs=4 * error)
            assert learnt.spread[k] == pytest.approx(spread, rel=0.35)


def test_requests_that_do_not_differ_are_learnt_so() -> None:
    found = learn(GivenAcceptance((0.6,)), [plain_request(k) for k in range(200)]).by_method["ngram"].overall
    assert max(found.kept.spread) < 0.01
    assert found.drafted.mean == (1.0, 1.0, 1.0)
    assert found.drafted.spread == (0.0, 0.0, 0.0)


def test_what_was_learnt_repeats_what_was_recorded() -> None:
    """Tokens a verification of other requests, their mean and how they differ."""
    truth = LearntAcceptance({"ngram": MethodProcess(KNOWN)}, seed=5)
    learnt = learn(truth, [plain_request(k) for k in range(300)])

    def yields(acceptance: Acceptance) -> list[float]:
        rows = recorded(acceptance, [plain_request(1000 + k) for k in range(300)])
        kept: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            kept.setdefault(row.request, []).append(1 + row.num_accepted)
        return [statistics.mean(of_request) for of_request in kept.values()]

    ours, theirs = yields(learnt), yields(truth)
    error = (statistics.variance(ours) / 300 + statistics.variance(theirs) / 300) ** 0.5
    assert statistics.mean(ours) == pytest.approx(statistics.mean(theirs), abs=4 * error)
    assert statistics.stdev(ours) == pytest.approx(statistics.stdev(theirs), rel=0.2)


@dataclass(frozen=True)
class Unruly:
    """Each request's chances of a draft, and of keeping it, have nothing to do with one another, nor do positions'."""

    methods: Sequence[str] = ("ngram",)

    def outcome(self, request: Request, method: str, position: int, depth: int) -> tuple[int, int]:
        chances = random.Random(request.id)
        drafted = tuple(chances.betavariate(1.0, 0.5) for _ in range(depth))
        kept = tuple(chances.betavariate(0.3, 0.4) for _ in range(depth))
        coins = random.Random(f"{request.id} {position}")

        def run(fracs: Sequence[float]) -> int:
            return next((k for k, frac in enumerate(fracs) if coins.random() >= frac), len(fracs))

        num = run(drafted)
        return num, run(kept[:num])


def test_verifications_are_kept_as_recorded_whatever_requests_are_like() -> None:
    """The fitted family does not hold the truth, and what the requests' verifications yield comes back all the same."""
    requests = [plain_request(k) for k in range(300)]
    rows = recorded(Unruly(), requests)
    learnt = fit_acceptance(rows)
    assert learnt is not None
    again = recorded(learnt, [plain_request(1000 + k) for k in range(300)])
    yields, repeated = (statistics.fmean(1 + row.num_accepted for row in some) for some in (rows, again))
    assert repeated == pytest.approx(yields, rel=0.03)


def kinds(number: int) -> Request:
    plain = plain_request(number)
    return Request(id=plain.id, arrival_us=0, prompt=plain.prompt, output_tokens=9, kind=("code", "chat")[number % 2])


def test_kinds_are_told_apart_and_others_pooled() -> None:
    good = Process(Rates((1.0,), (0.0,)), Rates((0.9,), (0.0,)), 1)
    poor = Process(Rates((1.0,), (0.0,)), Rates((0.2,), (0.0,)), 1)
    truth = LearntAcceptance({"ngram": MethodProcess(good, {"code": good, "chat": poor})})
    learnt = learn(truth, [kinds(k) for k in range(100)]).by_method["ngram"]
    assert learnt.by_kind["code"].kept.mean[0] == pytest.approx(0.9, abs=0.01)
    assert learnt.by_kind["chat"].kept.mean[0] == pytest.approx(0.2, abs=0.01)
    assert 0.4 < learnt.overall.kept.mean[0] < 0.7
    assert learnt.overall.kept.spread[0] > 0.3
    alone = LearntAcceptance({"ngram": MethodProcess(learnt.overall)})
    both = LearntAcceptance({"ngram": learnt})
    assert [both.outcome(plain_request(k), "ngram", 7, 4) for k in range(50)] == [
        alone.outcome(plain_request(k), "ngram", 7, 4) for k in range(50)
    ]


def test_a_kind_of_few_requests_borrows_from_all() -> None:
    """One request of a kind that was lucky three times is not believed to be always."""
    rows = recorded(GivenAcceptance((0.3,)), [plain_request(k) for k in range(50)])
    rows += [Verification("ngram", "rare", (0, 99), 3, 3, 3)]
    learnt = fit_acceptance(rows)
    assert learnt is not None
    rare = learnt.by_method["ngram"].by_kind["rare"].kept.mean
    assert all(0.3 < mean < 0.6 for mean in rare)


def test_positions_that_were_hardly_tried_are_left_out() -> None:
    rows = [Verification("suffix", "", (0, k), 8, 8 if k == 0 else 2, 0) for k in range(60)]
    learnt = fit_acceptance(rows)
    assert learnt is not None
    assert learnt.depths == {"suffix": 3}
    assert fit_acceptance([]) is None


@pytest.mark.parametrize("pick", [lambda p: p.kept, lambda p: p.drafted])
def test_luck_is_the_same_at_all_positions(pick: Callable[[Process], Rates]) -> None:
    """Who is easy to guess is so throughout; over all requests it is the mean that was said."""
    table = np.asarray([pick(KNOWN).of_request((k + 0.5) / 1000) for k in range(1000)])
    assert (np.diff(table, axis=0) >= 0).all()
    assert table.mean(axis=0) == pytest.approx(np.asarray(pick(KNOWN).mean), abs=1e-3)
    mean = np.asarray(pick(KNOWN).mean)
    assert table.var(axis=0) == pytest.approx(mean * (1 - mean) * np.asarray(pick(KNOWN).spread), rel=0.02)
