"""Published figures beside ours, whatever made them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One published figure and ours.

    Attributes:
        predicted: `None` if it cannot be modelled; `note` says why.
        is_fitted: the figure helped to fit the constants, so its error is a residual and no prediction's.
        note: what the reader of this row must know.
        assumed: what the source of the table does not say.
    """

    table: str
    what: str
    published: float
    predicted: float | None
    source: str
    is_fitted: bool = False
    note: str = ""
    assumed: str = ""

    @property
    def error_frac(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.published - 1.0


@dataclass(frozen=True, slots=True)
class PublishedValidation:
    """All points, table by table.

    Attributes:
        footnote: what was fitted to what.
    """

    points: tuple[Point, ...]
    footnote: str

    @property
    def tables(self) -> dict[str, tuple[Point, ...]]:
        """The points of each table, in order."""
        names = dict.fromkeys(point.table for point in self.points)
        return {name: tuple(point for point in self.points if point.table == name) for name in names}

    def mean_error_frac(self, table: str, *, is_fitted: bool) -> float | None:
        """Mean of |error| over the rows of a table that were fitted to, or that were not; `None` without any."""
        points = self.tables[table]
        errors = [abs(p.error_frac) for p in points if p.error_frac is not None and p.is_fitted == is_fitted]
        return sum(errors) / len(errors) if errors else None
