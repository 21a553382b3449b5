"""Engines that share experts and have requests of their own: each step is everybody's, until nobody has one.

    instance 0   | prefill | decode  | decode  |
    instance 1   | beside  | prefill | decode  |  rest

All say before each step how many tokens they have in it. Whoever has none takes part for its experts, and looks at what
came meanwhile. When nobody has a request, all rest until they are called.

A call is a request that came to any of them: all hear of it. A rest begins when all have heard of the same calls, so
nobody waits for one that rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Company:
    """What one engine knows of all.

    Attributes:
        num_calls: of which it has heard; the host writes it, and the device's thread tells it.
        met_calls: of which all had heard when they met last.
        goes_on: whether somebody had a request then, or had heard less than another.
    """

    num_calls: int = 0
    met_calls: int = 0
    goes_on: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether the others have a step to take, or will have."""
        return self.goes_on or self.num_calls > self.met_calls

    def met(self, requests: Sequence[int], calls: Sequence[int]) -> None:
        """What all said before a step: whether they have requests, and the calls that they had heard of."""
        self.met_calls = min(calls)
        self.goes_on = any(requests) or self.met_calls < max(calls)
