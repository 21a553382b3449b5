"""Instances that share experts, each with requests of its own, draw the tokens of one engine; they end together."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.cluster.test_fleet import serve, tokens
from tests.engine.test_engine_serving import config, crowd, served
from tests.tiny_models import write_tiny_model
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.expert_parallel import DISPATCHES
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.parity import parity

SHAPE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
# Preemptions, prefix hits and chunks on each instance.
CROWDED = config(block_size=4, num_kv_blocks=24, max_tokens_per_batch=12)
_FOLDER = tempfile.TemporaryDirectory(prefix="xllm_lab_shared_")


@functools.cache
def model() -> str:
    return str(write_tiny_model(Path(_FOLDER.name), **SHAPE))


def options(**changes: Any) -> EngineOptions:
    usual: dict[str, Any] = {"model": model(), "device": "cpu", "dtype": "float32", "clock": "wall"}
    return EngineOptions(**{**usual, "expert_parallel": True, "rank_timeout_s": 60.0, **changes})


@functools.cache
def alone() -> Engine:
    return Engine(EngineOptions(model=model(), device="cpu", dtype="float32"))


def fleet(num_instances: int = 2, **changes: Any) -> FleetConfig:
    route = make_policy("route", "round-robin", {})
    return FleetConfig(num_instances=num_instances, heartbeat_us=2000, route=route, **changes)


@pytest.fixture(scope="module", params=DISPATCHES)
def two(request: pytest.FixtureRequest) -> Iterator[EngineFleet]:
    with EngineFleet(options(expert_dispatch=request.param, num_redundant_experts=1), 2) as opened:
        yield opened


@pytest.mark.parametrize("mode", ["off", "on", "length_aware"])
def test_two_instances_draw_the_tokens_of_one(two: EngineFleet, mode: str) -> None:
    """Through preemptions, prefix hits and chunks, planned in turns and ahead."""
    work, where = crowd(12, output=20), replace(CROWDED, async_scheduling=mode)
    records, _ = serve(two, work, fleet(), where)
    assert tokens(records) == tokens(served(work, where, Fcfs(), host=alone()))
    assert summarize(records).num_preemptions > 0
    assert summarize(records).prefix_hit_frac > 0
    assert {r.instance for r in records.requests} == {0, 1}


def test_whoever_has_nothing_to_do_takes_part(two: EngineFleet) -> None:
    """One request at a time, far apart: the other instance computes with it, and all rest between."""
    work = crowd(6)
    apart = replace(work, requests=tuple(r.at(60_000 * r.id) for r in work.requests))
    records, _ = serve(two, apart, fleet(), config())
    assert tokens(records) == tokens(served(work, config(), Fcfs(), host=alone()))
    assert [r.instance for r in records.requests] == [0, 1] * 3


def test_a_run_says_that_experts_were_shared(two: EngineFleet, tmp_path: Path) -> None:
    """And each instance decided as the simulator does."""
    run = two.replay(crowd(8), fleet(), config(), Policies(Fcfs()), out=tmp_path / "run")
    model = run.manifest.model
    assert (model["tensor_parallel"], model["expert_parallel"], model["num_redundant_experts"]) == (1, 2, 1)
    assert model["expert_dispatch"] in DISPATCHES
    assert parity(run).is_identical
