"""A gain from paired replays, with Student's interval: few pairs, each of which cancels what both of it suffered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from xllm_lab.errors import ConfigError

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Goodput of the candidate against the default, from paired replays.

    Attributes:
        default_per_s, tuned_per_s: goodput of each replay, tokens per second, in order.
        gain_frac: mean difference / mean of the default; None if the default's is 0.
        low_frac, high_frac: 95 % confidence interval of the gain, Student's t on the paired differences.
    """

    default_per_s: tuple[float, ...]
    tuned_per_s: tuple[float, ...]
    gain_frac: float | None
    low_frac: float | None
    high_frac: float | None

    @property
    def is_better(self) -> bool:
        """The whole interval lies above 0."""
        return self.low_frac is not None and self.low_frac > 0


def paired_gain(default_per_s: Sequence[float], tuned_per_s: Sequence[float]) -> Gain:
    """Mean paired difference with its confidence interval, as fractions of the default's mean.

    Raises:
        ConfigError: fewer than two pairs, or sequences of different lengths.
    """
    count = len(default_per_s)
    if count < 2 or count != len(tuned_per_s):
        raise ConfigError(f"{count} and {len(tuned_per_s)} measurements; accepted: as many of each, at least 2")
    differences = [b - a for a, b in zip(default_per_s, tuned_per_s, strict=True)]
    mean_default = sum(default_per_s) / count
    mean = sum(differences) / count
    if mean_default == 0:
        return Gain(
            default_per_s=tuple(default_per_s),
            tuned_per_s=tuple(tuned_per_s),
            gain_frac=None,
            low_frac=None,
            high_frac=None,
        )
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return Gain(
        default_per_s=tuple(default_per_s),
        tuned_per_s=tuple(tuned_per_s),
        gain_frac=mean / mean_default,
        low_frac=(mean - half) / mean_default,
        high_frac=(mean + half) / mean_default,
    )
