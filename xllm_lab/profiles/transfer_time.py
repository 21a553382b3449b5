"""Latency and bandwidth of a link, fitted to measured collectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xllm_lab.errors import ConfigError
from xllm_lab.profiles.profile import CollectiveRow


class TransferTime(NamedTuple):
    """time = latency + bytes / bandwidth, bytes being the message's, not those on the wire."""

    latency_us: float
    bytes_per_s: float

    def us(self, message_bytes: int) -> float:
        return self.latency_us + message_bytes / self.bytes_per_s * 1e6


def fit_collective(rows: Sequence[CollectiveRow]) -> TransferTime:
    """Least squares of relative errors over rows of one collective and one number of ranks, the latency at least 0.

    Relative, because sizes span many powers of ten and the largest message would decide alone; weighted by calls.

    Raises:
        ConfigError: rows of several collectives or numbers of ranks, fewer than two sizes, sizes unknown, or times that
            do not grow with the size.
    """
    kinds = sorted({f"{row.collective} over {row.num_ranks or 'unknown'} ranks" for row in rows})
    if len(kinds) != 1:
        raise ConfigError(f"{len(kinds)} kinds of collectives ({', '.join(kinds)}); rows of one kind are accepted")
    sizes = [row.message_bytes for row in rows if row.message_bytes is not None]
    if len(sizes) < len(rows) or len(set(sizes)) < 2:
        raise ConfigError(f"{kinds[0]}: {len(set(sizes))} known sizes in {len(rows)} rows; two or more are accepted")
    size, time = np.asarray(sizes, dtype=np.float64), np.asarray([row.mean_us for row in rows])
    weight = np.sqrt([row.num_calls for row in rows]) / time
    # One unknown that bounds the other: without an intercept it is a mean of ratios.
    slope = float(np.linalg.lstsq((size * weight)[:, None], time * weight, rcond=None)[0][0])
    both = np.linalg.lstsq(np.column_stack((weight, size * weight)), time * weight, rcond=None)[0]
    latency_us = float(both[0])
    us_per_byte = float(both[1]) if latency_us >= 0 else slope
    if not us_per_byte > 0:
        raise ConfigError(f"{kinds[0]}: times do not grow with the size; a bandwidth cannot be told")
    return TransferTime(max(latency_us, 0.0), 1e6 / us_per_byte)
