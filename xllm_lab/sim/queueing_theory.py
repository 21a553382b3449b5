"""The simulator against queueing theory: one instance as the server of a queue whose mean wait is known in closed form.

Requests ask for one token, so that each is one step; the cost model makes a step's time an exact function of its
tokens; prompt lengths then are service times. A batch of at most one request makes the instance a single server:

    M/G/1   mean wait  rate E[S^2] / (2 (1 - rate E[S]))        Pollaczek (1930), Khinchine (1932)
    M/M/1, M/D/1       the same with E[S^2] = 2 E[S]^2 and E[S]^2, up to whole tokens

and a batch without limit, whose step takes as long whatever is in it: a bus that leaves when it is back
(`bus_wait_us`).

Runs begin in the steady state, not empty, so that there is no warm-up to cut. The work that a Poisson arrival finds is
a geometric number of residual services: request 0 is that long, and arrives together with the first one that counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from xllm_lab.arrivals import poisson, with_arrivals
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import e2e_us, queue_us
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.sim.cost import Batch, CostModel, Price, Prices
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.workload import Prompt, Request, RequestId, Workload, stream

US_PER_TOKEN = 10
Ints = npt.NDArray[np.int64]


class Service(Protocol):
    """A distribution of service times in whole tokens, at least 1, with its exact moments."""

    @property
    def mean(self) -> float: ...
    @property
    def mean_square(self) -> float: ...
    def draw(self, rng: np.random.Generator, count: int) -> Ints: ...
    def draw_by_length(self, rng: np.random.Generator, count: int) -> Ints:
        """What is found in service at a random time: longer ones are found in proportion to their length."""
        ...


@dataclass(frozen=True)
class Fixed:
    """M/D/1."""

    tokens: int = 1000

    @property
    def mean(self) -> float:
        return float(self.tokens)

    @property
    def mean_square(self) -> float:
        return float(self.tokens) ** 2

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        return np.full(count, self.tokens)

    draw_by_length = draw


@dataclass(frozen=True)
class Memoryless:
    """M/M/1: geometric, the exponential distribution of whole tokens."""

    tokens: int = 1000

    @property
    def mean(self) -> float:
        return float(self.tokens)

    @property
    def mean_square(self) -> float:
        return (2 - 1 / self.tokens) * self.tokens**2

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        return rng.geometric(1 / self.tokens, count)

    def draw_by_length(self, rng: np.random.Generator, count: int) -> Ints:
        return self.draw(rng, count) + self.draw(rng, count) - 1


@dataclass(frozen=True)
class TwoLengths:
    """M/G/1 as chats and documents make it: most prompts short, `long_frac` of them long."""

    short: int = 500
    long: int = 5500
    long_frac: float = 0.1

    @property
    def mean(self) -> float:
        return (1 - self.long_frac) * self.short + self.long_frac * self.long

    @property
    def mean_square(self) -> float:
        return (1 - self.long_frac) * self.short**2 + self.long_frac * self.long**2

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        return np.where(rng.random(count) < self.long_frac, self.long, self.short)

    def draw_by_length(self, rng: np.random.Generator, count: int) -> Ints:
        long_frac = self.long_frac * self.long / self.mean
        return np.where(rng.random(count) < long_frac, self.long, self.short)


def mean_wait_us(service: Service, utilisation: float) -> float:
    """Pollaczek-Khinchine: mean time from arrival to the start of service, first come, first served."""
    rate_per_token = utilisation / service.mean
    return rate_per_token * service.mean_square / (2 * (1 - utilisation)) * US_PER_TOKEN


def bus_wait_us(rate_per_step: float, step_us: int) -> float:
    """Mean wait where each step of `step_us` takes all that wait, with `rate_per_step` arrivals a step on average.

    A busy period has e^r steps on average, since a step is the last one if none of the r expected arrivals comes; idle
    ones last 1/r steps. Who arrives in a step, waits half of one on average, and who arrives while it is idle, not.
    """
    busy = rate_per_step * math.exp(rate_per_step)
    return busy / (1 + busy) * step_us / 2


@dataclass(frozen=True)
class PerToken:
    """Cost model: a step takes `US_PER_TOKEN` a token."""

    def step(self, batch: Batch) -> Price:
        return Price(float(US_PER_TOKEN * batch.num_tokens))

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        return Prices(np.full(num_steps, self.step(batch).us), np.zeros(num_steps, dtype=np.bool_))


@dataclass(frozen=True)
class PerStep:
    """Cost model: a step takes as long, whatever is in it."""

    step_us: int

    def step(self, batch: Batch) -> Price:
        return Price(float(self.step_us))

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        return Prices(np.full(num_steps, float(self.step_us)), np.zeros(num_steps, dtype=np.bool_))


def queue(service: Service, utilisation: float, count: int, seed: int) -> Workload:
    """`count` requests that arrive as a Poisson process; before them request 0, the work that the first one finds."""
    rng = stream(seed, "service")
    in_service = service.draw_by_length(rng, rng.geometric(1 - utilisation) - 1)
    found = round(float((in_service * rng.random(len(in_service))).sum()))
    arrivals = _poisson(service.draw(rng, count), utilisation / service.mean / US_PER_TOKEN * 1e6, seed)
    return replace(arrivals, requests=(_request(0, found), *arrivals.requests)) if found else arrivals


def bus(rate_per_step: float, step_us: int, count: int, seed: int) -> Workload:
    """Poisson arrivals for `PerStep`; from empty, which a few steps forget."""
    return _poisson(np.ones(count, dtype=np.int64), rate_per_step / step_us * 1e6, seed)


def served(workload: Workload, cost: CostModel, *, max_seqs_per_batch: int) -> Records:
    """The workload served by an instance that never lacks KV or tokens."""
    config = InstanceConfig(
        max_tokens_per_batch=2**40,
        max_seqs_per_batch=max_seqs_per_batch,
        block_size=2**20,
        num_kv_blocks=2**12,
        enable_prefix_cache=False,
        max_model_len=2**40,
    )
    return run_simulation(workload, config, Policies(Fcfs()), Predicted(cost), vocab_size=1000)


def waits_us(records: Records) -> Ints:
    """Of the requests that count, in order of arrival."""
    return np.asarray([queue_us(r) for r in records.requests if r.id > 0], dtype=np.int64)


def num_left_behind(records: Records) -> float:
    """Requests in a single server's system when one leaves it, on average, from the records of steps alone."""
    left = [
        later.num_waiting + len(later.ids) if later.start_us == step.end_us else 0
        for step, later in pairwise(records.steps)
    ]
    return float(np.mean([*left, 0]))


def num_by_little(records: Records) -> float:
    """Little's law: arrivals per time, times the mean time in the system, from the records of requests alone."""
    requests = records.requests
    rate = (len(requests) - 1) / (requests[-1].arrival_us - requests[0].arrival_us)
    return rate * float(np.mean([e2e_us(r) for r in requests]))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean of independent runs, and half of its confidence interval by Student's t."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = 0.99) -> Estimate:
        count = len(values)
        quantile = float(stdtrit(count - 1, 0.5 + 0.5 * confidence))
        return cls(mean=float(np.mean(values)), half_width=quantile * float(np.std(values, ddof=1)) / count**0.5)

    def holds(self, value: float) -> bool:
        """Whether the interval, a microsecond wider, holds the value.

        Arrivals are rounded to whole microseconds, not gaps: each moves by at most half of one, and a wait, a
        difference of two arrivals less services, by at most one.
        """
        return abs(value - self.mean) <= self.half_width + 1


def _poisson(lengths: Ints, rate_per_s: float, seed: int) -> Workload:
    requests = tuple(_request(1 + k, int(length)) for k, length in enumerate(lengths))
    return with_arrivals(Workload(requests=requests), poisson(len(lengths), rate_per_s, seed))


def _request(request_id: int, num_tokens: int) -> Request:
    return Request(id=RequestId(request_id), arrival_us=0, prompt=Prompt(num_tokens=num_tokens), output_tokens=1)
