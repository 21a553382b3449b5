"""A store below the host: what one engine gave, another serves without computing it; what is not right is a miss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine.test_tiers import COPY_TIME, NUM_SESSIONS, WHERE, plain, sessions, tokens_of
from tests.small_runs import STEP_TIME
from tests.tiny_models import tiny_model
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.errors import ConfigError
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.cache.cost_aware import CostAware
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.of_instance import Policies
from xllm_lab.runs import Run
from xllm_lab.sim.parity import parity

ROOMY = replace(WHERE, num_kv_blocks=200)


def run_with(store: str, out: Path, *, cache: CachePolicy | None = None, clock: str = "virtual") -> Run:
    """Sessions served by an engine of its own."""
    timer = "cpu" if clock == "virtual" else "wall"
    options = EngineOptions(
        model=str(tiny_model()), device="cpu", dtype="float32", clock=clock, timer=timer, store=store
    )
    with Engine(options) as engine:
        policies = Policies(Fcfs(), cache=cache or Lru())
        return engine.replay(sessions(), ROOMY, policies, out=out, step_time=STEP_TIME, copy_time=COPY_TIME)


def prefetched(run: Run) -> int:
    """Tokens whose KV came from the store."""
    return sum(c.num_moved_tokens or 0 for c in run.records.copies if c.kind == "prefetch")


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_what_one_engine_gave_another_serves(clock: str, tmp_path: Path) -> None:
    store = f"dir:{tmp_path / 'store'}"
    first, second = (run_with(store, tmp_path / str(k), clock=clock) for k in (1, 2))
    assert tokens_of(first.records) == tokens_of(second.records) == plain()
    opening = [r.cached_tokens for r in second.records.requests[:NUM_SESSIONS]]
    assert prefetched(first) == 0, "nobody had given anything"
    # What is not given when a run is over is given to nobody.
    assert sum(map(bool, opening)) >= NUM_SESSIONS - 2, f"first prompts of sessions found {opening} tokens"
    assert second.manifest.store is not None
    assert second.manifest.store["num_hits"] * ROOMY.block_size == prefetched(second)
    for run in (first, second):
        assert parity(run).is_identical


def test_a_policy_weighs_what_the_store_costs(tmp_path: Path) -> None:
    store = f"dir:{tmp_path / 'store'}"
    run_with(store, tmp_path / "first")
    slow = replace(
        COPY_TIME, weights={**COPY_TIME.weights, "prefetch": COPY_TIME.weights["prefetch"]._replace(call_us=1e9)}
    )
    options = EngineOptions(model=str(tiny_model()), device="cpu", dtype="float32", timer="cpu", store=store)
    asked = []
    with Engine(options) as engine:
        for name, copy_time in (("fast", COPY_TIME), ("slow", slow)):
            run = engine.replay(
                *(sessions(), ROOMY, Policies(Fcfs(), cache=CostAware())),
                out=tmp_path / name,
                step_time=STEP_TIME,
                copy_time=copy_time,
            )
            asked.append(sum(c.kind == "prefetch" for c in run.records.copies))
    assert asked[0] > 0
    assert asked[1] == 0


def test_a_corrupted_block_is_a_miss_that_is_counted(tmp_path: Path) -> None:
    store = f"dir:{tmp_path / 'store'}"
    run_with(store, tmp_path / "first")
    rng = np.random.default_rng(3)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.stat().st_size > 100]
    assert files
    for path in files:
        held = bytearray(path.read_bytes())
        held[rng.integers(0, len(held))] ^= 0xFF
        path.write_bytes(held)
    second = run_with(store, tmp_path / "second")
    assert tokens_of(second.records) == plain()
    assert prefetched(second) == 0
    assert second.manifest.store is not None
    assert second.manifest.store["num_corrupted"] > 0
    assert parity(second).is_identical


def test_another_dtype_s_blocks_are_not_found(tmp_path: Path) -> None:
    """The same tokens in the same directory."""
    store = f"dir:{tmp_path / 'store'}"
    run_with(store, tmp_path / "first")
    options = EngineOptions(model=str(tiny_model()), device="cpu", dtype="bfloat16", timer="cpu", store=store)
    with Engine(options) as engine:
        run = engine.replay(
            *(sessions(), ROOMY, Policies(Fcfs(), cache=Lru())),
            out=tmp_path / "second",
            step_time=STEP_TIME,
            copy_time=COPY_TIME,
        )
    opening = [r.cached_tokens for r in run.records.requests[:NUM_SESSIONS]]
    assert opening == [0] * NUM_SESSIONS, "blocks of float32"


def test_a_store_that_nobody_would_use_is_refused(tmp_path: Path) -> None:
    options = EngineOptions(model=str(tiny_model()), device="cpu", store=f"dir:{tmp_path / 'store'}")
    with Engine(options) as engine, pytest.raises(ConfigError, match=r"device-only never uses it"):
        engine.replay(sessions(), ROOMY, Policies(Fcfs()), out=tmp_path / "run")
