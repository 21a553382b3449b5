"""A step in two micro-batches: while one computes a layer, the other one's activations are exchanged.

    compute        |a1|b1|a2|b2|a3|b3|            each in order, a before b in every layer
    communication     |a1|b1|a2|b2|a3|b3|         what follows a1's exchange, a2, waits for it

Streams are taken not to slow each other down. They do: in xLLM's report (arXiv 2510.14686, table 7) computing takes
1.31 times, and exchanging 1.33 times as long as alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class LayerTime(NamedTuple):
    """Of one micro-batch in one layer, microseconds."""

    compute_us: float
    communication_us: float


class Overlapped(NamedTuple):
    """A step of micro-batches.

    Attributes:
        us: from the first layer's beginning to the last one's end.
        exposed_us: of it, when nothing was computed.
        overlap_frac: of the communication, what was not exposed; 1 without any.
    """

    us: float
    exposed_us: float
    overlap_frac: float


def overlapped(micro_batches: Sequence[LayerTime], num_layers: int) -> Overlapped:
    """A step of alike layers whose micro-batches take turns; of one, nothing overlaps."""
    compute_free_us = link_free_us = 0.0
    ready_us = [0.0] * len(micro_batches)
    for _ in range(num_layers):
        for k, (compute_us, communication_us) in enumerate(micro_batches):
            compute_free_us = max(compute_free_us, ready_us[k]) + compute_us
            link_free_us = max(link_free_us, compute_free_us) + communication_us
            ready_us[k] = link_free_us
    us = max(compute_free_us, link_free_us)
    exposed_us = us - num_layers * sum(m.compute_us for m in micro_batches)
    communication_us = num_layers * sum(m.communication_us for m in micro_batches)
    return Overlapped(us, exposed_us, 1.0 - exposed_us / communication_us if communication_us else 1.0)
