"""Lines and surfaces: the measured points themselves, and one number as in an array."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.sim.cost.interpolation import Line, Surface, bracket, line_between, surface_between

numbers = st.floats(0, 1e5, allow_nan=False)
rising = st.lists(st.integers(0, 5000), min_size=1, max_size=8, unique=True).map(sorted)


@st.composite
def lines(draw: st.DrawFn) -> Line:
    knots = draw(rising)
    return Line(knots, draw(st.lists(numbers, min_size=len(knots), max_size=len(knots))))


@st.composite
def surfaces(draw: st.DrawFn) -> Surface:
    xs, ys = draw(rising), draw(rising)
    row = st.lists(numbers, min_size=len(ys), max_size=len(ys))
    return Surface(xs, ys, draw(st.lists(row, min_size=len(xs), max_size=len(xs))))


@given(lines(), st.lists(st.floats(-10, 6000), min_size=1, max_size=20))
def test_a_line_is_the_same_for_many(line: Line, xs: list[float]) -> None:
    assert line.at(np.array(xs)).tolist() == [line(x) for x in xs]


@given(surfaces(), st.lists(st.tuples(st.floats(-10, 6000), st.floats(-10, 6000)), min_size=1, max_size=20))
def test_a_surface_is_the_same_for_many(surface: Surface, at: list[tuple[float, float]]) -> None:
    x, y = (np.array(c) for c in zip(*at, strict=True))
    assert surface.at(x, y).tolist() == [surface(*p) for p in at]


@given(lines())
def test_a_line_passes_through_its_points_and_never_falls_beyond_them(line: Line) -> None:
    assert [line(k) for k in line.knots] == line.values
    assert line(line.knots[0] - 1) == line.values[0]
    assert line(line.knots[-1] + 100) >= line.values[-1]


@given(surfaces())
def test_a_surface_passes_through_its_points_and_ends_at_its_edge(surface: Surface) -> None:
    assert [[surface(x, y) for y in surface.ys] for x in surface.xs] == surface.values
    assert surface(surface.xs[-1] + 10, surface.ys[0] - 10) == surface.values[-1][0]


def test_between_two_points_it_is_straight() -> None:
    assert Line([0, 10], [1, 3])(5) == 2
    assert Line([0, 10], [1, 3])(20) == 5
    assert Line([0, 10], [3, 1])(20) == 1
    assert Surface([0, 2], [0, 4], [[0, 8], [2, 2]])(1, 1) == 2


@given(lines(), lines(), st.floats(0, 1), st.floats(0, 5000))
def test_between_two_lines(first: Line, second: Line, weight: float, x: float) -> None:
    expected = first(x) + weight * (second(x) - first(x))
    lowest = max(first.knots[0], second.knots[0])
    highest = min(first.knots[-1], second.knots[-1])
    if lowest <= x <= highest:
        assert np.isclose(line_between(first, second, weight)(x), expected, rtol=1e-6, atol=1e-6)


@given(surfaces(), st.floats(0, 1))
def test_a_surface_between_itself(surface: Surface, weight: float) -> None:
    assert surface_between(surface, surface, weight).values == surface.values


@given(rising, st.floats(0, 6000), st.booleans())
def test_a_bracket_weighs_one_and_hits_its_keys(keys: list[int], x: float, extrapolate: bool) -> None:
    shares = bracket(keys, x, extrapolate=extrapolate)
    assert np.isclose(sum(share for _, share in shares), 1)
    if keys[0] <= x and (x <= keys[-1] or (extrapolate and len(keys) > 1)):
        assert np.isclose(sum(key * share for key, share in shares), x)
    for key in keys:
        assert bracket(keys, key, extrapolate=extrapolate) == ((key, 1.0),)
