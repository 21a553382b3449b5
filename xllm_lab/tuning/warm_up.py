"""How much of a run is warm-up: the requests that came before the prefix cache had what it will have."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

from xllm_lab.records import RequestRecord

# A rise this unlikely by chance is a rise.
_LEVEL = 0.05
_NUM_PARTS = 10


def num_warm_up(requests: Sequence[RequestRecord]) -> int | None:
    """The fewest first requests, in tenths of all, after which the hit rate rises no more; None: it still does.

    At most the first half is warm-up: what still rises then was never warm. Kendall's rank correlation of hit rate and
    order of arrival, one-sided, needs no distribution, and hits are mostly nothing or nearly everything. It cannot
    tell a rise from chance among fewer than four requests that differ.
    """
    ordered = sorted((r for r in requests if r.first_scheduled_us is not None), key=lambda r: (r.arrival_us, r.id))
    hits = [r.cached_tokens / r.prompt_tokens for r in ordered]
    for part in range(_NUM_PARTS // 2 + 1):
        first = len(hits) * part // _NUM_PARTS
        if not _rises(hits[first:]):
            return first
    return None


def after(requests: Sequence[RequestRecord], num: int) -> list[RequestRecord]:
    """All but the first `num` to arrive, in order of id."""
    ordered = sorted(requests, key=lambda r: (r.arrival_us, r.id))
    return sorted(ordered[num:], key=lambda r: r.id)


def _rises(hits: Sequence[float]) -> bool:
    if len(set(hits)) < 2:
        return False
    found = stats.kendalltau(range(len(hits)), hits, alternative="greater")
    return not math.isnan(found.pvalue) and float(found.pvalue) < _LEVEL
