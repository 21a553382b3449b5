"""What the host adds to a step: it schedules, prepares inputs and processes outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xllm_lab.errors import ConfigError
from xllm_lab.sim.cost import Batch, CostModel, GroupCost, Price, Prices


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOverhead:
    """Time the host needs per step.

    Attributes:
        step_us: for any step, however small.
        sequence_us: for each sequence in it, on top.
    """

    step_us: float = 0.0
    sequence_us: float = 0.0

    def __post_init__(self) -> None:
        for name in ("step_us", "sequence_us"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"host overhead: {name} is {value}, a finite number of at least 0 is accepted")

    def us(self, num_seqs: int) -> float:
        """Time the host needs for a step of so many sequences."""
        return self.step_us + self.sequence_us * num_seqs


class Hosted:
    """A device's cost model with a host in front of it.

    Args:
        plans_ahead: the host prepares the next step while the device computes this one, so that the slower of the two
            decides. Otherwise the device waits for the host.
    """

    def __init__(self, device: CostModel, host: HostOverhead, *, plans_ahead: bool = False) -> None:
        self._device = device
        self._host = host
        self._plans_ahead = plans_ahead

    def step(self, batch: Batch) -> Price:
        return self._after_host(self._device.step(batch), batch.num_seqs)

    def _after_host(self, price: Price, num_seqs: int) -> Price:
        host_us = self._host.us(num_seqs)
        return price._replace(us=max(price.us, host_us) if self._plans_ahead else price.us + host_us)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        prices = self._device.decode_steps(batch, num_steps)
        host_us = self._host.us(batch.num_seqs)
        return prices._replace(us=np.maximum(prices.us, host_us) if self._plans_ahead else prices.us + host_us)


class HostedGroup(Hosted):
    """A group's cost model, with a host in front of each instance; the one with most sequences decides."""

    def __init__(self, device: GroupCost, host: HostOverhead, *, plans_ahead: bool = False) -> None:
        super().__init__(device, host, plans_ahead=plans_ahead)
        self._group = device

    def together(self, batches: Sequence[Batch]) -> Price:
        return self._after_host(self._group.together(batches), max(batch.num_seqs for batch in batches))


def fit_host(num_seqs: Sequence[int], host_us: Sequence[float]) -> HostOverhead:
    """Non-negative least squares of measured times, none if there are none."""
    from scipy.optimize import nnls

    if not host_us:
        return HostOverhead()
    factors = np.column_stack([np.ones(len(num_seqs)), np.asarray(num_seqs, dtype=np.float64)])
    (step_us, sequence_us), _ = nnls(factors, np.asarray(host_us, dtype=np.float64))
    return HostOverhead(step_us=float(step_us), sequence_us=float(sequence_us))
