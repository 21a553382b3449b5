"""The host's share of a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.cost.cost_laws import batches, check_decode_steps, decode_batches
from xllm_lab.errors import ConfigError
from xllm_lab.sim.cost import Batch, Price, Prices
from xllm_lab.sim.cost.host import Hosted, HostOverhead, fit_host


class Linear:
    """A device whose steps grow with their context."""

    def step(self, batch: Batch) -> Price:
        return Price(100.0 + 0.1 * batch.decode_kv_tokens, batch.decode_kv_tokens > 5000)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        kv = batch.decode_kv_tokens + batch.num_decodes * np.arange(num_steps, dtype=np.float64)
        return Prices(100.0 + 0.1 * kv, kv > 5000)


hosts = st.builds(HostOverhead, step_us=st.floats(0, 5000), sequence_us=st.floats(0, 50))


@given(decode_batches(), st.integers(1, 60), hosts, st.booleans())
def test_steps_together_are_steps_alone(batch: Batch, num_steps: int, host: HostOverhead, plans_ahead: bool) -> None:
    check_decode_steps(Hosted(Linear(), host, plans_ahead=plans_ahead), batch, num_steps)


@given(batches(), st.floats(0, 5000), st.floats(0, 50))
def test_async_is_never_slower_and_never_hides_either_side(batch: Batch, step_us: float, sequence_us: float) -> None:
    device = Linear().step(batch).us
    sync, overlapped = (
        Hosted(Linear(), HostOverhead(step_us=step_us, sequence_us=sequence_us), plans_ahead=a).step(batch).us
        for a in (False, True)
    )
    host = step_us + sequence_us * batch.num_seqs
    assert max(device, host) == overlapped <= sync == device + host


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["step_us", "sequence_us"])
def test_impossible_overheads_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}, a finite number of at least 0"):
        HostOverhead(step_us=value if name == "step_us" else 0.0, sequence_us=value if name == "sequence_us" else 0.0)


@given(hosts, st.lists(st.integers(1, 64), min_size=2, max_size=40))
def test_what_a_host_takes_is_found_in_its_steps(host: HostOverhead, num_seqs: list[int]) -> None:
    found = fit_host(num_seqs, [host.us(n) for n in num_seqs])
    for n in num_seqs:
        assert found.us(n) == pytest.approx(host.us(n), rel=1e-6, abs=1e-6)


def test_nothing_measured_is_no_host() -> None:
    assert fit_host([], []) == HostOverhead()
