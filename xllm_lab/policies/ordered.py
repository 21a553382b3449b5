"""Lists whose order is a promise of their owner, so that who needs it sorted need not sort."""

from __future__ import annotations

from typing import TypeVar

R = TypeVar("R")


class ByArrival(list[R]):
    """A list that its owner keeps sorted by (arrival_us, id)."""


class ByAdmission(list[R]):
    """A list that its owner keeps sorted by (admitted_us, arrival_us, id)."""
