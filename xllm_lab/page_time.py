"""How long it takes to map pages of virtual KV, as a sum of terms; fitted to what an engine measured, or given.

us = map_run_us   * runs of pages whose blocks lie one behind the other
   + map_page_us  * pages in them
   + unmap_run_us * runs of pages that are unmapped
   + unmap_page_us * pages in them

A CPU maps a run by one call for each layer's keys and values; accelerators map page by page, whatever the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xllm_lab.errors import ConfigError
from xllm_lab.step import PageMoves, PageRun


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTime:
    """Microseconds of each term."""

    map_run_us: float = 0.0
    map_page_us: float = 0.0
    unmap_run_us: float = 0.0
    unmap_page_us: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value}, a finite time of at least 0 is accepted")

    def map_us(self, runs: Sequence[PageRun]) -> float:
        return self.map_run_us * len(runs) + self.map_page_us * sum([run.num_pages for run in runs])

    def unmap_us(self, runs: Sequence[PageRun]) -> float:
        return self.unmap_run_us * len(runs) + self.unmap_page_us * sum([run.num_pages for run in runs])

    def beside_us(self, moves: PageMoves) -> float:
        """Of what happens while the step runs."""
        return self.map_us(moves.ahead) + self.unmap_us(moves.unmaps)


class Mapped(NamedTuple):
    """What was mapped and unmapped in one go, and how long that took."""

    maps: Sequence[PageRun]
    unmaps: Sequence[PageRun]
    us: float


def fit_page_time(mapped: Iterable[Mapped]) -> PageTime | None:
    """Non-negative least squares; None where nothing was mapped."""
    from scipy.optimize import nnls

    rows = [
        (len(m.maps), sum(r.num_pages for r in m.maps), len(m.unmaps), sum(r.num_pages for r in m.unmaps), m.us)
        for m in mapped
        if m.maps or m.unmaps
    ]
    if not rows:
        return None
    table = np.asarray(rows, dtype=np.float64)
    scale = np.maximum(table[:, :4].max(axis=0), 1.0)
    found, _ = nnls(table[:, :4] / scale, table[:, 4])
    return PageTime(**dict(zip(PageTime.__slots__, (found / scale).tolist(), strict=True)))
