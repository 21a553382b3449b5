"""Links: what goes in comes out, in order, never faster than the wire; and they queue as theory says."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from xllm_lab.fleet_config import LinkConfig
from xllm_lab.policies.routing import InstanceId
from xllm_lab.sim.links import Link, Transfer
from xllm_lab.workload import RequestId, stream

# (microseconds after the last one, bytes)
MESSAGES = st.lists(st.tuples(st.sampled_from((0, 0, 1, 7, 5000)), st.integers(0, 20_000)), min_size=1, max_size=30)
LINKS = st.builds(
    LinkConfig,
    latency_us=st.sampled_from((0, 1, 250)),
    bytes_per_s=st.sampled_from((None, 1_000_000, 999_983, 3_333_333_333)) | st.integers(50_000, 10**12),
)


class Sent:
    """Messages over one link, each from a process of its own: what was recorded, and who saw it arrive when."""

    def __init__(self, config: LinkConfig, messages: list[tuple[int, int]]) -> None:
        self.env = simpy.Environment(initial_time=0)
        self.recorded: list[Transfer] = []
        self.arrivals: list[tuple[RequestId, int]] = []
        self.link = Link(self.env, config, InstanceId(3), self.recorded.append)
        self.env.process(self._clients(messages))
        self.env.run()

    def _clients(self, messages: list[tuple[int, int]]) -> Generator[simpy.Event, Any, None]:
        for number, (gap_us, num_bytes) in enumerate(messages):
            if gap_us:
                yield self.env.timeout(gap_us)
            self.env.process(self._client(RequestId(number), num_bytes))

    def _client(self, request: RequestId, num_bytes: int) -> Generator[simpy.Event, Any, None]:
        done = yield from self.link.transfer(request, num_bytes)
        assert done.end_us == self.env.now
        self.arrivals.append((request, int(self.env.now)))


@given(config=LINKS, messages=MESSAGES)
def test_bytes_are_conserved_and_stay_in_order(config: LinkConfig, messages: list[tuple[int, int]]) -> None:
    """Every message arrives once, when its record says, and none overtakes another."""
    sent = Sent(config, messages)
    assert [t.num_bytes for t in sent.recorded] == [num_bytes for _, num_bytes in messages]
    assert sent.link.num_bytes == sum(num_bytes for _, num_bytes in messages)
    assert sent.arrivals == [(t.request, t.end_us) for t in sent.recorded]
    assert [t.request for t in sent.recorded] == list(range(len(messages)))
    assert [t.end_us for t in sent.recorded] == sorted(t.end_us for t in sent.recorded)
    assert {t.link for t in sent.recorded} == {3}


@given(config=LINKS, messages=MESSAGES)
def test_a_link_is_as_fast_as_it_says_and_no_faster(config: LinkConfig, messages: list[tuple[int, int]]) -> None:
    """A message takes its bytes over the rate, less than a microsecond more, and then the latency."""
    for transfer in Sent(config, messages).recorded:
        exact_us = transfer.num_bytes * 1e6 / config.bytes_per_s if config.bytes_per_s else 0
        taken_us = transfer.sent_us - transfer.start_us
        assert taken_us - 1 < exact_us * (1 + 1e-12)
        assert taken_us >= exact_us * (1 - 1e-12)
        assert transfer.end_us - transfer.sent_us == config.latency_us


@given(config=LINKS, messages=MESSAGES)
def test_one_message_at_a_time_and_no_idling_while_one_waits(
    config: LinkConfig, messages: list[tuple[int, int]]
) -> None:
    """Each begins when it was asked for or the one before it is sent, whichever is later."""
    sent = Sent(config, messages)
    free_us = 0
    for transfer in sent.recorded:
        assert transfer.start_us == max(free_us, transfer.queued_us)
        free_us = transfer.sent_us
    assert sent.link.busy_us == sum(t.sent_us - t.start_us for t in sent.recorded)
    assert sent.link.free_us == free_us
    assert 0 <= sent.link.utilisation_frac() <= 1


@given(config=LINKS, messages=MESSAGES)
def test_equal_inputs_give_equal_transfers(config: LinkConfig, messages: list[tuple[int, int]]) -> None:
    """Equal times included."""
    first, second = Sent(config, messages), Sent(config, messages)
    assert (first.recorded, first.arrivals) == (second.recorded, second.arrivals)


@given(config=LINKS, messages=MESSAGES, until_us=st.integers(1, 40_000))
def test_utilisation_is_of_the_time_that_has_passed(
    config: LinkConfig, messages: list[tuple[int, int]], until_us: int
) -> None:
    """What is still queued is not counted yet."""
    env = simpy.Environment(initial_time=0)
    done: list[Transfer] = []
    link = Link(env, config, InstanceId(0), done.append)

    def client() -> Generator[simpy.Event, Any, None]:
        for number, (gap_us, num_bytes) in enumerate(messages):
            yield env.timeout(gap_us)
            link.send(RequestId(number), num_bytes)

    env.process(client())
    env.run(until=until_us)
    busy_us = sum(max(0, min(t.sent_us, until_us) - t.start_us) for t in done)
    assert link.utilisation_frac() == pytest.approx(busy_us / until_us)


def test_nothing_to_wait_for_costs_no_event() -> None:
    """A link without rate or latency is a function call."""
    env = simpy.Environment(initial_time=0)
    link = Link(env, LinkConfig(), InstanceId(0))
    with pytest.raises(StopIteration) as returned:
        next(link.transfer(RequestId(7), 10**12))
    assert returned.value.value == Transfer(InstanceId(0), RequestId(7), 10**12, 0, 0, 0, 0)
    assert env.peek() == math.inf


@pytest.mark.parametrize("load_frac", [0.3, 0.6, 0.9])
def test_waiting_times_are_those_of_an_m_d_1_queue(load_frac: float) -> None:
    """Poisson messages of one size: the mean wait is within the 99 % confidence interval of rho D / (2 (1 - rho)).

    Pollaczek and Khinchine's formula with no variance. Each replication starts empty, and its first tenth is left out.
    """
    service_us, num_messages, num_replications = 10_000, 5_000, 60
    means = []
    for replication in range(num_replications):
        gaps = stream(replication, f"M/D/1 at {load_frac}").exponential(service_us / load_frac, num_messages)
        times_us = np.rint(np.cumsum(gaps)).astype(int)
        waits_us = _waits_us(LinkConfig(latency_us=77, bytes_per_s=400_000), times_us.tolist(), num_bytes=4_000)
        means.append(np.mean(waits_us[num_messages // 10 :]))
    expected_us = load_frac * service_us / (2 * (1 - load_frac))
    error_us = np.std(means, ddof=1) / np.sqrt(num_replications)
    assert abs(np.mean(means) - expected_us) <= student.ppf(0.995, num_replications - 1) * error_us
    assert error_us < 0.05 * expected_us  # or the interval would prove nothing


def _waits_us(config: LinkConfig, times_us: list[int], num_bytes: int) -> list[int]:
    """Time in the queue of messages that are sent at these times."""
    env = simpy.Environment(initial_time=0)
    link = Link(env, config, InstanceId(0))
    waits_us: list[int] = []

    def client() -> Generator[simpy.Event, Any, None]:
        for number, time_us in enumerate(times_us):
            yield env.timeout(time_us - env.now)
            done = link.send(RequestId(number), num_bytes)
            waits_us.append(done.start_us - done.queued_us)

    env.process(client())
    env.run()
    return waits_us
