"""Attention time of a batch from measured ones: a table over chunk, its KV, decodes and their KV, and what skew adds.

One kernel computes the whole batch. The table has at most one prefill chunk in a batch; what further chunks add is
their own time without the cost of a call that computes next to nothing. Where decodes of two lengths were measured, a
batch takes as much longer than one of equal lengths as those did that have its longest and its mean length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from xllm_lab.sim.cost.interpolation import Floats, Line, Surface, bracket, line_between, surface_between
from xllm_lab.sim.cost.profile_bundle import Key, SkewShot
from xllm_lab.step_time import Chunk

T = TypeVar("T")


class DecodeTime(NamedTuple):
    """Attention time of so many decodes, as a function of how long they are.

    Attributes:
        line: over their mean KV, if all are equally long.
        skew: what unequal lengths add, as a fraction, over (longest KV, mean / longest); None if not measured.
        is_extrapolated: more decodes than were measured.
    """

    line: Line
    skew: Surface | None
    is_extrapolated: bool

    def us(self, mean_kv: float, max_kv: float) -> float:
        us = self.line(mean_kv)
        return us if self.skew is None else us * (1.0 + self.skew(max_kv, mean_kv / max(max_kv, 1.0)))

    def us_at(self, mean_kv: Floats, max_kv: Floats) -> Floats:
        """The same of many batches, shape [n], bit for bit."""
        us = self.line.at(mean_kv)
        return us if self.skew is None else us * (1.0 + self.skew.at(max_kv, mean_kv / max_kv.clip(1.0)))


class Attention:
    """Attention of one layer.

    Args:
        times: (prefill chunk, KV before it, decodes, KV of each) -> microseconds.
        skew: decodes of two lengths; none at all if unequal lengths are to add nothing.
    """

    def __init__(self, times: Mapping[Key, float], skew: Sequence[SkewShot] = ()) -> None:
        self._lines = _lines(times)
        self._surfaces = _surfaces(skew)
        self._chunks = sorted({chunk for chunk, _ in self._lines if chunk})
        self._skewed_chunks = sorted({chunk for chunk, _ in self._surfaces if chunk})
        # KV before a chunk: for the chunk alone, and with decodes, which not every length was measured with.
        self._before = {c: sorted(kv for chunk, kv in self._lines if chunk == c) for c in self._chunks}
        self._before_mixed = {c: [kv for kv in self._before[c] if max(self._lines[c, kv])] for c in self._chunks}
        self._before_skewed = {c: sorted(kv for chunk, kv in self._surfaces if chunk == c) for c in self._skewed_chunks}
        self._call_us = min(times.values())
        self._decodes: dict[int, DecodeTime] = {}

    def decodes(self, num_decodes: int) -> DecodeTime:
        """A batch of decodes alone."""
        found = self._decodes.get(num_decodes)
        if found is None:
            lines, surfaces = self._lines[0, 0], self._surfaces.get((0, 0))
            found = DecodeTime(
                _blend(lines, bracket(list(lines), num_decodes, extrapolate=True), line_between),
                _blend(surfaces, bracket(list(surfaces), num_decodes, extrapolate=False), surface_between)
                if surfaces
                else None,
                num_decodes > max(lines),
            )
            self._decodes[num_decodes] = found
        return found

    def mixed(self, chunks: Iterable[Chunk], num_decodes: int, mean_kv: float, max_kv: float) -> tuple[float, bool]:
        """Microseconds of a batch with prefill chunks, and whether it is outside the table."""
        largest, *others = sorted(chunks, reverse=True)
        us, is_extrapolated = self._one_chunk(*largest, num_decodes, mean_kv)
        if num_decodes > 1 and self._skewed_chunks:
            us *= 1.0 + self._excess_frac(*largest, num_decodes, max_kv, mean_kv / max(max_kv, 1.0))
        for chunk in others:
            alone, is_outside = self._one_chunk(*chunk, 0, 0.0)
            us += max(alone - self._call_us, 0.0)
            is_extrapolated |= is_outside
        return us, is_extrapolated

    def _one_chunk(self, chunk: int, before: int, num_decodes: int, mean_kv: float) -> tuple[float, bool]:
        us, is_outside = 0.0, chunk > self._chunks[-1]
        before_of = self._before_mixed if num_decodes else self._before
        for size, a in bracket(self._chunks, chunk, extrapolate=True):
            is_outside |= before > before_of[size][-1]
            for kv, b in bracket(before_of[size], before, extrapolate=True):
                lines = self._lines[size, kv]
                for n, c in bracket(list(lines), num_decodes, extrapolate=True):
                    line = lines[n]
                    us += a * b * c * line(mean_kv)
                    is_outside |= n > 0 and mean_kv > line.knots[-1]
                is_outside |= num_decodes > n and c > 1.0
        return us, is_outside

    def _excess_frac(self, chunk: int, before: int, num_decodes: int, max_kv: float, ratio: float) -> float:
        excess = 0.0
        for size, a in bracket(self._skewed_chunks, chunk, extrapolate=False):
            for kv, b in bracket(self._before_skewed[size], before, extrapolate=False):
                surfaces = self._surfaces[size, kv]
                for n, c in bracket(list(surfaces), num_decodes, extrapolate=False):
                    excess += a * b * c * surfaces[n](max_kv, ratio)
        return excess


def _blend(of: Mapping[int, T], shares: Sequence[tuple[int, float]], between: Callable[[T, T, float], T]) -> T:
    first = of[shares[0][0]]
    return first if len(shares) == 1 else between(first, of[shares[1][0]], shares[1][1])


def _lines(times: Mapping[Key, float]) -> dict[tuple[int, int], dict[int, Line]]:
    """(chunk, KV before it) -> decodes, rising -> time over the KV of each."""
    points: dict[tuple[int, int], dict[int, list[tuple[int, float]]]] = {}
    for (chunk, before, decodes, kv), us in sorted(times.items()):
        points.setdefault((chunk, before), {}).setdefault(decodes, []).append((kv, us))
    return {at: {n: Line(*zip(*p, strict=True)) for n, p in by_n.items()} for at, by_n in points.items()}


def _surfaces(shots: Sequence[SkewShot]) -> dict[tuple[int, int], dict[int, Surface]]:
    """(chunk, KV before it) -> decodes, rising -> excess over (longest KV, mean / longest); 0 where all are equal."""
    measured: dict[Key, dict[float, dict[float, float]]] = {}
    for s in shots:
        by_length = measured.setdefault((s.prefill_chunk, s.kv_prefill, s.num_decodes), {})
        by_length.setdefault(s.max_kv, {1.0: 0.0})[s.mean_kv / s.max_kv] = s.excess_frac
    surfaces: dict[tuple[int, int], dict[int, Surface]] = {}
    for (chunk, before, decodes), by_length in sorted(measured.items()):
        lengths = sorted(by_length)
        lines = [Line(*zip(*sorted(by_length[x].items()), strict=True)) for x in lengths]
        ratios = sorted({ratio for line in lines for ratio in line.knots})
        surface = Surface(lengths, ratios, [[line(r) for r in ratios] for line in lines])
        surfaces.setdefault((chunk, before), {})[decodes] = surface
    return surfaces
