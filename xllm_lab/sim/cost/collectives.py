"""How long devices take to exchange data: a kernel's time and a latency each round, and bytes over a link's bandwidth.

A round ends when every device has what it waits for, which costs as much as starting a kernel. The counts are those of
algorithms that are optimal in bandwidth on a full mesh: every device sends to every other at once. (Thakur,
Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005.)
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm_lab.hardware import Device, Link


@dataclass(frozen=True, slots=True)
class Collectives:
    """Operations among `num_devices` devices; free for a single one."""

    num_devices: int
    link: Link
    kernel_us: float

    def _us(self, rounds: int, num_bytes: float) -> float:
        if self.num_devices == 1:
            return 0.0
        return rounds * (self.kernel_us + self.link.latency_us) + self.link.us(num_bytes)

    def all_gather_us(self, num_bytes: float) -> float:
        """Each gives `num_bytes` and receives everyone's."""
        return self._us(1, (self.num_devices - 1) * num_bytes)

    def reduce_scatter_us(self, num_bytes: float) -> float:
        """Each receives the sum of everyone's part of `num_bytes`."""
        return self._us(1, (self.num_devices - 1) * num_bytes)

    def all_reduce_us(self, num_bytes: float) -> float:
        """Each receives the sum of everyone's `num_bytes`: a reduce-scatter, then an all-gather."""
        return self._us(2, 2 * (self.num_devices - 1) / self.num_devices * num_bytes)

    def all_to_all_us(self, num_bytes: float) -> float:
        """Each sends `num_bytes`, evenly to all, itself included."""
        return self._us(1, (self.num_devices - 1) / self.num_devices * num_bytes)


def collectives(device: Device, num_devices: int) -> Collectives:
    """Operations among so many devices, over a node's link if they fit into a node.

    Raises:
        ConfigError: no link joins so many.
    """
    return Collectives(num_devices, device.link_for(num_devices), device.kernel_us)
