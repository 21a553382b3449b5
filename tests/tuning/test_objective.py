"""What a study seeks, and what it will not have: limits, a second axis, and what is kept for the next study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.searches import CALIBRATION, WorkersHere, default, search, workload
from xllm_lab.errors import ConfigError
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.step_time import StepTime
from xllm_lab.tuning import workers
from xllm_lab.tuning.evaluations import address, code_version
from xllm_lab.tuning.objective import CANNOT_RUN, COST, Objective, metric_of
from xllm_lab.tuning.search import tune
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import Study


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", WorkersHere)


def found(out: Path, objective: Objective, num_trials: int = 8, **more: Any) -> Study:
    known: dict[str, Any] = {"seed": 0, "num_workers": 1, **more}
    calibration: Calibration = known.pop("calibration", CALIBRATION)
    space = Space(default())
    return tune([workload()], calibration, space, num_trials=num_trials, out=out, objective=objective, **known)


def test_a_limit_is_a_constraint_by_how_much_it_is_exceeded(tmp_path: Path) -> None:
    """Of the default's own P99, half is too little, and twice is enough."""
    free = found(tmp_path / "free", Objective(), 1).default
    p99 = metric_of(free.report["summaries"][0], "ttft_us.p99")
    assert p99 is not None
    strict = found(tmp_path / "strict", Objective(limits={"ttft_us.p99": p99 / 2}), 1).default
    lenient = found(tmp_path / "lenient", Objective(limits={"ttft_us.p99": p99 * 2}), 1).default
    assert strict.report["constraints"]["ttft_us.p99"] == pytest.approx(1)
    assert not strict.is_feasible
    assert lenient.is_feasible


def test_with_a_second_axis_both_are_sought(tmp_path: Path) -> None:
    """And the book has both values of each trial."""
    study = found(tmp_path / "study", Objective(second_axis="tpot_us.p99"), 20)
    for trial in study.trials:
        if trial.report["failure"] is None:
            assert trial.report["second"] == metric_of(trial.report["summaries"][0], "tpot_us.p99")
    assert Objective(second_axis=COST).directions == ("maximize", "minimize")


REFUSED = {
    "unknown metric 'speed'": {"limits": {"speed": 1.0}},
    "unknown metric 'ttft_us'": {"second_axis": "ttft_us"},
    "limit of ttft_us.p99 is 0": {"limits": {"ttft_us.p99": 0}},
    "min_slo_attainment_frac is 2": {"min_slo_attainment_frac": 2},
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_nobody_can_seek_is_refused(says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Objective(**REFUSED[says])  # type: ignore[arg-type]


def test_goodput_is_counted_per_device() -> None:
    """Of two reports with as many tokens, the one of four devices is worth a quarter."""
    summary = {"goodput_per_s": 100.0, "slo_attainment_frac": 1.0}
    one = {"summary": summary, "num_devices": 1, "extrapolated_frac": 0.0, "failure": None}
    found = Objective().report([one, {**one, "num_devices": 4}], 2)
    assert found["goodput_per_s"] == 100
    assert found["by_workload_per_s"] == [100, 25]
    assert found["goodput_per_device_per_s"] == 62.5


def test_what_cannot_run_is_a_violation_with_a_category() -> None:
    """Never a lost trial, whatever is sought."""
    objective = Objective(limits={"ttft_us.p99": 1.0}, second_axis="tpot_us.p99")
    failure = {"category": "OutOfMemory", "reason": "of 2 GiB"}
    report = objective.report([{"failure": failure}], 3)
    assert report["category"] == "OutOfMemory"
    assert set(report["constraints"].values()) == {CANNOT_RUN}
    assert len(objective.values(report)) == 2


def evaluated(folder: Path) -> set[str]:
    return {path.name for path in (folder / "evaluations").rglob("*.json")}


def test_a_second_study_finds_what_the_first_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another objective of the same trials: nobody simulates anything."""
    first = search(tmp_path / "first", num_trials=5)
    kept = evaluated(tmp_path)

    class Idle(WorkersHere):
        def submit(self, *_: Any) -> Any:
            pytest.fail("it was evaluated before")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Idle)
    second = search(tmp_path / "second", num_trials=5, min_slo_attainment_frac=0.1)
    assert [t.candidate for t in second.trials] == [t.candidate for t in first.trials]
    assert evaluated(tmp_path) == kept


def test_another_machine_is_another_evaluation(tmp_path: Path) -> None:
    """Twice as fast, say."""
    found(tmp_path / "one", Objective(), 1)
    faster = replace(CALIBRATION, step_time=StepTime(tuple(w / 2 for w in CALIBRATION.step_time.weights)))
    found(tmp_path / "other", Objective(), 1, calibration=faster)
    assert len(evaluated(tmp_path)) == 2


def test_an_address_depends_on_every_value_and_on_no_order() -> None:
    one = {"workload": "a", "calibration": "b", "code": code_version()}
    assert address(one) == address(dict(reversed(one.items())))
    assert len({address(one), *(address({**one, name: "other"}) for name in one)}) == 4


def test_a_report_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    """A machine lost power before the disk had it."""
    first = search(tmp_path / "first", num_trials=3)
    for path in (tmp_path / "evaluations").rglob("*.json"):
        path.write_bytes(path.read_bytes()[:40])
    assert search(tmp_path / "second", num_trials=3).trials == first.trials


def test_who_is_worse_at_every_seed_is_given_up(tmp_path: Path) -> None:
    """It is told with what is known of it, and is never best."""
    on = [workload() for _ in range(6)]
    space = Space(default())
    study = tune(on, CALIBRATION, space, num_trials=14, seed=0, out=tmp_path / "s", num_workers=1, prune_p=0.2)
    given_up = [t for t in study.trials if not t.report["is_whole"]]
    assert given_up
    assert all(3 <= len(t.report["by_workload_per_s"]) < 6 and not t.is_feasible for t in given_up)
    assert all(t.value_per_s < study.best.value_per_s for t in given_up)
