"""How the tests run: no network, one thread a process, and the same Hypothesis examples every time."""

from __future__ import annotations

import os

# Before anything imports torch: its thread pools spin, and read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A verdict must not depend on how busy the machine is, so there are no deadlines.
settings.register_profile(
    "house", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("house"), max_examples=1000)
settings.load_profile(os.environ.get("XLLM_LAB_HYPOTHESIS", "house"))


@pytest.fixture(scope="session", autouse=True)
def every_engine_run_is_decided_alike() -> Iterator[None]:
    """Whatever run a test makes on the engine, the simulator takes the same decisions; the test need not ask."""
    from xllm_lab.engine.engine import Engine
    from xllm_lab.runs import Run
    from xllm_lab.sim.parity import parity

    original = Engine.replay

    def replay(self: Engine, *args: Any, **kwargs: Any) -> Run:
        run = original(self, *args, **kwargs)
        found = parity(run)
        assert found.is_identical, f"{run.path}: the hosts part at step {found.step}: {found}"
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "replay", replay)
        yield


@pytest.fixture(scope="session", autouse=True)
def every_simulated_run_obeys_the_laws() -> Iterator[None]:
    """Whatever a test simulates, alone or as a fleet, obeys `tests.laws`; the test need not ask."""
    from tests.watched_runs import watched_alone, watched_fleets
    from xllm_lab.sim import fleet, simulator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator, "serve_alone", watched_alone(simulator.serve_alone))
        watched_fleets(patch, fleet.Fleet)
        yield
