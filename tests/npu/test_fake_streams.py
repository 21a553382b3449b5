"""Streams and events: correctly ordered programs are right in every order of execution, and a missing wait shows."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from tests.fake_cann import control

SEEDS = range(20)


def producer_and_consumer(*, wait: bool) -> float:
    """One stream adds one to zeros, another doubles the sum; two is right."""
    producer, consumer = torch.npu.Stream(), torch.npu.Stream()
    values = torch.zeros(100, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(producer):
        values.add_(1)
        ready = torch.npu.Event()
        ready.record()
    with torch.npu.stream(consumer):
        if wait:
            ready.wait()
        doubled = values * 2
    torch.npu.synchronize()
    return float(doubled[0].item())


@pytest.mark.parametrize("order", control.ORDERS)
def test_an_event_orders_two_streams(order: control.Order) -> None:
    for seed in SEEDS:
        with control.order(order, seed=seed, max_delay_us=1000):
            assert producer_and_consumer(wait=True) == 2


@pytest.mark.parametrize("order", ["shuffled", "threads"])
def test_a_missing_wait_shows(order: control.Order) -> None:
    """The control: without the wait, some seeds give the wrong sum. In program order it would never show."""
    found = set()
    for seed in SEEDS:
        with control.order(order, seed=seed, max_delay_us=3000):
            found.add(producer_and_consumer(wait=False))
    assert found == {0.0, 2.0}


def test_the_shuffled_order_is_the_seed_s() -> None:
    def run(seed: int) -> list[float]:
        with control.order("shuffled", seed=seed):
            return [producer_and_consumer(wait=False) for _ in range(8)]

    assert run(5) == run(5)
    assert len({tuple(run(seed)) for seed in range(5)}) > 1


@dataclass(frozen=True)
class Step:
    """`buffers[into] = buffers[into] * 0.5 + buffers[source] + 1` on a stream."""

    stream: int
    into: int
    source: int


def random_program(seed: int, num_steps: int = 14) -> list[Step]:
    draw = random.Random(seed)
    return [Step(draw.randrange(3), draw.randrange(4), draw.randrange(4)) for _ in range(num_steps)]


def run_program(program: list[Step], *, events: bool) -> list[float]:
    """Each step waits for the steps of other streams that touched its buffers last."""
    streams = [torch.npu.Stream() for _ in range(3)]
    buffers = [torch.full((50,), float(index), device="npu") for index in range(4)]
    torch.npu.synchronize()
    touched: dict[int, list[tuple[int, torch.npu.Event]]] = {index: [] for index in range(4)}
    for step in program:
        with torch.npu.stream(streams[step.stream]):
            if events:
                for buffer in {step.into, step.source}:
                    for other, event in touched[buffer]:
                        if other != step.stream:
                            event.wait()
            buffers[step.into].mul_(0.5).add_(buffers[step.source]).add_(1)
            done = torch.npu.Event()
            done.record()
        touched[step.into] = [(step.stream, done)]
        if step.source != step.into:
            touched[step.source] = [*touched[step.source], (step.stream, done)]
    torch.npu.synchronize()
    return [float(one[7].item()) for one in buffers]


def expected_of(program: list[Step]) -> list[float]:
    values = [torch.tensor(float(index)) for index in range(4)]
    for step in program:
        values[step.into] = values[step.into] * 0.5 + values[step.source] * (1 if step.source != step.into else 0.5) + 1
    return [float(one) for one in values]


@pytest.mark.parametrize("order", control.ORDERS)
def test_ordered_programs_are_right_whatever_runs_first(order: control.Order) -> None:
    for seed in range(12):
        program = random_program(seed)
        with control.order(order, seed=seed, max_delay_us=300):
            assert run_program(program, events=True) == expected_of(program)


def test_the_same_programs_without_events_go_wrong() -> None:
    wrong = 0
    for seed in range(12):
        program = random_program(seed)
        with control.order("shuffled", seed=seed):
            wrong += run_program(program, events=False) != expected_of(program)
    assert wrong >= 4


def test_an_event_means_its_last_record_before_the_wait() -> None:
    """A later record must neither satisfy nor hold up an earlier wait."""
    with control.order("shuffled", seed=3):
        one, other = torch.npu.Stream(), torch.npu.Stream()
        values = torch.zeros(10, device="npu")
        torch.npu.synchronize()
        event = torch.npu.Event()
        with torch.npu.stream(one):
            values.add_(1)
            event.record()
        with torch.npu.stream(other):
            event.wait()
            first = values.clone()
            event.record()
        one.wait_event(event)
        with torch.npu.stream(one):
            values.add_(1)
        torch.npu.synchronize()
        assert (first[0].item(), values[0].item()) == (1, 2)


def test_a_result_read_by_the_host_too_early_is_stale() -> None:
    seen = []
    for wait in (True, False):
        with control.order("shuffled", seed=2):
            host = torch.zeros(10).pin_memory()
            device = torch.full((10,), 4.0, device="npu")
            host.copy_(device, non_blocking=True)
            done = torch.npu.Event()
            done.record()
            if wait:
                done.synchronize()
            seen.append(host[0].item())
            torch.npu.synchronize()
    assert seen == [4.0, 0.0]


@pytest.mark.parametrize("order", ["shuffled", "threads"])
def test_a_host_that_polls_an_event_sees_it_complete(order: control.Order) -> None:
    with control.order(order, seed=1, max_delay_us=2000):
        values = torch.zeros(10, device="npu")
        for _ in range(5):
            values.add_(1)
        done = torch.npu.Event()
        done.record()
        polls = 0
        while not done.query():
            polls += 1
        assert values[0].item() == 5
        assert polls > 0


@pytest.mark.parametrize("order", ["shuffled", "threads"])
def test_a_host_that_polls_a_stream_sees_it_idle(order: control.Order) -> None:
    with control.order(order, seed=1, max_delay_us=2000):
        values = torch.zeros(10, device="npu").add_(1)
        while not torch.npu.current_stream().query():
            pass
        assert values[0].item() == 1


def test_memory_recorded_on_another_stream_is_not_reused_too_early() -> None:
    """The control is the second value: without `record_stream` the block goes to the next tensor at once."""
    found = []
    for record in (True, False):
        with control.order("shuffled", seed=4):
            side = torch.npu.Stream()
            values = torch.full((70_000,), 3.0, device="npu")
            side.wait_stream(torch.npu.current_stream())
            with torch.npu.stream(side):
                doubled = values * 2
            if record:
                values.record_stream(side)
            address = values.data_ptr()
            del values
            other = torch.full((70_000,), 9.0, device="npu")
            found.append(other.data_ptr() == address)
            torch.npu.synchronize()
            if record:
                assert doubled.eq(6).all()
    assert found == [False, True]


def test_a_failing_kernel_surfaces_at_the_next_wait() -> None:
    """As on a device: the launch returns, the wait tells."""
    with control.order("shuffled", seed=1):

        def fail() -> None:
            raise ZeroDivisionError("inside a kernel")

        control.launch(torch.npu.current_stream().npu_stream, "failing", fail)
        with pytest.raises(RuntimeError, match="507035"):
            torch.npu.synchronize()
        with pytest.raises(ZeroDivisionError, match="inside a kernel"):
            control.raise_device_failure()


def test_core_limits_of_a_stream_read_back() -> None:
    stream = torch.npu.Stream()
    whole = {"cube_core_num": 24, "vector_core_num": 48}
    assert torch.npu.get_stream_limit(stream) == whole
    torch.npu.set_stream_limit(stream, 8, 16)
    assert torch.npu.get_stream_limit(stream) == {"cube_core_num": 8, "vector_core_num": 16}
    with pytest.raises(RuntimeError):
        torch.npu.set_stream_limit(stream, 25, 48)
    torch.npu.reset_stream_limit(stream)
    assert torch.npu.get_stream_limit(stream) == whole
