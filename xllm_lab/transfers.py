"""What goes over a link, and when it arrives: bytes enter one after the other, in the order in which they were sent.

Sending occupies the link for `bytes / bytes_per_s`, rounded up to the microsecond; the way to the other end takes
`latency_us` more and occupies nobody. How long each transfer takes is known when it is asked for, so a queue is one
number, the time at which the link is free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


class Wire:
    """A first-come, first-served link. Who asks first at the same microsecond is sent first, and arrives first.

    Attributes:
        num_bytes: asked for so far.
        busy_us: of sending them, what is still queued included.
        free_us: when the link has sent all that was asked for.
    """

    __slots__ = ("_config", "_name", "_record", "busy_us", "free_us", "num_bytes")

    def __init__(self, config: LinkConfig, name: InstanceId, record: Callable[[Transfer], None] | None = None) -> None:
        self._config = config
        self._name = name
        self._record = record
        self.num_bytes = 0
        self.busy_us = 0
        self.free_us = 0

    def send_at(self, now_us: int, request: RequestId, num_bytes: int) -> Transfer:
        """Queue bytes now. The transfer says when they arrive; nobody is told then."""
        assert num_bytes >= 0, f"a message of {num_bytes} bytes"
        rate = self._config.bytes_per_s
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
