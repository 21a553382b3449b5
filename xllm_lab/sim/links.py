"""A link in simulated time. Its arithmetic is `transfers.Wire`; a transfer costs at most one SimPy event."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy

from xllm_lab.fleet_config import LinkConfig
from xllm_lab.policies.routing import InstanceId
from xllm_lab.transfers import Transfer, Wire
from xllm_lab.workload import RequestId

__all__ = ["Link", "Transfer"]


class Link(Wire):
    """A `Wire` that reads simulated time by itself."""

    __slots__ = ("_env",)

    def __init__(
        self,
        env: simpy.Environment,
        config: LinkConfig,
        name: InstanceId,
        record: Callable[[Transfer], None] | None = None,
    ) -> None:
        super().__init__(config, name, record)
        self._env = env

    def send(self, request: RequestId, num_bytes: int) -> Transfer:
        """Queue bytes now. The transfer says when they arrive; nobody is told then, see `transfer`."""
        return self.send_at(int(self._env.now), request, num_bytes)

    def transfer(self, request: RequestId, num_bytes: int) -> Generator[simpy.Event, Any, Transfer]:
        """Send, and wait for the arrival: `yield from link.transfer(...)`. No event if there is nothing to wait for."""
        done = self.send(request, num_bytes)
        if done.end_us > done.queued_us:
            yield self._env.timeout(done.end_us - done.queued_us)
        return done

    def utilisation_frac(self) -> float:
        """Part of the time until now in which the link was sending."""
        now_us = int(self._env.now)
        if now_us == 0:
            return 0.0
        # What is booked beyond now lies there without a gap: nothing is queued for a link that is idle.
        return (self.busy_us - max(0, self.free_us - now_us)) / now_us
