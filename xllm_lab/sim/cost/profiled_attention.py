"""Attention time of a batch from measured ones: a table over chunk, its KV, decodes and their KV, and what skew adds.

One kernel computes the whole batch. The table has at most one prefill chunk in a batch; what further chunks add is
their own time without the cost of a call that computes next to nothing. Where decodes of two lengths were measured, a
batch takes as much longer than one of equal lengths as those did that have its longest and its mean length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from xllm_lab.sim.cost.interpolation import Floats, Line, Surface, between, bracket, surface_between
from xllm_lab.sim.cost.profile_bundle import Key, SkewShot
from xllm_lab.step_time import Chunk


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
        # chunk -> KV before it -> decodes -> line over the decodes' KV
        self._lines = _lines(times)
        self._surfaces = _surfaces(skew)
        self._chunks = sorted(c for c in self._lines if c)
        self._skewed_chunks = sorted(c for c in self._surfaces if c)
        self._call_us = min(times.values())
        self._line_of: dict[Key, Line] = {}
        self._surface_of: dict[Key, Surface] = {}
        self._decodes: dict[int, DecodeTime] = {}

    def decodes(self, num_decodes: int) -> DecodeTime:
        """A batch of decodes alone."""
        found = self._decodes.get(num_decodes)
        if found is None:
            skew = self._surface(0, 0, num_decodes) if self._surfaces.get(0) else None
            found = DecodeTime(self._line(0, 0, num_decodes), skew, num_decodes > max(self._lines[0][0]))
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
        for size, weight in bracket(self._chunks, chunk, extrapolate=True):
            lengths = [kv for kv, by_decodes in self._lines[size].items() if not num_decodes or len(by_decodes) > 1]
            is_outside |= before > lengths[-1]
            for kv, share in bracket(lengths, before, extrapolate=True):
                line = self._line(size, kv, num_decodes)
                is_outside |= mean_kv > line.knots[-1] or num_decodes > max(self._lines[size][kv])
                us += weight * share * line(mean_kv)
        return us, is_outside

    def _excess_frac(self, chunk: int, before: int, num_decodes: int, max_kv: float, ratio: float) -> float:
        excess = 0.0
        for size, weight in bracket(self._skewed_chunks, chunk, extrapolate=False):
            for kv, share in bracket(sorted(self._surfaces[size]), before, extrapolate=False):
                excess += weight * share * self._surface(size, kv, num_decodes)(max_kv, ratio)
        return excess

    def _line(self, chunk: int, before: int, num_decodes: int) -> Line:
        key = (chunk, before, num_decodes)
        found = self._line_of.get(key)
        if found is None:
            lines = self._lines[chunk][before]
            (low, _), *more = bracket(sorted(lines), num_decodes, extrapolate=True)
            found = between(lines[low], lines[more[0][0]], more[0][1]) if more else lines[low]
            self._line_of[key] = found
        return found

    def _surface(self, chunk: int, before: int, num_decodes: int) -> Surface:
        key = (chunk, before, num_decodes)
        found = self._surface_of.get(key)
        if found is None:
            surfaces = self._surfaces[chunk][before]
            (low, _), *more = bracket(sorted(surfaces), num_decodes, extrapolate=False)
            found = surface_between(surfaces[low], surfaces[more[0][0]], more[0][1]) if more else surfaces[low]
            self._surface_of[key] = found
        return found


def _lines(times: Mapping[Key, float]) -> dict[int, dict[int, dict[int, Line]]]:
    points: dict[int, dict[int, dict[int, list[tuple[int, float]]]]] = {}
    for (chunk, before, decodes, kv), us in sorted(times.items()):
        points.setdefault(chunk, {}).setdefault(before, {}).setdefault(decodes, []).append((kv, us))
    return {
        chunk: {before: {n: Line(*zip(*p, strict=True)) for n, p in by_n.items()} for before, by_n in by_before.items()}
        for chunk, by_before in points.items()
    }


def _surfaces(shots: Sequence[SkewShot]) -> dict[int, dict[int, dict[int, Surface]]]:
    """chunk -> KV before it -> decodes -> excess over (longest KV, mean / longest); 0 where all are equally long."""
    measured: dict[Key, dict[float, dict[float, float]]] = {}
    for s in shots:
        by_length = measured.setdefault((s.prefill_chunk, s.kv_prefill, s.num_decodes), {})
        by_length.setdefault(s.max_kv, {1.0: 0.0})[s.mean_kv / s.max_kv] = s.excess_frac
    surfaces: dict[int, dict[int, dict[int, Surface]]] = {}
    for (chunk, before, decodes), by_length in sorted(measured.items()):
        lengths = sorted(by_length)
        lines = [Line(*zip(*sorted(by_length[x].items()), strict=True)) for x in lengths]
        ratios = sorted({ratio for line in lines for ratio in line.knots})
        surface = Surface(lengths, ratios, [[line(r) for r in ratios] for line in lines])
        surfaces.setdefault(chunk, {}).setdefault(before, {})[decodes] = surface
    return surfaces
