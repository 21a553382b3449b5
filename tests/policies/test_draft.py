"""Draft policies: who drafts how much, against steps written down here and against streams of tokens."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from operator import mul
from statistics import harmonic_mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policies.drafting_views import kept, request, step, times
from xllm_lab.drawn_draft_views import DrawnDraftView, drawn_draft_view
from xllm_lab.policies.catalog import flags, policies
from xllm_lab.policies.draft import METHODS, RECENT_VERIFICATIONS, DraftPolicy, Tally
from xllm_lab.policies.draft.acceptance import Bet, continuation, expected, most_paying, trial, trial_rate
from xllm_lab.policies.draft.acceptance_driven import AcceptanceDriven
from xllm_lab.policies.draft.adaptive_pruning import AdaptivePruning
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.load_aware import LoadAware
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.draft.pruning import AIMS, Pruning, decode_us

ADAPTIVE: list[DraftPolicy] = [AcceptanceDriven(), AdaptivePruning()]
UNEXPLORING: list[DraftPolicy] = [AcceptanceDriven(explore_frac=0.0), AdaptivePruning(explore_frac=0.0)]
# Counts of an instance that leave no doubt.
GOOD, BAD = kept(100_000, *[90_000] * 8), kept(100_000, *[0] * 8)


def depths(policy: DraftPolicy, view: DrawnDraftView) -> dict[int, int]:
    return {i: ask.depth for i, ask in policy.decide(view).asks.items()}


def drafts_of(chance: float, num_positions: int = 8) -> Tally:
    """Of a full window, drafts each kept with that chance."""
    most = RECENT_VERIFICATIONS
    return kept(most, *(round(most * chance**n) for n in range(1, num_positions + 1)))


def test_fixed_drafts_alike_as_far_as_there_is_room() -> None:
    """First those who came first; nobody beyond the end of its answer."""
    policy = Fixed(num_speculative_tokens=4)
    three = [request(2), request(0, most_drafts=2), request(1)]
    assert depths(policy, step(*three)) == {0: 2, 1: 4, 2: 4}
    assert depths(policy, step(*three, tokens_left=7)) == {0: 2, 1: 4, 2: 1}
    # A last block of 16 tokens has room for 11 more behind 101.
    assert depths(replace(policy, num_speculative_tokens=12), step(request(0), blocks_left=0)) == {0: 11}
    assert depths(replace(policy, method="mtp"), step(*three)) == {}


def test_load_aware_fills_the_rows_that_are_free() -> None:
    """In equal shares, what is left to those who came first; prompts take their part."""
    policy = LoadAware(num_speculative_tokens=4, max_verify_tokens=10, max_decoding_seqs=6)
    assert depths(policy, step(request(0))) == {0: 4}
    assert depths(policy, step(*map(request, range(3)))) == {0: 3, 1: 2, 2: 2}
    assert depths(policy, step(*map(request, range(6)))) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert depths(policy, step(request(0), num_tokens=9)) == {0: 1}
    assert depths(policy, step(request(0), num_tokens=300)) == {}


def test_load_aware_leaves_a_crowd_alone() -> None:
    """So many decode, or somebody waits."""
    policy = LoadAware(max_decoding_seqs=2, max_verify_tokens=100)
    assert policy.decide(step(*map(request, range(3)))).reason == "too many decode"
    assert policy.decide(step(request(0), num_waiting=1)).reason == "requests wait"
    assert depths(replace(policy, drafts_while_waiting=True), step(request(0), num_waiting=1)) == {0: 4}


@given(number=st.integers(0, 10_000), most=st.integers(0, 100))
def test_load_aware_keeps_its_rows(number: int, most: int) -> None:
    """On any view: the step is no larger than it is allowed to make it."""
    view = drawn_draft_view(number)
    drafts = sum(depths(LoadAware(max_verify_tokens=most, drafts_while_waiting=True), view).values())
    assert drafts == 0 or view.num_tokens + drafts <= most


@pytest.mark.parametrize(
    "name", [n for n in policies("draft") if not getattr(policies("draft")[n], "needs_step_time", 0)]
)
@given(number=st.integers(0, 10_000))
def test_who_needs_no_times_looks_at_none(name: str, number: int) -> None:
    """A host may have none."""
    view = drawn_draft_view(number)
    policy: DraftPolicy = policies("draft")[name]()
    assert policy.decide(view) == policy.decide(replace(view, times=None))


# xLLM's adaptive_speculative_controller_test.cpp: two sequences of 100 tokens, three drafts each, times in ms.
# There drafting has taken its millisecond already; here it is spent only if somebody drafts.
ORACLE_TIMES = times(step_us=1000 + 2 * (500 + 100), token_us=500.0, kv_read_us=1.0, call_us=1000.0)
ORACLES = [
    ([[0.95, 0.90, 0.20], [0.80, 0.0, 0.10]], [2, 1]),
    ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [0, 0]),
]


@pytest.mark.parametrize(("probabilities", "expected_depths"), ORACLES)
def test_xllm_prunes_so(probabilities: list[list[float]], expected_depths: list[int]) -> None:
    """The first sequence drafts, and nobody where nothing is kept; the depths are those of xLLM's rule by hand.

    Scores: 2/2.2 without drafts; then 2.95/3.8, 3.805/4.4, 4.605/5.0, 4.776/5.6 by falling chance. Taken one by one
    the first would not pay for the millisecond of drafting.
    """
    two = [request(0), request(1)]
    view = step(*two, methods=["mtp"], times=ORACLE_TIMES)
    bets = [Bet("mtp", 0, list(accumulate(p, mul)), 0.0) for p in probabilities]
    found, score = Pruning(view, ORACLE_TIMES, two, bets).best(0.0)
    assert found == expected_depths
    assert score == pytest.approx(4.605 / 5000 if any(expected_depths) else 2 / 2200)


@pytest.mark.parametrize(("probabilities", "expected_depths"), ORACLES)
def test_xllm_prunes_so_from_counts(probabilities: list[list[float]], expected_depths: list[int]) -> None:
    """The same through the policy: of many drafts as large a part was kept."""
    many = 10_000_000
    tallies = [kept(many, *(round(many * a) for a in accumulate(p, mul))) for p in probabilities]
    two = [request(i, tallies={"mtp": tally}) for i, tally in enumerate(tallies)]
    policy = AdaptivePruning(num_speculative_tokens=3, explore_frac=0.0, aim="tokens")
    view = step(*two, methods=["mtp"], times=ORACLE_TIMES)
    assert depths(policy, view) == {i: depth for i, depth in enumerate(expected_depths) if depth}


@given(
    chances=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=5),
    token_us=st.floats(0, 1000),
    kv_read_us=st.floats(0, 1),
    cheap_rows=st.integers(0, 20),
    call_us=st.floats(0, 2000),
    depth_us=st.floats(0, 200),
    num_prompt_tokens=st.integers(0, 100),
    aim=st.sampled_from(AIMS),
)
def test_no_fixed_depth_has_a_better_score(  # noqa: PLR0917
    chances: list[list[float]],
    token_us: float,
    kv_read_us: float,
    cheap_rows: int,
    call_us: float,
    depth_us: float,
    num_prompt_tokens: int,
    aim: str,
) -> None:
    """Nor no drafts, whatever rows and drafts cost, where all requests have as many tokens in KV."""
    cost = times(token_us=token_us, kv_read_us=kv_read_us, cheap_rows=cheap_rows, call_us=call_us, depth_us=depth_us)
    requests = [request(i) for i in range(len(chances))]
    view = step(*requests, methods=["mtp"], times=cost, num_tokens=len(requests) + num_prompt_tokens)
    bets = [Bet("mtp", 0, list(accumulate(p, mul)), 0.0) for p in chances]
    _, best = Pruning(view, cost, requests, bets, aim).best(0.0)
    for depth in range(6):
        drafts = [a for bet in bets for a in bet.chances[:depth]]
        us = decode_us(view, cost) + sum(cost.row_us(view.num_tokens + n, 100) for n in range(len(drafts)))
        us += cost.draft_us("mtp", len(requests), min(depth, max(map(len, chances)))) if depth else 0.0
        each = [1 + sum(bet.chances[:depth]) for bet in bets]
        tokens = sum(each) if aim == "tokens" else len(each) * harmonic_mean(each)
        assert best >= tokens / us * (1 - 1e-9)


def test_pace_does_not_let_all_wait_for_one() -> None:
    """One of two is easy to guess: for tokens it drafts deeper than for pace; alike, both aims agree."""
    cost = times(token_us=150.0)
    view = step(request(0), request(1), methods=["mtp"], times=cost)
    easy, hard = ([p**n for n in range(1, 9)] for p in (0.9, 0.1))

    def found(aim: str, *chances: list[float]) -> list[int]:
        return Pruning(view, cost, view.decoding, [Bet("mtp", 0, c, 0.0) for c in chances], aim).best(0.0)[0]

    assert found("tokens", easy, hard)[0] > found("pace", easy, hard)[0] > 0
    assert found("tokens", easy, easy) == found("pace", easy, easy) != [0, 0]


def test_a_gain_that_is_too_small_is_none() -> None:
    """A row of a hundredth of a step, kept nine times of ten: each of the first drafts is worth tens of percents."""
    view = step(request(0, tally=drafts_of(0.9)), tally=GOOD, times=times(token_us=10.0))
    found = [
        depths(AdaptivePruning(explore_frac=0.0, adaptive_speculative_min_gain=g), view).get(0, 0)
        for g in (0.0, 0.15, 0.9)
    ]
    assert found[0] == 8
    assert 0 < found[1] < 8
    assert found[2] == 0


def test_a_prompt_in_the_step_makes_no_draft_cheap() -> None:
    """The step is fifty times as long, and a row costs the same: what did not pay does not."""
    alone = step(request(0, tally=BAD), tally=BAD)
    beside = replace(alone, num_tokens=501, times=times(step_us=51_000.0))
    for policy in UNEXPLORING:
        assert depths(policy, alone) == depths(policy, beside) == {}
        good = [request(0, tally=drafts_of(0.8))]
        deep = [depths(policy, replace(v, decoding=good, tallies={"ngram": GOOD})) for v in (alone, beside)]
        assert deep[0] == deep[1] != {}


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_where_nothing_is_known_somebody_finds_out(policy: DraftPolicy) -> None:
    """Alone, or two together: the first drafts are expected to be kept."""
    assert depths(policy, step(request(0))) != {}
    assert len(depths(policy, step(request(0), request(1)))) == 2


@pytest.mark.parametrize("policy", UNEXPLORING)
def test_a_request_is_known_by_its_own_drafts(policy: DraftPolicy) -> None:
    """More than by what holds for all; and a new one by that."""
    four = [request(0, tally=drafts_of(0.95)), request(1, tally=drafts_of(0.0)), request(2), request(3)]
    cheap = times(token_us=30.0)
    found = depths(policy, step(*four, tally=kept(10_000, 7_000, 4_900, 3_400), times=cheap))
    assert found[0] > found[2] == found[3] > 0
    assert found.get(1, 0) < found[2]


@pytest.mark.parametrize("policy", UNEXPLORING)
def test_drafts_shrink_as_the_batch_grows(policy: DraftPolicy) -> None:
    """A row of a tenth of a lone step: what pays for one does not for sixty-four."""
    found = []
    for num in (1, 4, 16, 64):
        requests = [request(i, tally=drafts_of(0.6)) for i in range(num)]
        view = step(*requests, tally=kept(10_000, 6_000, 3_600, 2_160), times=times(step_us=900 + 100.0 * num))
        found.append(sum(depths(policy, view).values()) / num)
    assert found == sorted(found, reverse=True)
    assert found[0] >= 2
    assert found[-1] == 0


@pytest.mark.parametrize("policy", UNEXPLORING)
@given(num_kept=st.integers(0, RECENT_VERIFICATIONS - 1), others=st.integers(0, 3), instance=st.floats(0, 1))
def test_who_is_more_often_right_drafts_no_less(
    policy: DraftPolicy, num_kept: int, others: int, instance: float
) -> None:
    """One more of its last drafts is kept, from the first position to the last; the rest of the view is the same."""
    tally = kept(10_000, *(round(10_000 * instance**n) for n in range(1, 9)))
    found = []
    for count in (num_kept, num_kept + 1):
        one = request(0, tally=kept(RECENT_VERIFICATIONS, *[count] * 8))
        view = step(one, *(request(i, tally=drafts_of(0.5)) for i in range(1, others + 1)), tally=tally)
        found.append(depths(policy, view).get(0, 0))
    assert found[0] <= found[1]


@pytest.mark.parametrize("policy", [AcceptanceDriven(), AdaptivePruning()])
def test_who_is_never_right_tries_one_draft_now_and_then(policy: DraftPolicy) -> None:
    """As seldom as costs half a percent: at a tenth of a step each, every twentieth step, evenly."""
    found = [depths(policy, step(request(0, tally=BAD, num_tokens=n), tally=BAD)).get(0, 0) for n in range(100, 2100)]
    tried = [n for n, depth in enumerate(found) if depth]
    assert {found[n] for n in tried} == {1}
    assert 80 <= len(tried) <= 110
    gaps = [b - a for a, b in pairwise(tried)]
    assert max(gaps) <= 3 * min(gaps)


def test_where_nobody_drafts_all_try_together() -> None:
    """Drafting has a price that they then share."""
    policy, cost = AdaptivePruning(), times(call_us=500.0)
    found = []
    for n in range(100, 1100):
        four = [request(i, num_tokens=n + 7 * i, tallies={"mtp": BAD}) for i in range(4)]
        view = step(*four, methods=["mtp"], times=cost, tallies={"mtp": BAD})
        found.append(depths(policy, view))
    assert {len(some) for some in found} == {0, 4}
    assert 3 <= sum(map(bool, found)) <= 8  # 900 of 1000 us are lost: one of 180


def test_auto_takes_the_better_method_and_tries_all() -> None:
    """Each request its own; and where none pays, they have their turns alike."""
    for policy in UNEXPLORING:
        two = [
            request(0, tallies={"ngram": drafts_of(0.9), "suffix": drafts_of(0.3)}),
            request(1, tallies={"ngram": drafts_of(0.3), "suffix": drafts_of(0.9)}),
        ]
        asks = policy.decide(step(*two, methods=["suffix", "ngram"], tallies={"ngram": GOOD, "suffix": GOOD})).asks
        assert [asks[r.id].method for r in two] == ["ngram", "suffix"]
    for policy in ADAPTIVE:
        none = dict.fromkeys(METHODS, BAD)
        tried = [
            ask.method
            for n in range(100, 8100)
            for ask in policy.decide(
                step(request(0, num_tokens=n, tallies=none), methods=METHODS, tallies=none)
            ).asks.values()
        ]
        assert set(tried) == set(METHODS)
        assert max(map(tried.count, METHODS)) < 1.3 * min(map(tried.count, METHODS))


@given(stride=st.integers(1, 16), rate=st.floats(0.02, 0.5), start=st.integers(1, 100_000))
def test_turns_come_as_often_as_said_whatever_the_stride(stride: int, rate: float, start: int) -> None:
    """A request that grows by so many tokens a step is not passed over."""
    turns = sum(trial(start + stride * n, rate, 1) is not None for n in range(1000))
    assert turns == pytest.approx(1000 * rate, abs=25)


@given(loss=st.floats(0.001, 10), share=st.floats(0.001, 10), frac=st.floats(0.001, 0.03))
def test_trials_lose_what_they_may(loss: float, share: float, frac: float) -> None:
    """And are made always where they lose no more."""
    rate = trial_rate(frac, share, loss + 1, 1.0)
    assert rate == 1.0 or rate * loss == pytest.approx(frac * share)
    assert rate == 1.0 or loss > frac * share * 0.999
    assert trial_rate(frac, share, 1.0, 2.0) == 1.0


@given(
    drafted=st.lists(st.integers(1, 50), max_size=6),
    fractions=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    factors=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    prior_count=st.floats(0.5, 64),
)
def test_chances_fall_with_depth_and_rise_with_what_was_kept(
    drafted: list[int], fractions: list[float], factors: list[float], prior_count: float
) -> None:
    """They are chances, and nobody's falls because one more draft was kept."""
    counts = sorted(drafted, reverse=True)
    accepted = sorted((int(n * f) for n, f in zip(counts, fractions, strict=False)), reverse=True)
    accepted = [min(a, n) for a, n in zip(accepted, counts, strict=True)]
    chances = expected(Tally(tuple(counts), tuple(accepted)), factors, prior_count)
    assert len(chances) == len(factors)
    assert all(1 >= a >= b >= 0 for a, b in zip([1.0, *chances], chances, strict=False))
    for position in range(len(counts)):
        more = tuple(min(n, a + (p <= position)) for p, (n, a) in enumerate(zip(counts, accepted, strict=True)))
        raised = expected(Tally(tuple(counts), more), factors, prior_count)
        assert all(b >= a for a, b in zip(chances, raised, strict=True))


def test_chances_of_many_drafts_are_what_was_kept() -> None:
    """And of none, what is known before."""
    assert expected(kept(10**9, 9 * 10**8, 3 * 10**8), [0.5] * 3, 8.0) == pytest.approx([0.9, 0.3, 0.15])
    assert expected(Tally(), [0.5, 0.2], 8.0) == [0.5, 0.1]
    assert continuation(kept(10**9, 9 * 10**8, 3 * 10**8), 2) == pytest.approx([0.9, 1 / 3])
    assert continuation(Tally(), 2) == pytest.approx([0.8, 0.8])


@given(probability=st.floats(0, 1), cost=st.floats(0.01, 1), share=st.floats(0.05, 1), num=st.integers(1, 8))
def test_the_depth_that_pays_most_is_found(probability: float, cost: float, share: float, num: int) -> None:
    """Against all others."""
    chances = [probability**n for n in range(1, num + 1)]
    depth, rate = most_paying(chances, share, [cost * n for n in range(1, num + 1)])
    rates = [(1 + sum(chances[:d])) / (share + cost * d) for d in range(num + 1)]
    assert rate == pytest.approx(max(rates))
    assert rates[depth] == pytest.approx(rate)


def streamed(policy: DraftPolicy, agrees: Callable[[int], float], num_tokens: int = 600) -> float:
    """Time that eight lone requests of so many tokens take, where a step lasts 1 and a row of it a tenth.

    Args:
        agrees: chance that a draft of the output's n-th token is kept; the same dice for all policies.
    """
    return sum(_streamed(policy, agrees, num_tokens, seed) for seed in range(8))


def _streamed(policy: DraftPolicy, agrees: Callable[[int], float], num_tokens: int, seed: int) -> float:
    dice = [random.Random(f"{seed} {n}").random() < agrees(n) for n in range(num_tokens)]
    window: deque[tuple[int, int]] = deque(maxlen=RECENT_VERIFICATIONS)
    drafted, accepted = [0] * 15, [0] * 15
    done, took = 0, 0.0
    while done < num_tokens:
        recent = Tally(*(tuple(sum(some[k] > n for some in window) for n in range(15)) for k in (0, 1)))
        one = request(0, tally=recent, num_tokens=101 + done, most_drafts=min(15, num_tokens - done - 1))
        depth = depths(policy, step(one, tally=Tally(tuple(drafted), tuple(accepted)))).get(0, 0)
        ahead = dice[done : done + depth]
        num_kept = ahead.index(False) if False in ahead else depth
        if depth:
            window.append((depth, num_kept))
            for n in range(depth):
                drafted[n] += 1
                accepted[n] += n < num_kept
        done += num_kept + 1
        took += 1 + 0.1 * depth
    return took


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_text_that_never_repeats_itself_loses_little(policy: DraftPolicy) -> None:
    """At most three percent; a fixed depth loses all of its rows."""
    assert streamed(policy, lambda n: 0.0) <= 1.03 * streamed(OFF, lambda n: 0.0)
    assert streamed(Fixed(num_speculative_tokens=4), lambda n: 0.0) > 1.35 * streamed(OFF, lambda n: 0.0)


@functools.cache
def best_fixed(probability: float) -> float:
    return min(streamed(Fixed(num_speculative_tokens=d), lambda n: probability) for d in range(1, 9))


@pytest.mark.parametrize("policy", ADAPTIVE)
@pytest.mark.parametrize("probability", [0.3, 0.5, 0.8, 0.95])
def test_text_that_repeats_itself_gains_as_much_as_with_the_best_depth(policy: DraftPolicy, probability: float) -> None:
    """But for three percent, which is what learning it may cost; nobody told it the depth."""
    assert streamed(policy, lambda n: probability) <= 1.03 * best_fixed(probability)


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_text_that_begins_to_repeat_itself_is_found_out(policy: DraftPolicy) -> None:
    """After 300 tokens that never did: more is gained than by any depth that is fixed."""

    def late(n: int) -> float:
        return 0.9 if n >= 300 else 0.0

    fixed = min(streamed(Fixed(num_speculative_tokens=d), late) for d in range(1, 9))
    assert streamed(policy, late) < 0.95 * min(fixed, streamed(OFF, late))


def test_what_xllm_calls_them() -> None:
    """Its flags, and its words for methods; it has neither prompt lookup nor a separate model that drafts."""
    named = flags(AdaptivePruning)
    assert {name: flag.name for name, flag in named.items()} == {
        "method": "speculative_algorithm",
        "num_speculative_tokens": "num_speculative_tokens",
        "adaptive_speculative_min_gain": "adaptive_speculative_min_gain",
    }
    assert dict(flags(Fixed)["method"].words) == {"mtp": "MTP", "suffix": "Suffix"}
    assert dict(named["method"].words) == {"mtp": "MTP"}  # what it adapts
    assert AdaptivePruning.xllm_flags["enable_adaptive_speculative_decode"] is True


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Fixed(method="auto"), "method is 'auto', accepted: ngram, suffix, draft_model, mtp"),
        (lambda: Fixed(num_speculative_tokens=0), "num_speculative_tokens is 0, at least 1 is accepted"),
        (lambda: LoadAware(max_verify_tokens=-1), "max_verify_tokens is -1, at least 0 is accepted"),
        (lambda: AcceptanceDriven(method="luck"), "method is 'luck', accepted: auto, ngram, suffix"),
        (lambda: AcceptanceDriven(row_cost_frac=0.0), "row_cost_frac is 0.0, at least 0.001 is accepted"),
        (lambda: AdaptivePruning(aim="luck"), "aim is 'luck', accepted: tokens, pace"),
        (lambda: AdaptivePruning(prior_count=0.0), "prior_count is 0.0, at least 0.001 is accepted"),
        (
            lambda: AdaptivePruning(adaptive_speculative_min_gain=-0.1),
            "adaptive_speculative_min_gain is -0.1, at least",
        ),
    ],
)
def test_bad_knobs_are_refused(make: Callable[[], object], told: str) -> None:
    """With what is accepted."""
    with pytest.raises(ValueError, match=told):
        make()
