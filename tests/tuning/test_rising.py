"""From counts to the engine: every level tells its part, what is interrupted goes on, and nothing under noise wins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_model
from tests.tuning.searches import WorkersHere
from xllm_lab.candidate import Candidate
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.runs import Run, read_json
from xllm_lab.sim.calibrate import Calibration, calibrate
from xllm_lab.tuning import workers
from xllm_lab.tuning.rising import ENGINE, FACTS, SCREEN, SLICE, TRACE, Budget, rise
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import Study, read_study
from xllm_lab.workload import Prompt, Request, RequestId, Slo, Workload

OPTIONS = EngineOptions(model=str(tiny_model()), device="cpu", dtype="float32", timer="cpu")
BUDGET = Budget(
    num_trials=12, slice_requests=12, slice_seeds=4, trace_seeds=2, num_passed_on=4, num_engine=5, engine_requests=8
)


def workload() -> Workload:
    """Prompts that share beginnings, and repeat themselves, so that caches and lookups have something to find."""
    requests = []
    for i in range(32):
        shared = [17 + (7 * k + i % 3) % 40 for k in range(48)]
        tokens = (*shared, *(17 + (i * k) % 60 for k in range(8 + 5 * (i % 4))))
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        slo = Slo(ttft_us=2_000_000, tpot_us=500_000)
        requests.append(
            Request(id=RequestId(i), arrival_us=3_000 * i, prompt=prompt, output_tokens=12 + i % 7, slo=slo)
        )
    return Workload(requests=tuple(requests), source="thirty-two requests")


def default() -> Candidate:
    instance = InstanceConfig(
        block_size=16, num_kv_blocks=64, max_tokens_per_batch=128, max_seqs_per_batch=8, max_model_len=512
    )
    return Candidate(instance=instance, policies=Policies(make_policy("batch", "decode-first")))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of an engine: all that anything below knows of the machine and the text."""
    one = default()
    with Engine(OPTIONS) as engine:
        return engine.replay(workload(), one.instance, one.policies, out=tmp_path_factory.mktemp("recorded") / "run")


@pytest.fixture(scope="module")
def fitted(recorded: Run) -> Calibration:
    return calibrate([recorded])


@pytest.fixture(scope="module", autouse=True)
def _workers_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "ProcessPoolExecutor", WorkersHere)
        yield


def risen(out: Path, recorded: Run, fitted: Calibration, **more: Any) -> Study:
    known: dict[str, Any] = {"budget": BUDGET, "engine": OPTIONS, "recorded": recorded, **more}
    return rise(workload(), fitted, Space(default(), ["fixed"]), out=out, num_workers=2, **known)


@pytest.fixture(scope="module")
def finished(recorded: Run, fitted: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return risen(tmp_path_factory.mktemp("rising") / "search", recorded, fitted)


def story(study: Study) -> dict[str, Any]:
    return read_json(study.path / "story.json", "a story")


def test_each_level_tells_its_story(finished: Study) -> None:
    """In one file, and a study a level beside it."""
    told = story(finished)
    assert list(told) == sorted((FACTS, SCREEN, SLICE, TRACE, ENGINE))
    assert told[FACTS]["drafts"]["ngram_tokens_per_step"]["3"]["4"] >= 1
    assert told[SCREEN]["num_passed"] > 0
    assert told[SLICE]["num_trials"] == BUDGET.num_trials
    assert all(read_study(finished.path / name).trials for name in (SLICE, TRACE, ENGINE))


def test_the_engine_measures_the_default_first_and_no_more_than_its_budget(finished: Study) -> None:
    assert finished.default.candidate == default()
    assert 1 < len(finished.trials) <= BUDGET.num_engine
    assert len({json.dumps(t.candidate.as_dict(), sort_keys=True) for t in finished.trials}) == len(finished.trials)


def test_what_the_engine_measures_the_simulator_has_not_seen(finished: Study) -> None:
    """The last requests are the engine's."""
    held_out = (finished.path / ENGINE / "workload-0.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    assert len(held_out) == BUDGET.engine_requests
    for level in (SLICE, TRACE):
        for path in (finished.path / level).glob("workload-*.jsonl"):
            seen = {json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()[1:]}
            assert seen.isdisjoint(json.loads(line)["id"] for line in held_out)


def test_the_step_model_is_corrected_within_bounds(finished: Study) -> None:
    """After each batch, from the engine's own steps."""
    corrections = story(finished)[ENGINE]["corrections"]
    assert corrections
    for found in corrections.values():
        assert found["bounds"][0] <= found["fixed"] <= found["bounds"][1]
        assert found["bounds"][0] <= found["load"] <= found["bounds"][1]
        assert abs(found["error_frac_after"]) <= abs(found["error_frac_before"]) + 0.02 or found["bounds_hit"]


def test_a_winner_beats_the_default_by_more_than_noise_or_is_the_default(finished: Study) -> None:
    best, default_trial = finished.best, finished.default
    assert best.number == 0 or best.value_per_s > default_trial.value_per_s * (1 - finished.equal_frac)


def test_a_search_is_read_as_any_study(finished: Study) -> None:
    """So that it can be verified and exported."""
    read = read_study(finished.path)
    assert read.trials == finished.trials
    assert read.best == finished.best
    assert (finished.path / "calibration.json").exists()


def test_an_interrupted_search_goes_on(
    finished: Study, recorded: Run, fitted: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the second engine run: what was measured is not measured again."""
    count = 0

    def dies(level: str, _: Any) -> None:
        nonlocal count
        count += level == ENGINE
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        risen(tmp_path / "search", recorded, fitted, on_trial=dies)
    kept = sorted((tmp_path / "evaluations").rglob("*.json"))
    study = risen(tmp_path / "search", recorded, fitted)
    assert set(kept) <= set((tmp_path / "evaluations").rglob("*.json"))
    assert study.default.candidate == default()
    assert 1 < len(study.trials) <= BUDGET.num_engine


def test_without_an_engine_the_simulator_has_the_last_word(recorded: Run, fitted: Calibration, tmp_path: Path) -> None:
    """And its trials are those of the whole trace."""
    study = risen(tmp_path / "search", recorded, fitted, budget=replace(BUDGET, num_engine=0), engine=None)
    assert len(study.trials) <= 1 + BUDGET.num_passed_on
    assert ENGINE not in story(study)


def test_an_engine_budget_without_an_engine_is_refused(recorded: Run, fitted: Calibration, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no engine; accepted"):
        risen(tmp_path / "search", recorded, fitted, engine=None)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_search_is_not_begun_again(finished: Study, recorded: Run, fitted: Calibration) -> None:
    with pytest.raises(RunError, match="finished study"):
        risen(finished.path, recorded, fitted)


def test_a_search_for_something_else_is_not_resumed(
    finished: Study, recorded: Run, fitted: Calibration, tmp_path: Path
) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "rising.json").write_bytes((finished.path / "rising.json").read_bytes())
    with pytest.raises(ConfigError, match=r"something else \(seed differ\)"):
        risen(tmp_path / "search", recorded, fitted, seed=7)
