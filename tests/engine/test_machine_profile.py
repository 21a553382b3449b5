"""The engine's operators as a profile bundle: nothing of a step is lost, and the simulator prices steps with it."""

from __future__ import annotations

import json
import re
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.engine.tiny import tiny_model as tiny_variant
from tests.small_runs import request
from tests.tiny_loop import said
from tests.tiny_models import MAX_POSITION, tiny_model
from xllm_lab.engine.device import Device
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.machine_profile import Grid, num_shapes, write_machine_profile
from xllm_lab.engine.operator_times import TimedSteps
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.errors import ConfigError, ProfileError
from xllm_lab.formats import own
from xllm_lab.sim.cost import batch_of
from xllm_lab.sim.cost.profile_bundle import read_bundle
from xllm_lab.sim.machine import Machine, profiled_machine
from xllm_lab.step_time import Chunk
from xllm_lab.workload import Workload

GRID = Grid(most_tokens=40, most_seqs=4, most_kv_tokens=48, repeats=1)
LAYERS = 2
BATCH = [SequenceChunk([3, 4, 5], 0, [0], True), SequenceChunk([6], 9, [1], True)]


def engine(folder: Path) -> Engine:
    return Engine(EngineOptions(model=str(folder), device="cpu", dtype="float32"))


def timed(host: Engine, num_layers: int = LAYERS) -> TimedSteps:
    return TimedSteps(host.model.model, host.device, num_layers=num_layers, num_blocks=2, block_size=16, timer="wall")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profiled") / "bundle"
    write_machine_profile(engine(tiny_model()), out, GRID)
    return out


@pytest.fixture(scope="module")
def machine(bundle: Path) -> Machine:
    return profiled_machine(bundle)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_every_moment_of_a_step_is_some_operators(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks once whenever it is read, a row is as many microseconds as it has operators in a call."""
    steps = timed(engine(tiny_variant(variant).folder))
    monkeypatch.setattr(steps, "_read_ns", count(0, 1000).__next__)
    found = steps.run(BATCH)
    assert found.pop("embedding") >= 1
    expected = dict.fromkeys(
        ("layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj"), 1.0
    )
    expected |= {"attention": 2.0, "final_layernorm": 1.0, "lm_head": 1.0, "sampler": 1.0}
    assert found == expected | ({"qk_norm": 0.5} if variant == "qwen3" else {})


def test_a_watched_model_computes_what_it_did_and_stays_as_it_was(device: Device) -> None:
    """The profile is of the model that is served, which is served afterwards."""
    host = engine(tiny_model())
    model, ops = host.model.model, host.model.model.ops
    pool = KvPool(host.model.config, num_blocks=2, block_size=16, dtype=torch.float32, device=device)
    before = Runner(model, pool, device).run(BATCH).clone()
    steps = timed(host)
    steps.run(BATCH)
    assert torch.equal(steps._runner.run(BATCH)[0], before[0])
    assert model.ops is ops
    assert torch.equal(Runner(model, pool, device).run(BATCH), before)


def test_the_bundle_has_every_shape_of_the_grid(bundle: Path) -> None:
    """And the reader, which refuses holes, has nothing against it."""
    read = read_bundle(bundle)
    assert set(read.attention) == set(GRID.attention)
    assert all(sorted(by_size) == GRID.tokens for by_size in read.dense.values())
    assert num_shapes(GRID) == len(read.attention) + len(GRID.tokens)
    assert sorted(read.per_sequence["lm_head"]) == [1, 2, 4]


def test_experts_are_timed_by_how_many_are_activated(tmp_path: Path) -> None:
    """Any number that so many tokens can have; the simulator prices a step between the fewest and the most."""
    host = engine(tiny_variant("mixtral").folder)
    write_machine_profile(host, tmp_path / "bundle", GRID)
    read = read_bundle(tmp_path / "bundle")
    assert {tokens for tokens, _ in read.moe} == set(GRID.tokens)
    assert [activated for tokens, activated in sorted(read.moe) if tokens in (1, 4)] == [2, 2, 4]
    assert "gate_up_proj" not in read.dense
    found = profiled_machine(tmp_path / "bundle").cost.step(batch_of([Chunk(30, 0)], 1))
    assert found.us > LAYERS * min(us for (tokens, _), us in read.moe.items() if tokens > 16)
    assert not found.is_extrapolated


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_so_many_experts_get_rows_as_are_asked_for(variant: str) -> None:
    """And each token its number of different ones."""
    host = engine(tiny_variant(variant).folder)
    steps, mixture = timed(host), host.model.config.mixture
    assert mixture is not None
    seen: list[int] = []
    steps._runner.workspace.counts_experts = True
    steps._runner.expert_observer = lambda _, rows_LE: seen.extend((rows_LE > 0).sum(1).tolist())
    for asked in (2, 3, mixture.routing.num_experts):
        steps.activation.num_experts = asked
        assert "moe" in steps.run([SequenceChunk([3, 4, 5, 6, 7], 0, [0], True)])
    assert seen == [2, 2, 3, 3, *[mixture.routing.num_experts] * 2]


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("qwen3_moe_every_second", "2 of 4 layers have experts; accepted for a profile: all or none"),
        ("deepseek_v2_greedy", "the model's attention is latent; accepted for a profile: grouped-query attention"),
    ],
)
def test_what_no_table_has_is_refused_before_anything_is_measured(variant: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        write_machine_profile(engine(tiny_variant(variant).folder), tmp_path / "bundle", GRID)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "chunks",
    [[Chunk(1, 20)], [Chunk(1, 48)] * 4, [Chunk(40, 0)], [Chunk(30, 48), Chunk(1, 30), Chunk(1, 7)]],
    ids=["a decode", "decodes", "a prompt", "both"],
)
def test_steps_within_the_grid_are_priced(machine: Machine, chunks: list[Chunk]) -> None:
    """A step costs no less than each of its layers' calls, and nothing in the grid is extrapolated."""
    price = machine.cost.step(batch_of(chunks, len(chunks)))
    assert price.us > LAYERS * 10 * 0.1
    assert not price.is_extrapolated


def test_beyond_the_grid_a_price_says_so(machine: Machine) -> None:
    """Five decodes where four were measured, and a decode after 500 tokens where 48 were."""
    for chunks in ([Chunk(1, 20)] * 5, [Chunk(1, 500)]):
        assert machine.cost.step(batch_of(chunks, len(chunks))).is_extrapolated


def test_a_grid_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    """With both numbers, before anything is written."""
    with pytest.raises(ConfigError, match=rf"most_kv_tokens 500: 540 together.* accepts {MAX_POSITION}"):
        write_machine_profile(engine(tiny_model()), tmp_path / "out", Grid(most_tokens=40, most_kv_tokens=500))
    assert list(tmp_path.iterdir()) == []


def test_one_command_brings_this_machine_into_the_simulator(tmp_path: Path) -> None:
    """Profile, then simulate: the model's shape travels in the bundle."""
    own.write(Workload(requests=(request(0, prompt=30, output=5),)), tmp_path / "trace.jsonl")
    sizes = ("--most-tokens", 40, "--most-seqs", 2, "--most-kv-tokens", 48, "--repeats", 1)
    profiled = said("profile", "--model", tiny_model(), "--out", tmp_path / "bundle", *sizes)
    assert (profiled.status, "gate_up_proj" in profiled.out) == (0, True), profiled.err
    machine = ("--profile", tmp_path / "bundle", "--set", f"max_model_len={MAX_POSITION}")
    simulated = said("simulate", tmp_path / "trace.jsonl", *machine, "--out", tmp_path / "run", "--json")
    assert json.loads(simulated.out)["num_served"] == 1, simulated.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "accepted: a profiler's folder, or --out DIR"),
        (["somewhere", "--model", "smollm2-135m"], "--model beside somewhere"),
        (["--source", "torch_npu", "--out", "x"], "are of a profiler's folder"),
    ],
)
def test_options_without_effect_are_refused(options: list[str], told: str) -> None:
    """One of two things is measured: what a profiler left, or the engine."""
    got = said("profile", *options)
    assert got.status == 2  # the user can mend it
    assert told in got.err


def test_what_mapping_pages_takes_is_measured(bundle: Path, machine: Machine) -> None:
    """On a CPU under Linux, which has pages of 4 KiB whatever the model; runs cost something, and so do pages."""
    told = read_bundle(bundle).page_time
    assert told is not None
    assert machine.page_time == told
    assert told.map_run_us + told.map_page_us > 0
    assert told.unmap_run_us + told.unmap_page_us > 0


def test_a_page_time_of_words_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    text = (copy / "meta.yaml").read_text(encoding="utf-8")
    (copy / "meta.yaml").write_text(re.sub(r"map_run_us: .*", "map_run_us: soon", text, count=1), encoding="utf-8")
    with pytest.raises(ProfileError, match=r"meta.yaml: page_time is .*soon.*; accepted: map_run_us"):
        read_bundle(copy)
