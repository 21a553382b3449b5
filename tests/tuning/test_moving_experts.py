"""Knobs of an experts policy, searched on loads that a run recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.sim.test_expert_trace import loads as loads  # noqa: PLC0414 (a fixture)
from tests.sim.test_expert_trace import machine
from tests.sim.test_expert_trace import work as long_prompts
from tests.small_runs import request
from tests.tuning.searches import WorkersHere, default, search
from xllm_lab import verbs
from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError, TraceError
from xllm_lab.policies.experts.xllm_balanced import XllmBalanced
from xllm_lab.tuning import workers
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import read_study
from xllm_lab.tuning.tiers import Tiers, tiers_of
from xllm_lab.workload import Slo, Workload


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", WorkersHere)


def balancing() -> Candidate:
    own = default(num_kv_blocks=400)
    return replace(own, policies=replace(own.policies, experts=XllmBalanced()))


def half_a_minute() -> Workload:
    """Long enough for the shortest interval that is searched to pass twice."""
    slo = Slo(ttft_us=400_000, tpot_us=30_000)
    each = tuple(replace(request(i, 250_000 * i, prompt=30, output=200), slo=slo) for i in range(100))
    return Workload(requests=each, source="a hundred requests")


def test_interval_redundancy_and_gate_are_searched(loads: Path, tmp_path: Path) -> None:
    """Rows of the most loaded device cost time, so what balances sooner than xLLM's interval serves more in time."""
    run = verbs.simulate(long_prompts(), machine(), out=tmp_path / "run", expert_trace=str(loads), settings={})
    tiers = Tiers(expert_trace=f"{run.path}?bytes_per_s=1e10&row_us=150")
    study = search(tmp_path / "study", space=Space(balancing()), tiers=tiers, num_trials=8, on=half_a_minute())
    for knob in ("interval_us", "num_redundant_experts", "min_peak_gain_frac", "decay_frac"):
        assert f"experts.{knob}" in study.spec["space"]["knobs"]
    assert all(trial.report["failure"] is None for trial in study.trials)
    assert tiers_of(read_study(study.path).spec) == tiers
    assert len({trial.goodput_per_s for trial in study.trials}) > 1
    assert study.best.goodput_per_s >= study.default.goodput_per_s


def test_what_there_is_to_balance_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="experts is 'xllm-balanced', and what there is to balance is not known"):
        search(tmp_path / "study", space=Space(balancing()), on=half_a_minute())


def test_a_report_on_other_loads_is_not_taken_for_that_on_these(loads: Path, tmp_path: Path) -> None:
    """Though they lie where the others lay."""
    trace = tmp_path / "loads.npz"
    trace.write_bytes(loads.read_bytes())
    before = Tiers(expert_trace=str(trace)).described()
    assert before == Tiers(expert_trace=str(trace)).described()
    trace.write_bytes(loads.read_bytes()[:-1])
    assert before != Tiers(expert_trace=str(trace)).described()
    with pytest.raises(TraceError, match=r"gone\.npz: cannot be read: No such file"):
        Tiers(expert_trace=str(tmp_path / "gone.npz")).described()
