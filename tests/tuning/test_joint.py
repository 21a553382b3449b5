"""Batching, speculation and caches are searched together from one recorded run, and the tuner knows no knob by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import xllm_lab.tuning
from tests.tuning.searches import WorkersHere
from tests.tuning.test_rising import BUDGET, OPTIONS, default, workload
from xllm_lab.engine.engine import Engine
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import knobs, make_policy, policies
from xllm_lab.policies.of_instance import DECISIONS
from xllm_lab.sim.calibrate import calibrate
from xllm_lab.tuning import workers
from xllm_lab.tuning.rising import SLICE, rise
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import read_study
from xllm_lab.tuning.tiers import Tiers

TUNING = Path(xllm_lab.tuning.__file__).parent


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", WorkersHere)
    return iter(())


def test_one_recorded_run_is_enough_for_all_three(tmp_path: Path) -> None:
    """It had no drafts and no host tier: lookups are replayed on its outputs, and the link's rate is given."""
    one = default()
    with Engine(OPTIONS) as engine:
        run = engine.replay(workload(), one.instance, one.policies, out=tmp_path / "run")
    cached = replace(one, policies=replace(one.policies, cache=make_policy("cache", "lru")))
    space = Space(cached, ["fixed"])
    study = rise(
        *(workload(), calibrate([run]), space),
        out=tmp_path / "search",
        budget=replace(BUDGET, num_engine=0, num_trials=20),
        recorded=run,
        tiers=Tiers(host_link_bytes_per_s=1e9),
    )
    knobs_ = read_study(study.path / SLICE).spec["space"]["knobs"]
    assert {"ngram", "suffix"} == set(knobs_["draft.fixed.method"])
    for cls, prefix in ((InstanceConfig, ""), (type(cached.policies.batch), "decode-first.")):
        assert {prefix + name for name in knobs(cls)} <= set(knobs_)
    tried = [t.candidate for t in read_study(study.path / SLICE).trials]
    for part in ("instance", "policies"):
        assert len({str(getattr(t, part)) for t in tried}) > 1
    assert len({str(t.policies.draft) for t in tried}) > 1
    assert len({str(t.policies.cache) for t in tried}) > 1
    assert sum(t.report["failure"] is None for t in read_study(study.path / SLICE).trials) > 5


def searched_modules() -> list[Path]:
    """Of the tuner, those that search; exports translate knobs, and the linter reads flags."""
    return sorted(TUNING.glob("*.py"))


@pytest.mark.parametrize("module", searched_modules(), ids=lambda path: path.stem)
def test_the_tuner_names_no_knob(module: Path) -> None:
    """A new policy's knobs are searched because they are annotated, and for no other reason."""
    every = {name for decides in DECISIONS for cls in policies(decides).values() for name in knobs(cls)}
    every |= set(knobs(InstanceConfig))
    said = {
        node.value
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not said & every
