"""Straight lines between measured points, alike for one number and for an array of them.

Below its first point a quantity keeps the first value: no kernel does less than its smallest tile. Beyond its last
point it goes on as between the last two, but never falls. Both forms do the same operations in the same order, so that
they agree bit for bit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Line:
    """A quantity measured at rising points.

    Attributes:
        knots: where it was measured.
        values: what was measured there.
    """

    __slots__ = ("_arrays", "_slopes", "knots", "values")

    def __init__(self, knots: Sequence[float], values: Sequence[float]) -> None:
        assert len(knots) == len(values) > 0, "a line needs a value at each of its knots"
        self.knots = [float(k) for k in knots]
        self.values = [float(v) for v in values]
        rises = zip(self.knots, self.knots[1:], self.values, self.values[1:], strict=False)
        slopes = [(w - v) / (b - a) for a, b, v, w in rises]
        self._slopes = [*slopes, max(0.0, slopes[-1]) if slopes else 0.0]
        self._arrays: tuple[Floats, Floats, Floats] | None = None

    def __call__(self, x: float) -> float:
        knots = self.knots
        i = bisect_right(knots, x) - 1
        if i < 0:
            return self.values[0]
        return self.values[i] + (x - knots[i]) * self._slopes[i]

    def at(self, x: Floats) -> Floats:
        """The same of many points, shape [n]."""
        if self._arrays is None:
            self._arrays = np.array(self.knots), np.array(self.values), np.array(self._slopes)
        knots, values, slopes = self._arrays
        i = np.maximum(np.searchsorted(knots, x, side="right") - 1, 0)
        at: Floats = values[i] + np.maximum(x - knots[i], 0.0) * slopes[i]
        return at


def between(first: Line, second: Line, weight: float) -> Line:
    """The line `weight` of the way from `first` to `second`, which may be more than all of it."""
    knots = sorted({*first.knots, *second.knots})
    return Line(knots, [a + weight * (second(k) - a) for k, a in zip(knots, map(first, knots), strict=True)])


class Surface:
    """A quantity on a full grid of `xs` by `ys`, linear along either; outside, the value at the edge.

    Attributes:
        values: shape [xs, ys].
    """

    __slots__ = ("_array", "values", "xs", "ys")

    def __init__(self, xs: Sequence[float], ys: Sequence[float], values: Sequence[Sequence[float]]) -> None:
        assert len(xs) == len(values) > 0, "a surface needs a row for each x"
        assert all(len(row) == len(ys) for row in values), "a surface needs a value for each y"
        self.xs, self.ys = [float(x) for x in xs], [float(y) for y in ys]
        self.values = [[float(v) for v in row] for row in values]
        self._array: tuple[Floats, Floats, Floats] | None = None

    def __call__(self, x: float, y: float) -> float:
        i, u = _cell(self.xs, x)
        j, v = _cell(self.ys, y)
        low, high = self.values[i], self.values[min(i + 1, len(self.xs) - 1)]
        j1 = min(j + 1, len(self.ys) - 1)
        at_low = low[j] + (low[j1] - low[j]) * v
        at_high = high[j] + (high[j1] - high[j]) * v
        return at_low + (at_high - at_low) * u

    def at(self, x: Floats, y: Floats) -> Floats:
        """The same of many points, both of shape [n]."""
        if self._array is None:
            self._array = np.array(self.xs), np.array(self.ys), np.array(self.values)
        xs, ys, values = self._array
        i, u = _cells(xs, x)
        j, v = _cells(ys, y)
        i1, j1 = np.minimum(i + 1, len(xs) - 1), np.minimum(j + 1, len(ys) - 1)
        at_low = values[i, j] + (values[i, j1] - values[i, j]) * v
        at_high = values[i1, j] + (values[i1, j1] - values[i1, j]) * v
        at: Floats = at_low + (at_high - at_low) * u
        return at


def surface_between(first: Surface, second: Surface, weight: float) -> Surface:
    """The surface `weight` of the way from `first` to `second`."""
    xs, ys = sorted({*first.xs, *second.xs}), sorted({*first.ys, *second.ys})
    rows = [[a + weight * (second(x, y) - a) for y in ys for a in (first(x, y),)] for x in xs]
    return Surface(xs, ys, rows)


def bracket(keys: Sequence[int], x: float, *, extrapolate: bool) -> tuple[tuple[int, float], ...]:
    """The keys that surround `x`, and how much each weighs; the weights sum to 1.

    Beyond the last key the last two go on, if `extrapolate`, with weights below 0 and above 1.
    """
    last = len(keys) - 1
    i = min(max(bisect_right(keys, x) - 1, 0), last)
    if x <= keys[i] or (i == last and not (extrapolate and last)):
        return ((keys[i], 1.0),)
    i = min(i, last - 1)
    weight = (x - keys[i]) / (keys[i + 1] - keys[i])
    return (keys[i], 1.0 - weight), (keys[i + 1], weight)


def nested(rows: Mapping[tuple[int, ...], float]) -> dict[int, dict[tuple[int, ...], float]]:
    """The rows of each first key, in order, without it."""
    grouped: dict[int, dict[tuple[int, ...], float]] = {}
    for key in sorted(rows):
        grouped.setdefault(key[0], {})[key[1:]] = rows[key]
    return grouped


def _cell(knots: list[float], x: float) -> tuple[int, float]:
    inside = min(max(x, knots[0]), knots[-1])
    i = bisect_right(knots, inside) - 1
    if i == len(knots) - 1:
        return i, 0.0
    return i, (inside - knots[i]) / (knots[i + 1] - knots[i])


def _cells(knots: Floats, x: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    inside = np.minimum(np.maximum(x, knots[0]), knots[-1])
    i = np.searchsorted(knots, inside, side="right") - 1
    i1 = np.minimum(i + 1, len(knots) - 1)
    width = np.where(i1 > i, knots[i1] - knots[i], 1.0)
    return i, np.asarray((inside - knots[i]) / width)
