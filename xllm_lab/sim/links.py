"""A link in simulated time: bytes enter one after the other, in the order in which they were sent, and arrive later.

Sending occupies the link for `bytes / bytes_per_s`, rounded up to the microsecond; the way to the other end takes
`latency_us` more and occupies nobody. How long each transfer takes is known when it is asked for, so a queue is one
number, the time at which the link is free, and a transfer costs at most one SimPy event.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import simpy

from xllm_lab.fleet_config import LinkConfig
from xllm_lab.policies.api import ceil_div
from xllm_lab.policies.routing import InstanceId
from xllm_lab.workload import RequestId

_US_PER_S = 1_000_000


class Transfer(NamedTuple):
    """One message on a link.

    Attributes:
        link: name of the link; the instance at its end.
        request: whose bytes they are.
        queued_us: when it was asked for.
        start_us: when its first byte is sent, after all that were queued before it.
        sent_us: when its last byte is sent; the link is free for the next one.
        end_us: when its last byte arrives.
    """

    link: InstanceId
    request: RequestId
    num_bytes: int
    queued_us: int
    start_us: int
    sent_us: int
    end_us: int


class Link:
    """A first-come, first-served link. Who asks first at the same microsecond is sent first, and arrives first.

    Attributes:
        num_bytes: asked for so far.
        busy_us: of sending them, what is still queued included.
        free_us: when the link has sent all that was asked for.
    """

    __slots__ = ("_config", "_env", "_name", "_record", "busy_us", "free_us", "num_bytes")

    def __init__(
        self,
        env: simpy.Environment,
        config: LinkConfig,
        name: InstanceId,
        record: Callable[[Transfer], None] | None = None,
    ) -> None:
        self._env = env
        self._config = config
        self._name = name
        self._record = record
        self.num_bytes = 0
        self.busy_us = 0
        self.free_us = 0

    def send(self, request: RequestId, num_bytes: int) -> Transfer:
        """Queue bytes now. The transfer says when they arrive; nobody is told then, see `transfer`."""
        assert num_bytes >= 0, f"a message of {num_bytes} bytes"
        rate = self._config.bytes_per_s
        now_us = int(self._env.now)
        start_us = max(now_us, self.free_us)
        sent_us = start_us + (0 if rate is None else ceil_div(num_bytes * _US_PER_S, rate))
        self.num_bytes += num_bytes
        self.busy_us += sent_us - start_us
        self.free_us = sent_us
        end_us = sent_us + self._config.latency_us
        done = Transfer(self._name, request, num_bytes, now_us, start_us, sent_us, end_us)
        if self._record is not None:
            self._record(done)
        return done

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
