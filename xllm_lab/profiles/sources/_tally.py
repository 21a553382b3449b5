"""Sums that readers keep: of calls that are alike, and of rows that were not used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from xllm_lab.profiles.profile import LeftOut


class Microseconds(TypedDict):
    """Times of calls, as the rows that hold them name them."""

    total_us: float
    min_us: float
    max_us: float


@dataclass(slots=True)
class Calls:
    """Durations of calls that are alike, in whole nanoseconds, so that no order of adding changes the sum."""

    num: int = 0
    total_ns: int = 0
    least_ns: int = 0
    most_ns: int = 0

    def add(self, ns: int) -> None:
        self.least_ns = min(self.least_ns, ns) if self.num else ns
        self.most_ns = max(self.most_ns, ns)
        self.total_ns += ns
        self.num += 1

    def as_us(self) -> Microseconds:
        return Microseconds(total_us=self.total_ns / 1e3, min_us=self.least_ns / 1e3, max_us=self.most_ns / 1e3)


@dataclass(slots=True)
class Unused:
    """Rows left out, counted by file and reason."""

    _calls: dict[tuple[str, str], Calls] = field(default_factory=dict)

    def add(self, file: str, reason: str, ns: int = 0) -> None:
        self._calls.setdefault((file, reason), Calls()).add(ns)

    def add_calls(self, file: str, reason: str, calls: Calls) -> None:
        """Many rows at once."""
        kept = self._calls.setdefault((file, reason), Calls())
        kept.num += calls.num
        kept.total_ns += calls.total_ns

    def rows(self) -> tuple[LeftOut, ...]:
        """By file, then by reason."""
        ordered = sorted(self._calls.items())
        return tuple(LeftOut(file, reason, c.num, c.total_ns / 1e3) for (file, reason), c in ordered)
