"""Open-loop arrival processes: pure functions of a seed that give sorted integer microseconds.

Every process starts with an arrival at 0, so `num` requests span `num - 1` gaps of mean `1 / rate_per_s`. Closed-loop
clients are no arrival process: they answer to the server, and the hosts act them out (`workload.ClosedLoop`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from xllm_lab.errors import ConfigError
from xllm_lab.workload import Workload, stream


def uniform(num: int, rate_per_s: float) -> tuple[int, ...]:
    """`num` arrivals at equal distances, each rounded to the nearest microsecond."""
    _check(num, rate_per_s=rate_per_s)
    return tuple(round(i * 1e6 / rate_per_s) for i in range(num))


def poisson(num: int, rate_per_s: float, seed: int) -> tuple[int, ...]:
    """`num` arrivals of a Poisson process: gaps are exponential, independent of each other."""
    _check(num, rate_per_s=rate_per_s)
    return _after(stream(seed, "arrivals").exponential(1e6 / rate_per_s, num - 1))


def gamma_bursts(num: int, rate_per_s: float, cv: float, seed: int) -> tuple[int, ...]:
    """`num` arrivals with gamma-distributed gaps of coefficient of variation `cv`.

    Shape 1 / cv**2 and scale cv**2 / rate give gaps of mean 1 / rate and standard deviation cv / rate. A `cv` above 1
    comes in bursts, 1 is as irregular as a Poisson process, below 1 is more regular.
    """
    _check(num, rate_per_s=rate_per_s, cv=cv)
    return _after(stream(seed, "arrivals").gamma(1 / cv**2, cv**2 * 1e6 / rate_per_s, num - 1))


def with_arrivals(workload: Workload, arrival_us: Sequence[int]) -> Workload:
    """The same requests in the same order at other times; a client's patience moves with its arrival.

    Raises:
        ConfigError: not one time per request, or times that decrease.
    """
    if len(arrival_us) != len(workload.requests):
        raise ConfigError(f"{len(arrival_us)} arrivals for the {len(workload.requests)} requests of {workload.source}")
    for earlier, later in pairwise(arrival_us):
        if later < earlier:
            raise ConfigError(f"arrivals go from {earlier} us to {later} us; times that never decrease are accepted")
    return replace(
        workload,
        requests=tuple(request.at(int(us)) for request, us in zip(workload.requests, arrival_us, strict=True)),
    )


def rotated(workload: Workload, seed: int) -> Workload:
    """The same requests in the same order, whose gaps begin elsewhere: other requests meet the bursts.

    Gaps, their order and the span stay, so rate and burstiness do, too; seed 0 is the workload as it is. In a closed
    loop, where clients decide when they send, nothing changes, and where all gaps are equal neither.

    Raises:
        ConfigError: a negative seed.
    """
    arrivals_us = np.asarray([r.arrival_us for r in workload.requests], dtype=np.int64)
    if seed == 0 or len(arrivals_us) < 3 or workload.closed_loop is not None:
        return workload
    by = int(stream(seed, "rotation").integers(1, len(arrivals_us) - 1))
    gaps_us = np.roll(np.diff(arrivals_us), by)
    return with_arrivals(workload, [int(us) for us in arrivals_us[0] + np.concatenate(([0], np.cumsum(gaps_us)))])


def _after(gaps_us: npt.NDArray[np.float64]) -> tuple[int, ...]:
    # Rounding the sums rather than the gaps keeps the error below a microsecond however long the trace.
    return (0, *(int(us) for us in np.rint(np.cumsum(gaps_us))))


def _check(num: int, **positive: float) -> None:
    if num < 1:
        raise ConfigError(f"num is {num}, at least 1 is accepted")
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} is {value}, a finite number above 0 is accepted")
