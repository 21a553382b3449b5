"""The device's lane on a clock that moves when told: what runs when, and how long the device had nothing to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

from xllm_lab.engine.clock import Timed
from xllm_lab.engine.lane import Lane

T = TypeVar("T")


class Told:
    """Host time passes when a test says so; work on the device takes `work_us`, side by side with the host."""

    is_shared = False

    def __init__(self, work_us: int) -> None:
        self.host_us, self.work_us = 0, work_us

    def now_us(self) -> int:
        return self.host_us

    def wait_until(self, until_us: int) -> int:
        self.host_us = max(self.host_us, until_us)
        return self.host_us

    def times(self, work: Callable[[], T], *, not_before_us: int) -> Timed[T]:
        return Timed(work(), not_before_us, not_before_us + self.work_us)


def gaps(*, host_us: int, device_us: int, ahead: bool, num_steps: int = 5) -> list[int | None]:
    """Of steps that take the host and the device so long, planned in turns or one ahead."""
    clock = Told(device_us)
    found: list[int | None] = []
    with Lane(clock, beside=ahead) as lane:

        def plan() -> object:
            clock.host_us += host_us
            return lane.launch(lambda: None)

        pending = [plan()]
        for _ in range(num_steps):
            if ahead:
                pending.append(plan())
            done = pending.pop(0).result()  # type: ignore[attr-defined]
            clock.wait_until(done.end_us)
            found.append(done.idle_us)
            if not ahead:
                pending.append(plan())
    return found


@pytest.mark.parametrize(("host_us", "device_us"), [(10, 100), (100, 100), (100, 10)])
def test_in_turns_the_device_waits_for_the_host(host_us: int, device_us: int) -> None:
    assert gaps(host_us=host_us, device_us=device_us, ahead=False) == [None, *[host_us] * 4]


def test_ahead_a_host_that_is_quicker_is_never_waited_for() -> None:
    assert gaps(host_us=10, device_us=100, ahead=True) == [None, 0, 0, 0, 0]


def test_ahead_the_device_waits_for_what_the_host_is_slower() -> None:
    assert gaps(host_us=100, device_us=10, ahead=True) == [None, *[90] * 4]


def test_what_is_launched_runs_in_order_and_beside_the_host() -> None:
    """The host launches a second step while the first one runs: the first waits here until it has."""
    ran: list[int] = []
    second_is_there = threading.Event()

    def first() -> None:
        assert second_is_there.wait(timeout=60)
        ran.append(1)

    with Lane(Told(1), beside=True) as lane:
        both = [lane.launch(first), lane.launch(lambda: ran.append(2))]
        second_is_there.set()
        for launched in both:
            launched.result()
    assert ran == [1, 2]


@pytest.mark.parametrize("beside", [False, True])
def test_what_goes_wrong_on_the_device_is_raised_on_the_host(beside: bool) -> None:
    def fails() -> None:
        raise ArithmeticError("a NaN")

    with Lane(Told(1), beside=beside) as lane, pytest.raises(ArithmeticError, match="a NaN"):
        lane.launch(fails).result()


def test_after_a_rest_idling_is_not_counted() -> None:
    clock = Told(10)
    with Lane(clock, beside=True) as lane:
        lane.launch(lambda: None).result()
        lane.rest()
        clock.host_us = 10**6
        assert lane.launch(lambda: None).result().idle_us is None
