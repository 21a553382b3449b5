"""Fleets of three engine processes with the tiny model, started once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tiny_models import tiny_model
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.engine.engine import EngineOptions


def options(clock: str) -> EngineOptions:
    timer = "cpu" if clock == "virtual" else "wall"
    return EngineOptions(model=str(tiny_model()), device="cpu", dtype="float32", clock=clock, timer=timer)


@pytest.fixture(scope="session")
def in_lockstep() -> Iterator[EngineFleet]:
    with EngineFleet(options("virtual"), 3) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def in_real_time() -> Iterator[EngineFleet]:
    with EngineFleet(options("wall"), 3) as fleet:
        yield fleet


@pytest.fixture(params=["virtual", "wall"])
def engines(request: pytest.FixtureRequest) -> EngineFleet:
    name = {"virtual": "in_lockstep", "wall": "in_real_time"}[request.param]
    fleet: EngineFleet = request.getfixturevalue(name)
    return fleet
