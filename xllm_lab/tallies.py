"""Counts of drafts, as draft policies see them."""

from __future__ import annotations

from array import array
from itertools import zip_longest

from xllm_lab.policies.draft import Tally

_NONE = Tally()


class Tallies:
    """By method: how many drafts there were at each position, and how many of them were kept."""

    __slots__ = ("_by_method", "_shown")

    def __init__(self) -> None:
        self._by_method: dict[str, tuple[array[int], array[int]]] = {}
        self._shown: dict[str, Tally] = {}

    def add(self, method: str, num_drafted: int, num_accepted: int) -> None:
        """A verification is over."""
        counts = self._by_method.setdefault(method, (array("q"), array("q")))
        count(*counts, num_drafted, num_accepted)
        self._shown.pop(method, None)

    def of(self, method: str) -> Tally:
        """So far."""
        if method not in self._by_method:
            return _NONE
        if method not in self._shown:
            drafted, accepted = self._by_method[method]
            self._shown[method] = Tally(tuple(drafted), tuple(accepted))
        return self._shown[method]

    def total(self) -> Tally:
        """Over all methods."""
        drafted, accepted = (
            (tuple(map(sum, zip_longest(*parts, fillvalue=0))) for parts in zip(*self._by_method.values(), strict=True))
            if self._by_method
            else ((), ())
        )
        return Tally(drafted, accepted)


def count(drafted: array[int], accepted: array[int], num_drafted: int, num_accepted: int) -> None:
    """Count one verification by position."""
    missing = num_drafted - len(drafted)
    if missing > 0:
        drafted.extend([0] * missing)
        accepted.extend([0] * missing)
    for position in range(num_drafted):
        drafted[position] += 1
    for position in range(num_accepted):
        accepted[position] += 1
