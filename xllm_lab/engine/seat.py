"""An engine's seat in a fleet: how it comes by its time there, and whom it tells what it does.

An engine that serves alone has none: its feed knows when the next request comes, and nobody waits for its word.
"""

from __future__ import annotations

from typing import Protocol

from xllm_lab.engine.clock import Clock
from xllm_lab.engine.company import Company
from xllm_lab.engine.copies import EngineCopies
from xllm_lab.step import Step


class Seat(Protocol):
    """What `Engine.serve_on` asks, beside its feed."""

    def open_clock(self) -> Clock:
        """The engine is warm; time begins, or has begun. Returns its clock."""
        ...

    @property
    def company(self) -> Company:
        """What is known of engines that share experts with this one; it is there to be written."""
        ...

    @property
    def start_us(self) -> int:
        """When it began to serve."""
        ...

    def planned(self, step: Step) -> None:
        """A step was planned, and is with the device."""
        ...

    def rest(self, copies: EngineCopies | None = None) -> int:
        """There is nothing to do; returns the time when there may be something, or one of the copies is over."""
        ...
