"""The same requests at other times: what a difference is worth depends on how much chance alone makes.

Gaps between arrivals are dealt out anew in runs of neighbours, so a burst stays a burst and comes at another time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from scipy import stats

from xllm_lab.arrivals import with_arrivals
from xllm_lab.workload import Workload, stream

RUN_OF_GAPS = 16
CONFIDENCE = 0.95


def reseeded(workload: Workload, seed: int) -> Workload:
    """Seed 0 is the trace as it was; a closed loop has no arrivals to change."""
    if seed == 0 or workload.closed_loop is not None:
        return workload
    arrivals = [r.arrival_us for r in workload.requests]
    gaps = [b - a for a, b in pairwise(arrivals)]
    random = stream(seed, "arrivals of a trial")
    shift = int(random.integers(RUN_OF_GAPS))
    edges = [0, *range(shift or RUN_OF_GAPS, len(gaps), RUN_OF_GAPS), len(gaps)]
    runs = [gaps[a:b] for a, b in pairwise(edges) if a < b]
    now, later = arrivals[0], [arrivals[0]]
    for k in random.permutation(len(runs)).tolist():
        for gap in runs[k]:
            now += gap
            later.append(now)
    return with_arrivals(workload, later)


def noise_frac(goodputs_per_s: Sequence[float]) -> float:
    """Of one configuration at several seeds: what two means of as many runs differ by, by chance alone.

    Half the width of the 95 % interval of the difference, relative to the mean; 0 for fewer than two, or no goodput.
    """
    count, mean = len(goodputs_per_s), math.fsum(goodputs_per_s) / max(1, len(goodputs_per_s))
    if count < 2 or mean <= 0:
        return 0.0
    variance = math.fsum((g - mean) ** 2 for g in goodputs_per_s) / (count - 1)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, 2 * count - 2))
    return quantile * math.sqrt(2 * variance / count) / mean
