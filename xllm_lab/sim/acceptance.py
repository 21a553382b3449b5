"""What becomes of drafts: acceptance that is given, and acceptance learnt from runs of an engine.

Both toss the same coin for the same request at the same output position, whatever the depth: what is kept of fewer
drafts is the beginning of what is kept of more, in any process and on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from xllm_lab.errors import ConfigError
from xllm_lab.policies.draft import METHODS
from xllm_lab.workload import Request

_MASK = 2**64 - 1
# What a number is drawn for; they must not be the same number.
_KEPT, _DRAFTED, _QUANTILE = range(3)
_NUM_REQUESTS = 1 << 16
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class GivenAcceptance:
    """Every ask is drafted in full, by any method.

    Attributes:
        fracs: probability that a draft is kept if all before it were, by position; the last one holds for all deeper.
    """

    fracs: tuple[float, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.fracs or not all(0 <= frac <= 1 for frac in self.fracs):
            raise ConfigError(f"acceptance is {self.fracs}, fractions from 0 to 1 are accepted, at least one")

    @property
    def methods(self) -> Sequence[str]:
        return METHODS

    def outcome(self, request: Request, method: str, position: int, depth: int) -> tuple[int, int]:
        return depth, _run_of_luck(self.fracs, depth, _uniform(self.seed, request.id, position, _KEPT))

    def tokens_per_step(self, depth: int) -> float:
        """That a verification of so many drafts yields in the mean: those kept and one more."""
        return 1.0 + math.fsum(math.prod(_repeated(self.fracs, k)) for k in range(1, depth + 1))

    def described(self) -> dict[str, object]:
        """For manifests."""
        return {"given": list(self.fracs)}


@dataclass(frozen=True, slots=True)
class Rates:
    """A probability by position, and how it differs between requests.

    Attributes:
        mean: over requests, of each position.
        spread: its variance between requests, relative to the most that there could be, mean * (1 - mean).
    """

    mean: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.spread) or not all(0 <= x <= 1 for x in (*self.mean, *self.spread)):
            raise ConfigError(f"acceptance has means {self.mean} and spreads {self.spread}, as many of 0 to 1 accepted")

    def of_request(self, quantile: float) -> tuple[float, ...]:
        """Of one that is luckier than this fraction of all: a Beta distribution's quantile, at each position."""
        return tuple(beta_quantile(quantile, mean, spread) for mean, spread in zip(self.mean, self.spread, strict=True))


@dataclass(frozen=True, slots=True)
class Process:
    """Of a method and a kind of request.

    Attributes:
        drafted: that a draft is made, if it is asked for and all before it were made.
        kept: that it is kept, if all before it were.
        num_requests: learnt from so many.
    """

    drafted: Rates
    kept: Rates
    num_requests: int

    def __post_init__(self) -> None:
        if not self.drafted.mean:
            raise ConfigError("acceptance of a method that was never asked; at least one position is accepted")


@dataclass(frozen=True, slots=True)
class MethodProcess:
    """Of a method: by kind of request, and of all kinds together, which stands for those that nobody recorded."""

    overall: Process
    by_kind: Mapping[str, Process] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LearntAcceptance:
    """As recorded; see `acceptance_fit`.

    A request has one quantile, its luck, for all positions and methods: who is easy to guess is so throughout. Beyond
    the deepest draft recorded, the last position's probabilities hold, and nobody measured that.
    """

    by_method: Mapping[str, MethodProcess]
    seed: int = 0

    @property
    def methods(self) -> Sequence[str]:
        return tuple(self.by_method)

    @property
    def depths(self) -> dict[str, int]:
        """The deepest drafts recorded, by method."""
        return {method: len(found.overall.drafted.mean) for method, found in self.by_method.items()}

    def outcome(self, request: Request, method: str, position: int, depth: int) -> tuple[int, int]:
        found = self.by_method[method]
        # Spread evenly (a Weyl sequence), so that the requests of a short trace are of all kinds, as those recorded.
        luck = (_uniform(self.seed, _QUANTILE) + request.id * _GOLDEN) % 1.0
        made, kept = _of_request(found.by_kind.get(request.kind, found.overall), luck)
        drafted = _run_of_luck(made, depth, _uniform(self.seed, request.id, position, _DRAFTED))
        if not drafted or not kept:
            return drafted, 0
        return drafted, _run_of_luck(kept, drafted, _uniform(self.seed, request.id, position, _KEPT))

    def described(self) -> dict[str, object]:
        """For manifests."""
        return {"learnt_to_depth": self.depths}


# Two processes are the same if their numbers are, so it does not matter which run asks.
@lru_cache(_NUM_REQUESTS)
def _of_request(process: Process, luck: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return process.drafted.of_request(luck), process.kept.of_request(luck)


def _run_of_luck(fracs: Sequence[float], depth: int, uniform: float) -> int:
    """How many trials in a row succeed, from one number for all: the first k do if it is below their product."""
    product = 1.0
    for num, frac in enumerate(_repeated(fracs, depth)):
        product *= frac
        if uniform >= product:
            return num
    return depth


def _repeated(fracs: Sequence[float], depth: int) -> Iterator[float]:
    """By position, the last one again and again."""
    yield from fracs[:depth]
    for _ in range(depth - len(fracs)):
        yield fracs[-1]


def _uniform(*key: int) -> float:
    """A number in [0, 1) that depends on the key alone: splitmix64's mixing (Steele, Lea and Flood, OOPSLA 2014)."""
    state = 0
    for part in key:
        state = (state ^ part) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def beta_quantile(quantile: float, mean: float, spread: float) -> float:
    """Of a Beta distribution with that mean, whose variance is `spread` of the most that there could be."""
    from scipy.special import betaincinv

    if spread <= 0 or mean <= 0 or mean >= 1:
        return mean
    if spread >= 1:
        return float(quantile >= 1 - mean)
    certain = 1 / spread - 1  # the sum of both parameters
    return float(betaincinv(mean * certain, (1 - mean) * certain, quantile))
