"""Straight lines between measured points, alike for one number and for an array of them.

Below its first point a quantity keeps the first value: no kernel does less than its smallest tile. Beyond its last
point it goes on as between the last two, but never falls. Both forms do the same operations in the same order, so that
they agree bit for bit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
K = TypeVar("K", int, float)


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
        slopes = [_slope(*ends) for ends in zip(self.knots, self.knots[1:], self.values, self.values[1:], strict=False)]
        self._slopes = [*slopes, max(0.0, slopes[-1]) if slopes else 0.0]
        self._arrays: tuple[Floats, Floats, Floats] | None = None

    def __call__(self, x: float) -> float:
        i = bisect_right(self.knots, x) - 1
        return self.values[i] + (x - self.knots[i]) * self._slopes[i] if i >= 0 else self.values[0]

    def at(self, x: Floats) -> Floats:
        """The same of many points, shape [n]."""
        if self._arrays is None:
            self._arrays = np.array(self.knots), np.array(self.values), np.array(self._slopes)
        knots, values, slopes = self._arrays
        inside = np.maximum(x, knots[0])
        i = knots.searchsorted(inside, side="right") - 1
        at: Floats = values.take(i) + (inside - knots.take(i)) * slopes.take(i)
        return at


class Surface:
    """A quantity on a full grid of `xs` by `ys`, linear along either; outside, the value at the edge.

    Attributes:
        values: shape [xs, ys].
    """

    __slots__ = ("_arrays", "_cells", "values", "xs", "ys")

    def __init__(self, xs: Sequence[float], ys: Sequence[float], values: Sequence[Sequence[float]]) -> None:
        assert len(xs) == len(values) > 0, "a surface needs a row for each x"
        assert all(len(row) == len(ys) > 0 for row in values), "a surface needs a value for each y"
        self.xs, self.ys = [float(x) for x in xs], [float(y) for y in ys]
        self.values = [[float(v) for v in row] for row in values]
        self._cells = [[self._cell(i, j) for j in range(len(ys))] for i in range(len(xs))]
        self._arrays: tuple[Floats, Floats, tuple[Floats, ...]] | None = None

    def _cell(self, i: int, j: int) -> tuple[float, float, float, float]:
        """Value at its lower corner, rise along x, rise along y, and how the rise along y rises along x."""
        i1, j1 = min(i + 1, len(self.xs) - 1), min(j + 1, len(self.ys) - 1)
        x, x1, y, y1 = self.xs[i], self.xs[i1], self.ys[j], self.ys[j1]
        corner, along_y = self.values[i][j], _slope(y, y1, self.values[i][j], self.values[i][j1])
        along_x = _slope(x, x1, corner, self.values[i1][j])
        return corner, along_x, along_y, _slope(x, x1, along_y, _slope(y, y1, self.values[i1][j], self.values[i1][j1]))

    def __call__(self, x: float, y: float) -> float:
        xs, ys = self.xs, self.ys
        x, y = min(max(x, xs[0]), xs[-1]), min(max(y, ys[0]), ys[-1])
        i, j = bisect_right(xs, x) - 1, bisect_right(ys, y) - 1
        corner, along_x, along_y, twist = self._cells[i][j]
        dx = x - xs[i]
        return corner + along_x * dx + (along_y + twist * dx) * (y - ys[j])

    def at(self, x: Floats, y: Floats) -> Floats:
        """The same of many points, both of shape [n]."""
        if self._arrays is None:
            columns = tuple(np.array(self._cells).reshape(-1, 4).T.copy())
            self._arrays = np.array(self.xs), np.array(self.ys), columns
        xs, ys, (corner, along_x, along_y, twist) = self._arrays
        x, y = np.minimum(np.maximum(x, xs[0]), xs[-1]), np.minimum(np.maximum(y, ys[0]), ys[-1])
        i, j = xs.searchsorted(x, side="right") - 1, ys.searchsorted(y, side="right") - 1
        cell = i * len(ys) + j
        dx = x - xs.take(i)
        along = along_y.take(cell) + twist.take(cell) * dx
        at: Floats = corner.take(cell) + along_x.take(cell) * dx + along * (y - ys.take(j))
        return at


def line_between(first: Line, second: Line, weight: float) -> Line:
    """The line `weight` of the way from `first` to `second`, which may be more than all of it."""
    knots = sorted({*first.knots, *second.knots})
    return Line(knots, [first(k) + weight * (second(k) - first(k)) for k in knots])


def surface_between(first: Surface, second: Surface, weight: float) -> Surface:
    """The surface `weight` of the way from `first` to `second`."""
    xs, ys = sorted({*first.xs, *second.xs}), sorted({*first.ys, *second.ys})
    return Surface(xs, ys, [[first(x, y) + weight * (second(x, y) - first(x, y)) for y in ys] for x in xs])


def bracket(keys: Sequence[K], x: float, *, extrapolate: bool) -> tuple[tuple[K, float], ...]:
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


def _slope(a: float, b: float, at_a: float, at_b: float) -> float:
    return (at_b - at_a) / (b - a) if b > a else 0.0
