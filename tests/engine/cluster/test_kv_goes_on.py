"""KV that outlives its instance: engine processes that share a store, with and without roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.cluster.conftest import options
from tests.engine.cluster.test_fleet import fleet, sessions, tokens
from tests.engine.test_engine_serving import config, crowd, served
from tests.engine.test_tiers import COPY_TIME
from tests.laws import fleet_obeys_the_laws
from tests.small_runs import STEP_TIME
from tests.tiny_models import VOCAB_SIZE
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.roles.static import Static
from xllm_lab.records import Records
from xllm_lab.runs import Run
from xllm_lab.sim.parity import parity
from xllm_lab.workload import Prompt, Request, RequestId, Workload

STORING = Policies(Fcfs(), cache=Lru())


@pytest.fixture(scope="module", params=["virtual", "wall"])
def sharing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineFleet]:
    store = f"dir:{tmp_path_factory.mktemp('store')}"
    with EngineFleet(replace(options(request.param), store=store), 3) as engines:
        yield engines


def replayed(engines: EngineFleet, work: Workload, how: FleetConfig, where: InstanceConfig, out: Path) -> Run:
    run = engines.replay(work, how, where, STORING, out=out, step_time=STEP_TIME, copy_time=COPY_TIME)
    fleet_obeys_the_laws(work, how, where, run.records, vocab_size=VOCAB_SIZE)
    assert parity(run).is_identical
    return run


@pytest.mark.parametrize("mode", ["off", "on", "length_aware"])
def test_a_prompt_that_one_computed_another_goes_on_from(sharing: EngineFleet, mode: str, tmp_path: Path) -> None:
    """With KV pushed ahead of it: of the second part, all full blocks are found."""
    work, where = crowd(12), config(async_scheduling=mode)
    run = replayed(sharing, work, fleet(roles=Static(num_prefill=1)), where, tmp_path / "run")
    assert tokens(run.records) == tokens(served(work, where, Fcfs()))
    moved = [r for r in run.records.requests if r.handed_over_us is not None]
    assert moved
    brought = {c.request for c in run.records.copies if c.kind == "prefetch" and c.num_moved_tokens}
    pushed = {c.request for c in run.records.copies if c.kind == "push" and c.num_moved_tokens}
    long = {r.id for r in moved if r.prompt_tokens >= where.block_size}
    assert pushed >= long
    assert len(brought & long) > len(long) // 2, f"of {len(long)} prompts that went on, {len(brought)} were brought"


def test_sessions_that_move_find_what_was_said(sharing: EngineFleet, tmp_path: Path) -> None:
    """Routed in turn, whoever has their prefix; what another instance computed comes from the store."""
    work, where = sessions(num_sessions=5), config(num_kv_blocks=200)
    run = replayed(sharing, work, fleet("round-robin"), where, tmp_path / "run")
    assert tokens(run.records) == tokens(served(work, where, Fcfs()))
    assert sum(c.num_moved_tokens or 0 for c in run.records.copies if c.kind == "prefetch") > 0
    assert run.manifest.store is not None
    assert sum(s["num_hits"] for s in run.manifest.store["instances"]) > 0


def test_tiers_in_lockstep_need_a_clock_of_each_thread() -> None:
    told = replace(options("virtual"), timer="wall")
    with EngineFleet(told, 1) as engines, pytest.raises(ConfigError, match="lockstep cannot tell copies"):
        engines.serve(crowd(1), fleet(num_instances=1), config(), STORING, Records())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_conversation_with_the_embedded_model_apart(
    twenty_prompts: list[list[int]], mode: str, tmp_path: Path
) -> None:
    """SmolLM2, three turns of four texts: prompts on one process, answers on the other, and little room on both."""
    work = conversation(twenty_prompts)
    where = InstanceConfig(
        max_tokens_per_batch=128, max_seqs_per_batch=8, block_size=16, num_kv_blocks=100, max_model_len=512
    )
    alone, apart = Records(), Records()
    told = EngineOptions(device="cpu", dtype="float32", timer="cpu", store=f"dir:{tmp_path}")
    Engine(replace(told, store=None)).serve(work, where, Policies(Fcfs()), alone)
    tight = replace(where, num_kv_blocks=20, async_scheduling=mode)
    with EngineFleet(told, 2) as engines:
        how = fleet(num_instances=2, roles=Static(num_prefill=1))
        engines.serve(work, how, tight, STORING, apart, step_time=STEP_TIME, copy_time=COPY_TIME)
    assert tokens(apart.sort()) == tokens(alone.sort())
    assert all(r.handed_over_us is not None for r in apart.requests)
    brought = sum(c.num_moved_tokens or 0 for c in apart.copies if c.kind == "prefetch")
    assert brought >= sum(r.prompt_tokens for r in apart.requests) // 3


def conversation(texts: list[list[int]]) -> Workload:
    """Each says a bit more each time, and everybody at once."""
    said = [(text * 9)[:160] for text in texts[4:8]]
    requests = []
    for i in range(12):
        tokens = tuple(said[i % 4][: 60 + 48 * (i // 4)])
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        requests.append(Request(id=RequestId(i), arrival_us=900_000 * (i // 4), prompt=prompt, output_tokens=12))
    return Workload(requests=tuple(requests))
