"""How long copies between tiers take: a constant and a rate for each way, fitted to what an engine measured.

copy_us = call_us + token_us * tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

import numpy as np

from xllm_lab.errors import ConfigError
from xllm_lab.policies.cache import CopyKind

KINDS: tuple[CopyKind, ...] = get_args(CopyKind)
HOST_KINDS: tuple[CopyKind, ...] = ("offload", "restore")
STORE_KINDS: tuple[CopyKind, ...] = ("save", "prefetch", "push")


class CopyWeights(NamedTuple):
    """Microseconds of a copy, and per token whose KV it moves."""

    call_us: float = 0.0
    token_us: float = 0.0


class Copied(NamedTuple):
    """One copy: so many tokens in so long, without the time in a queue."""

    kind: CopyKind
    num_tokens: int
    us: float


@dataclass(frozen=True, slots=True)
class CopyTime:
    """A `CopyTimeView`: weights by kind; a kind without any is not priced."""

    weights: Mapping[CopyKind, CopyWeights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, weights in self.weights.items():
            if kind not in KINDS:
                raise ConfigError(f"copy-time weights of {kind!r}, accepted: {', '.join(KINDS)}")
            if len(weights) != len(CopyWeights._fields) or any(w < 0 or not np.isfinite(w) for w in weights):
                accepted = f"{len(CopyWeights._fields)} numbers of at least 0"
                raise ConfigError(f"copy-time weights of {kind!r} are {weights}, accepted: {accepted}")

    def __bool__(self) -> bool:
        """Whether ways to the host and back are known."""
        return all(kind in self.weights for kind in HOST_KINDS)

    @property
    def has_store(self) -> bool:
        """Whether ways to the store and back are known."""
        return all(kind in self.weights for kind in STORE_KINDS)

    def with_store(self, store: CopyTime) -> CopyTime:
        """These times, and another's of the store."""
        return CopyTime({**self.weights, **{kind: store.weights[kind] for kind in STORE_KINDS}})

    def copy_us(self, kind: CopyKind, num_tokens: int) -> float:
        """Of one copy that nothing is in the way of."""
        call_us, token_us = self.weights[kind]
        return call_us + token_us * num_tokens


def link_copy_time(
    bytes_per_s: float, bytes_per_token: float, *, latency_us: float = 0.0, kinds: Sequence[CopyKind] = HOST_KINDS
) -> CopyTime:
    """Over a link of that rate each way.

    Raises:
        ConfigError: no rate above 0.
    """
    if not bytes_per_s > 0:
        raise ConfigError(f"bytes_per_s is {bytes_per_s}, more than 0 is accepted")
    weights = CopyWeights(latency_us, bytes_per_token / bytes_per_s * 1e6)
    return CopyTime(dict.fromkeys(kinds, weights))


def fit_copy_time(copied: Iterable[Copied]) -> CopyTime:
    """Non-negative least squares for each kind, relative to what was measured: short copies count as much as long.

    A kind of which nothing was moved, as of a store that never has what it is asked for, is not priced.
    """
    from scipy.optimize import nnls

    seen = list(copied)
    weights: dict[CopyKind, CopyWeights] = {}
    for kind in KINDS:
        mine = [c for c in seen if c.kind == kind]
        if any(c.num_tokens for c in mine):
            us = np.maximum([c.us for c in mine], 1.0)
            terms = np.stack([1 / us, [c.num_tokens for c in mine] / us], axis=1)
            scale = terms.max(axis=0)
            found, _ = nnls(terms / scale, np.ones(len(mine)))
            weights[kind] = CopyWeights(*(found / scale).tolist())
    return CopyTime(weights)
