"""Counts of drafts, as draft policies see them."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import MutableSequence

from xllm_lab.policies.draft import RECENT_VERIFICATIONS, Tally

_NONE = Tally()


class Tallies:
    """Of an instance, by method: how many drafts there were at each position, and how many of them were kept."""

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


class RecentTallies:
    """Of a request, by method: its last `RECENT_VERIFICATIONS`."""

    __slots__ = ("_by_method", "_shown")

    def __init__(self) -> None:
        self._by_method: dict[str, tuple[deque[tuple[int, int]], list[int], list[int]]] = {}
        self._shown: dict[str, Tally] = {}

    def add(self, method: str, num_drafted: int, num_accepted: int) -> None:
        """A verification is over."""
        if method not in self._by_method:
            self._by_method[method] = deque(), [], []
        recent, drafted, accepted = self._by_method[method]
        recent.append((num_drafted, num_accepted))
        count(drafted, accepted, num_drafted, num_accepted)
        if len(recent) > RECENT_VERIFICATIONS:
            _discount(drafted, accepted, *recent.popleft())
        self._shown[method] = Tally(tuple(drafted), tuple(accepted))

    def of(self, method: str) -> Tally:
        """Of those."""
        return self._shown.get(method, _NONE)


def count(drafted: MutableSequence[int], accepted: MutableSequence[int], num_drafted: int, num_accepted: int) -> None:
    """Count one verification by position."""
    missing = num_drafted - len(drafted)
    if missing > 0:
        drafted.extend([0] * missing)
        accepted.extend([0] * missing)
    for position in range(num_drafted):
        drafted[position] += 1
    for position in range(num_accepted):
        accepted[position] += 1


def _discount(drafted: list[int], accepted: list[int], num_drafted: int, num_accepted: int) -> None:
    """Take one back; what no draft reaches has no place."""
    for position in range(num_drafted):
        drafted[position] -= 1
    for position in range(num_accepted):
        accepted[position] -= 1
    while drafted and not drafted[-1]:
        drafted.pop()
        accepted.pop()
