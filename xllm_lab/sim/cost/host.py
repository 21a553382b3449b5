"""What the host adds to a step: it schedules, prepares inputs and processes outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from xllm_lab.errors import ConfigError
from xllm_lab.sim.cost import Batch, CostModel, Price, Prices


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOverhead:
    """Time the host needs per step.

    Attributes:
        step_us: for any step, however small.
        sequence_us: for each sequence in it, on top.
        is_async: the host prepares the next step while the device computes this one, so that the slower of the two
            decides. Otherwise the device waits for the host.
    """

    step_us: float = 0.0
    sequence_us: float = 0.0
    is_async: bool = False

    def __post_init__(self) -> None:
        for name in ("step_us", "sequence_us"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"host overhead: {name} is {value}, a finite number of at least 0 is accepted")

    def us(self, num_seqs: int) -> float:
        """Time the host needs for a step of so many sequences."""
        return self.step_us + self.sequence_us * num_seqs


class Hosted:
    """A device's cost model with a host in front of it."""

    def __init__(self, device: CostModel, host: HostOverhead) -> None:
        self._device = device
        self._host = host

    def step(self, batch: Batch) -> Price:
        price = self._device.step(batch)
        host_us = self._host.us(batch.num_seqs)
        us = max(price.us, host_us) if self._host.is_async else price.us + host_us
        return Price(us, price.is_extrapolated)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        prices = self._device.decode_steps(batch, num_steps)
        host_us = self._host.us(batch.num_seqs)
        us = np.maximum(prices.us, host_us) if self._host.is_async else prices.us + host_us
        return Prices(us, prices.is_extrapolated)
