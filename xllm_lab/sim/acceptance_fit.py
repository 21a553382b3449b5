"""Acceptance from what engines recorded of drafts.

Each position's probability differs between requests, and who is easy to guess reaches deep positions more often, in
fewer verifications. So the spread of probabilities comes from requests, and their means from verifications: simulated
as they are fitted, requests of all quantiles keep the fractions that were recorded.

Record with the policy `fixed` at the largest depth that a simulation will ask for. Policies that adapt ask where
guessing went well, and their records tell of such requests and such moments only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xllm_lab.policies.draft import METHODS
from xllm_lab.records import StepRecord
from xllm_lab.sim.acceptance import LearntAcceptance, MethodProcess, Process, Rates, beta_quantile

Floats = npt.NDArray[np.float64]

# Deeper positions that were tried less often than this by all requests together are left out.
_FEWEST_TRIALS = 20
# So many requests of the wider group count as much as the group's own: a group of two says little of its spread.
_BORROWED_REQUESTS = 4.0
_BORROWED_TRIALS = 4.0
_NUM_ROUNDS = 50
# Of the means' fit: quantiles of luck, rounds over all positions, and halvings of an interval for each mean.
_NUM_QUANTILES, _NUM_PASSES, _NUM_HALVINGS = 32, 5, 20


class Verification(NamedTuple):
    """What one request asked for in one step, and what it got."""

    method: str
    kind: str
    request: tuple[int, int]  # which run, which request
    num_asked: int
    num_drafted: int
    num_accepted: int


def verifications(run: int, steps: Iterable[StepRecord], kinds: Mapping[int, str]) -> Iterator[Verification]:
    """All of a run's.

    Args:
        run: tells its requests from those of other runs.
        kinds: `Request.kind` by id.
    """
    for s in steps:
        drafts = zip(s.draft_ids, s.draft_methods, s.num_asked, s.num_drafted, s.num_accepted, strict=True)
        for i, method, num_asked, num_drafted, num_accepted in drafts:
            yield Verification(method, kinds.get(i, ""), (run, i), num_asked, num_drafted, num_accepted)


def fit_acceptance(recorded: Iterable[Verification]) -> LearntAcceptance | None:
    """By method and kind; None if nobody ever asked."""
    by_method: dict[str, list[Verification]] = {}
    for one in recorded:
        by_method.setdefault(one.method, []).append(one)
    if not by_method:
        return None
    return LearntAcceptance({m: _method_process(by_method[m]) for m in METHODS if m in by_method})


class _Met(NamedTuple):
    """As verifications met them: of making a draft, and of keeping it; of so many requests."""

    made: Rates
    held: Rates
    num_requests: int

    def process(self) -> Process:
        drafted, kept = _matched(self.made, self.held)
        return Process(drafted=drafted, kept=kept, num_requests=self.num_requests)


def _method_process(recorded: Sequence[Verification]) -> MethodProcess:
    overall = _met(recorded, None)
    kinds = sorted({one.kind for one in recorded})
    if len(kinds) == 1:
        return MethodProcess(overall.process())
    by_kind = {k: _met([one for one in recorded if one.kind == k], overall).process() for k in kinds}
    return MethodProcess(overall.process(), by_kind)


def _met(recorded: Sequence[Verification], wider: _Met | None) -> _Met:
    requests = {request: row for row, request in enumerate(dict.fromkeys(one.request for one in recorded))}
    depth = max(one.num_asked for one in recorded)
    asked, drafted, kept, tried = (np.zeros((len(requests), depth)) for _ in range(4))
    for one in recorded:
        row = requests[one.request]
        asked[row, : min(one.num_asked, one.num_drafted + 1)] += 1
        drafted[row, : one.num_drafted] += 1
        tried[row, : min(one.num_drafted, one.num_accepted + 1)] += 1
        kept[row, : one.num_accepted] += 1
    made = _rates(asked, drafted, None if wider is None else wider.made)
    held = _rates(tried, kept, None if wider is None else wider.held)
    return _Met(made, held, len(requests))


def _rates(trials: Floats, successes: Floats, wider: Rates | None) -> Rates:
    """Of each position, from counts of shape [requests, positions]; a `wider` group lends where data are few.

    Means are over verifications, spreads over requests.
    """
    means, spreads = [], []
    for k in range(trials.shape[1]):
        is_known = trials[:, k] > 0
        if k and wider is None and trials[:, k].sum() < _FEWEST_TRIALS:
            break
        if wider is not None and k >= len(wider.mean):
            break
        _, spread, weight = _moments(trials[is_known, k], successes[is_known, k])
        mean = float(successes[:, k].sum() / max(1.0, trials[:, k].sum()))
        if wider is not None:
            mean = (weight * mean + _BORROWED_TRIALS * wider.mean[k]) / (weight + _BORROWED_TRIALS)
        num, lent = int(is_known.sum()), 0.0 if wider is None else wider.spread[k]
        means.append(mean)
        spreads.append((num * spread + _BORROWED_REQUESTS * lent) / (num + _BORROWED_REQUESTS))
    return Rates(tuple(means), tuple(spreads))


def _matched(made: Rates, held: Rates) -> tuple[Rates, Rates]:
    """Means over requests of all quantiles, so that their verifications have these means: of making, and of keeping.

    A request of quantile u has a number of verifications in proportion to 1 / (tokens that each yields), and reaches a
    position as often as it passes all before; both follow from the means that are sought, so they are found in turns.
    """
    lucks = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    verifications_u = np.ones(_NUM_QUANTILES)
    drafted, kept = made, held
    for _ in range(_NUM_PASSES):
        drafted, made_uk = _sought(made, lucks, verifications_u[:, None])
        num_made = np.cumprod(made_uk, axis=1)[:, : len(held.mean)]
        kept, kept_uk = _sought(held, lucks, verifications_u[:, None] * num_made)
        yields_u = 1.0 + (num_made * np.cumprod(kept_uk, axis=1)).sum(axis=1)
        verifications_u = 1.0 / yields_u
    return drafted, kept


def _sought(met: Rates, lucks: Floats, weights: Floats) -> tuple[Rates, Floats]:
    """Means over requests, and each quantile's probabilities, shape [quantiles, positions].

    Args:
        met: means over those who reach each position.
        weights: of quantiles at each position, shape [quantiles, positions or 1], but for passing those before.
    """
    reach_u = np.ones(len(lucks))
    means, columns = [], []
    for k, (mean, spread) in enumerate(zip(met.mean, met.spread, strict=True)):
        weights_u = weights[:, min(k, weights.shape[1] - 1)] * reach_u
        found = _mean_that_is_met_as(mean, spread, lucks, weights_u)
        column = np.asarray([beta_quantile(u, found, spread) for u in lucks.tolist()])
        means.append(found)
        columns.append(column)
        reach_u = reach_u * column
    probabilities = np.stack(columns, axis=1) if columns else np.ones((len(lucks), 0))
    return Rates(tuple(means), met.spread), probabilities


def _mean_that_is_met_as(mean: float, spread: float, lucks: Floats, weights_u: Floats) -> float:
    """The Beta distribution's mean whose quantiles, weighted so, have this mean."""
    total = float(weights_u.sum())
    if spread <= 0 or not 0 < mean < 1 or total <= 0:
        return mean
    low, high = 0.0, 1.0
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        column = np.asarray([beta_quantile(u, middle, spread) for u in lucks.tolist()])
        low, high = (middle, high) if float((weights_u * column).sum()) < mean * total else (low, middle)
    return (low + high) / 2


def _moments(trials: Floats, successes: Floats) -> tuple[float, float, float]:
    """(mean, spread, trials that the mean is worth) of binomial counts whose probabilities differ.

    Kleinman, Proportions with extraneous variance, JASA 68 (1973): request by request, weighted by how well each is
    known, w = n / (1 + (n - 1) * spread); weights and spread in turn. Counting trials alone would be wrong: who is easy
    to guess verifies less often for as many tokens, and reaches deep positions more often.
    """
    if not trials.size:
        return 0.0, 0.0, 0.0
    rates, spread, mean = successes / trials, 0.0, 0.0
    weights = trials
    for _ in range(_NUM_ROUNDS):
        total = weights.sum()
        mean = float((weights * rates).sum() / total)
        most, apart = mean * (1 - mean), 1 - weights / total
        by_chance = float((weights / trials * apart).sum())
        room = float((weights * apart).sum()) - by_chance
        before = spread
        if most > 0 and room > 1e-9:
            found = (float((weights * (rates - mean) ** 2).sum()) / most - by_chance) / room
            spread = min(1.0, max(0.0, found))
        weights = trials / (1 + (trials - 1) * spread)
        if abs(spread - before) < 1e-9:
            break
    return mean, spread, float(weights.sum())
