"""Experts change places while an engine of several processes serves: tokens stay, loads are levelled, nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine.topical_model import HOT, LAYERS, NUM_EXPERTS, PER_TOKEN, on_topics, write_topical_model
from tests.laws import experts_are_never_lost, obey_the_laws
from tests.tiny_models import VOCAB_SIZE
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.live_experts import mixture_layers
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.experts import ExpertsPolicy
from xllm_lab.policies.experts.static import STATIC
from xllm_lab.policies.experts.xllm_balanced import XllmBalanced
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.rebalancing import layout_from
from xllm_lab.runs import Run, read_run
from xllm_lab.sim.parity import parity

BALANCED = XllmBalanced(interval_us=150_000, num_redundant_experts=1)
WHERE = InstanceConfig(
    max_tokens_per_batch=64, max_seqs_per_batch=8, block_size=16, num_kv_blocks=120, max_model_len=256
)
# The topic changes in the middle.
DRIFTING = on_topics([0] * 6 + [1] * 6, gap_us=150_000, output_tokens=60)


def options(folder: Path, ranks: int, redundant: int = 1, dispatch: str = "all-gather") -> EngineOptions:
    return EngineOptions(
        model=str(folder),
        device="cpu",
        dtype="float32",
        tensor_parallel=ranks,
        expert_parallel=True,
        expert_dispatch=dispatch,
        num_redundant_experts=redundant,
        rank_timeout_s=60,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_topical_model(tmp_path_factory.mktemp("topical"))


@pytest.fixture(scope="module", params=[(2, "all-to-all"), (4, "all-gather")], ids=["two ranks", "four ranks"])
def host(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    ranks, dispatch = request.param
    with Engine(options(folder, ranks, dispatch=dispatch)) as opened:
        yield opened


def served(host: Engine, policy: ExpertsPolicy, out: Path, config: InstanceConfig = WHERE, **others: object) -> Run:
    """A run on disk, which obeys the laws."""
    decide = Policies(DecodeFirst(), experts=policy, **others)  # type: ignore[arg-type]
    host.replay(DRIFTING, config, decide, out=out)
    run = read_run(out)
    assert run.manifest.expert_layout is not None
    obey_the_laws(DRIFTING, config, run.records, vocab_size=VOCAB_SIZE)
    experts_are_never_lost(run.records, layout_from(run.manifest.expert_layout), 1)
    rows = sum(sum(step.num_tokens) for step in run.records.steps) * PER_TOKEN
    counted = sum((load.slot_tokens_LP.sum(axis=1) for load in run.expert_loads), np.zeros(len(LAYERS), np.int64))
    # With steps planned ahead, one that nobody waits for may be under way at the end.
    assert counted.tolist() == [rows] * len(LAYERS)
    return run


def tokens(run: Run) -> list[list[int]]:
    return [list(r.output_token_ids) for r in run.records.requests]


def peaks(run: Run, ranks: int) -> list[tuple[int, float]]:
    """When each counter was read, and rows of the most loaded rank by those of the mean one."""
    found = list[tuple[int, float]]()
    for load in run.expert_loads:
        rows_LD = load.slot_tokens_LP.reshape(len(LAYERS), ranks, -1).sum(axis=-1)
        found.append((load.end_us, float(rows_LD.max(axis=1).sum() / rows_LD.mean(axis=1).sum())))
    return found


def test_tokens_stay_and_loads_are_levelled(host: Engine, tmp_path: Path) -> None:
    """The same texts under every placement; the peak falls by 30 % on four ranks, though the topic changes."""
    static, balanced = served(host, STATIC, tmp_path / "static"), served(host, BALANCED, tmp_path / "balanced")
    assert tokens(balanced) == tokens(static)
    begun = [d for d in balanced.decisions if d.active_us is not None]
    assert len(begun) >= 2
    assert begun[0].active_us is not None
    ranks = host.options.tensor_parallel
    before = np.mean([peak for _, peak in peaks(static, ranks)])
    after = np.mean([peak for us, peak in peaks(balanced, ranks) if us > begun[0].active_us])
    assert after - 1 <= 0.5 * (before - 1)
    assert ranks == 2 or after <= 0.7 * before  # of two, the peak is never far above the mean


def test_no_decode_misses_a_step(host: Engine, tmp_path: Path) -> None:
    """Who decodes gets a token in every step, those that begin a change included."""
    run = served(host, BALANCED, tmp_path / "run")
    begun = {d.active_step for d in run.decisions if d.active_step is not None}
    assert begun
    for record in run.records.requests:
        own = [s.step for s in run.records.steps if record.id in s.ids]
        assert own == list(range(own[0], own[-1] + 1))
        assert record.output_tokens == 60


@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
def test_the_simulator_decides_alike(host: Engine, tmp_path: Path, mode: str) -> None:
    """On what was recorded: every step, and where experts are put, when and why. Another policy parts ways."""
    run = served(host, BALANCED, tmp_path / "run", replace(WHERE, async_scheduling=mode))
    found = parity(run)
    assert found.is_identical, found
    assert found.num_decisions == len(run.decisions) > 0
    other = replace(BALANCED, min_peak_gain_frac=0.3, decay_frac=1.0)
    policies = replace(
        run.manifest.instance_policies(), experts=replace(other, interval_us=BALANCED.interval_us + 7_000)
    )
    assert not parity(run, policies=policies).is_identical


def test_captured_steps_follow(host: Engine, tmp_path: Path) -> None:
    """Graphs read slots and weights where they are."""
    graphs = PowersOfTwo(graphs_prefill=True)
    static, moved = (served(host, p, tmp_path / n, shapes=graphs) for p, n in ((STATIC, "s"), (BALANCED, "b")))
    assert tokens(moved) == tokens(static)
    assert any(d.active_us is not None for d in moved.decisions)


def test_memory_is_that_of_redundant_slots(host: Engine, tmp_path: Path) -> None:
    """Once a run is over nothing is left of second buffers."""
    run = served(host, BALANCED, tmp_path / "run")
    layout = run.manifest.expert_layout
    assert layout is not None
    held = 0
    for layer in mixture_layers(host.model.model).values():
        assert layer.slots is not None
        for slot in range(layer.slots.num_own):
            held += layer.gate_up.weight(slot).nbytes + layer.down.weight(slot).nbytes
    once = NUM_EXPERTS // host.options.tensor_parallel * len(LAYERS) * layout["expert_bytes"]
    assert held - once == layout["redundant_bytes"] == len(LAYERS) * layout["expert_bytes"]
    assert host.live_experts().is_ready(1) is False


def test_slots_other_than_the_policys_are_refused(host: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wants num_redundant_experts 2, and the engine was opened with 1"):
        served(host, replace(BALANCED, num_redundant_experts=2), tmp_path / "run")
    assert len(HOT) == 2
