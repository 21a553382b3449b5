"""Straight lines on which axes? Each inner point of a profile's grids is left out and predicted from its neighbours.

    python benchmarks/profile_axes.py PROFILE...      folders with meta.yaml and tpN/

Nothing but the profile is looked at. Printed: median and 90th percentile of |error| per axis and way of interpolating.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from xllm_lab.sim.cost.profile_bundle import ProfileBundle, read_bundle

AXES = ("prefill chunk", "KV before it", "decodes", "KV of each")
WAYS: dict[str, tuple[Callable[[float], float], Callable[[float], float], Callable[[float], float]]] = {
    "linear": (float, float, float),
    "log axis": (math.log2, float, float),
    "log axis, log time": (math.log2, math.log, math.exp),
}


def inner_points(bundle: ProfileBundle, axis: int) -> Iterator[tuple[list[tuple[float, float]], tuple[float, float]]]:
    """(both neighbours, the point between them) along an axis of the attention table."""
    lines: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    for key, us in bundle.attention.items():
        if key[axis] > 0:
            lines.setdefault((*key[:axis], *key[axis + 1 :]), []).append((key[axis], us))
    for points in lines.values():
        yield from _triples(points)


def dense_points(bundle: ProfileBundle) -> Iterator[tuple[list[tuple[float, float]], tuple[float, float]]]:
    for times in (*bundle.dense.values(), *bundle.per_sequence.values()):
        yield from _triples(list(times.items()))


def _triples(points: list[tuple[int, float]]) -> Iterator[tuple[list[tuple[float, float]], tuple[float, float]]]:
    ordered = sorted(points)
    for low, point, high in zip(ordered, ordered[1:], ordered[2:], strict=False):
        yield [low, high], point


def errors(points: list[tuple[list[tuple[float, float]], tuple[float, float]]], way: str) -> np.ndarray:
    of_x, of_us, back = WAYS[way]
    found = []
    for ((x0, us0), (x1, us1)), (x, us) in points:
        weight = (of_x(x) - of_x(x0)) / (of_x(x1) - of_x(x0))
        found.append(abs(back(of_us(us0) + weight * (of_us(us1) - of_us(us0))) / us - 1))
    return np.array(found)


def main(folders: list[str]) -> None:
    for folder in folders:
        bundle = read_bundle(Path(folder))
        print(folder)
        tables = {name: list(inner_points(bundle, axis)) for axis, name in enumerate(AXES)}
        tables["tokens or rows"] = list(dense_points(bundle))
        for name, points in tables.items():
            told = ", ".join(
                f"{way} {np.median(e):.1%} / {np.percentile(e, 90):.1%}" for way in WAYS for e in (errors(points, way),)
            )
            print(f"  {name:<16}{len(points):>6} points: {told}")


if __name__ == "__main__":
    main(sys.argv[1:])
