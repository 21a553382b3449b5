"""Instances that share experts, each with requests of its own, draw the tokens of one engine; they end together."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.cluster.test_fleet import Killing, killer, serve, tokens
from tests.engine.test_engine_serving import config, crowd, served
from tests.tiny_loop import INSTANCE, said, window
from tests.tiny_models import write_tiny_model
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.expert_parallel import DISPATCHES
from xllm_lab.errors import ConfigError, InstanceError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.formats import own
from xllm_lab.metrics import summarize
from xllm_lab.outages import Outage
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.routing import InstanceId
from xllm_lab.records import Records
from xllm_lab.runs import read_run
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


@pytest.mark.parametrize("dispatch", ["all-to-all", pytest.param("all-gather", marks=pytest.mark.slow)])
def test_four_instances_draw_the_tokens_of_one(dispatch: str) -> None:
    """Two experts each."""
    work = crowd(10)
    with EngineFleet(options(expert_dispatch=dispatch), 4) as four:
        records, _ = serve(four, work, fleet(4), config())
    assert tokens(records) == tokens(served(work, config(), Fcfs(), host=alone()))
    assert len({r.instance for r in records.requests}) == 4


@pytest.mark.parametrize("dispatch", ["all-gather", pytest.param("all-to-all", marks=pytest.mark.slow)])
def test_a_lost_instance_ends_all_in_one_line(dispatch: str) -> None:
    """Its experts are nowhere else; nothing of the others is left."""
    with EngineFleet(options(expert_dispatch=dispatch), 2) as two:
        processes = [two.processes.process(InstanceId(k)) for k in (0, 1)]
        with pytest.raises(InstanceError, match=r"^instance 1 ended with signal SIGKILL$"):
            serve(two, crowd(12), fleet(), config(), Killing({4: killer(two, 1)}))
        assert [p.popen.poll() is not None for p in processes if p is not None] == [True, True]


def test_what_shared_experts_cannot_have_is_refused(two: EngineFleet) -> None:
    """In one line each, before anything starts or is served."""
    refused: list[tuple[dict[str, Any], int, str]] = [
        ({"clock": "virtual"}, 2, "clock 'virtual' where instances share experts and step together; accepted: 'wall'"),
        ({}, 1, "expert_parallel with one rank; accepted: tensor_parallel or instances of at least 2"),
        ({}, 3, "8 experts do not divide among 3 devices, a multiple is accepted"),
        ({"num_redundant_experts": 5}, 2, "num_redundant_experts is 5, 0 to 4 is accepted"),
    ]
    for changes, num_instances, message in refused:
        with pytest.raises(ConfigError, match=message):
            EngineFleet(options(**changes), num_instances)
    down = (Outage(instance=InstanceId(1), start_us=2000, end_us=6000),)
    with pytest.raises(
        ConfigError, match="outages where instances share experts, and all end with one; accepted: none"
    ):
        two.serve(crowd(2), fleet(outages=down), config(), Policies(Fcfs()), Records())


def test_the_command_serves_on_instances_that_share_experts(tmp_path: Path) -> None:
    own.write(window(0, gap_us=0), tmp_path / "trace.jsonl")
    knobs = [word for knob in INSTANCE for word in ("--set", knob)]
    words = ("--model", model(), "--device", "cpu", "--clock", "wall", "--instances", 2, "--expert-parallel")
    found = said("replay", tmp_path / "trace.jsonl", *knobs, *words, "--out", tmp_path / "run", "--quiet")
    assert found.status == 0, found
    run = read_run(tmp_path / "run")
    assert run.manifest.model["expert_parallel"] == 2
    assert len(run.records.requests) == 16
