"""A study keeps its book whatever happens to it: repeatable, resumable, readable only when it is whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.searches import CALIBRATION, WorkersHere, default, search, workload
from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.formats import own
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.calibrate import write_calibration
from xllm_lab.tuning import workers
from xllm_lab.tuning.evaluations import inputs_of
from xllm_lab.tuning.objective import Objective, evaluate, simulation
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import Study, Trial, read_study
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.workload import Slo

NUM_TRIALS = 5


@pytest.fixture(autouse=True)
def _workers_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_workers" not in request.fixturenames:
        monkeypatch.setattr(workers, "ProcessPoolExecutor", WorkersHere)


@pytest.fixture
def real_workers() -> None:
    """Asked for by tests that need other processes."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "ProcessPoolExecutor", WorkersHere)
        return search(tmp_path_factory.mktemp("finished") / "study", num_trials=NUM_TRIALS)


def candidates(study: Study) -> list[Candidate]:
    return [trial.candidate for trial in study.trials]


def test_the_first_trial_is_the_default(finished: Study) -> None:
    """Everything else is judged by it."""
    assert finished.default.number == 0
    assert finished.default.candidate == default()


def test_a_study_has_the_trials_that_were_asked_for(finished: Study) -> None:
    """Numbered from 0, each another candidate."""
    assert [t.number for t in finished.trials] == list(range(NUM_TRIALS))
    assert len({json.dumps(c.as_dict(), sort_keys=True) for c in candidates(finished)}) == NUM_TRIALS


def test_what_is_read_is_what_was_found(finished: Study) -> None:
    """Trials, reports and specification come back equal."""
    read = read_study(finished.path)
    assert read.trials == finished.trials
    assert read.best == finished.best


@pytest.mark.parametrize("num_workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_equal_seeds_give_equal_trials(num_workers: int, tmp_path: Path) -> None:
    """With as many workers: proposals then see the same results."""
    one, other = (search(tmp_path / name, num_trials=18, num_workers=num_workers) for name in ("one", "other"))
    assert one.trials == other.trials


def test_another_seed_gives_other_trials(finished: Study, tmp_path: Path) -> None:
    """But for the default."""
    other = search(tmp_path / "study", num_trials=NUM_TRIALS, seed=1)
    assert other.default == finished.default
    assert not any(c in candidates(finished) for c in candidates(other)[1:])


def unfinished_copy(study: Study, out: Path, journal: bytes) -> Path:
    """The study as a coordinator left it that was killed when the journal was so far."""
    shutil.copytree(study.path, out)
    (out / "study.json").unlink()
    (out / "trials.journal").write_bytes(journal)
    return out


def journal_of(study: Study) -> bytes:
    return (study.path / "trials.journal").read_bytes()


def assert_resumes(finished: Study, out: Path, *, after: int, is_torn: bool = False) -> None:
    """Killed after so many lines: in the end all trials are those of the study that nobody killed."""
    lines = journal_of(finished).splitlines(keepends=True)
    torn = lines[after][: len(lines[after]) // 2] if is_torn else b""
    resumed = search(unfinished_copy(finished, out, b"".join(lines[:after]) + torn), num_trials=NUM_TRIALS)
    assert resumed.trials == finished.trials, f"after line {after}"


@pytest.mark.slow
@pytest.mark.parametrize("is_torn", [False, True], ids=["between lines", "within a line"])
def test_killed_at_any_line_it_resumes(is_torn: bool, finished: Study, tmp_path: Path) -> None:
    """Each line of the journal, as the last one that was written."""
    for after in range(len(journal_of(finished).splitlines())):
        assert_resumes(finished, tmp_path / f"after-{after}", after=after, is_torn=is_torn)


def test_killed_at_some_line_it_resumes(finished: Study, tmp_path: Path) -> None:
    """Of all lines, each seventh; every other one torn."""
    for turn, after in enumerate(range(0, len(journal_of(finished).splitlines()), 7)):
        assert_resumes(finished, tmp_path / f"after-{after}", after=after, is_torn=turn % 2 == 0)


def num_told(lines: Sequence[bytes]) -> int:
    """Trials whose end is in the journal: those that a result was written for."""
    return sum(json.loads(line).get("values") is not None for line in lines)


def test_a_trial_that_was_running_is_run_again(finished: Study, tmp_path: Path) -> None:
    """Killed just before the third result was told: the third candidate is the third of the resumed study too."""
    lines = journal_of(finished).splitlines(keepends=True)
    ends = [k for k, line in enumerate(lines) if num_told([line])]
    out = unfinished_copy(finished, tmp_path / "study", b"".join(lines[: ends[2]]))
    resumed = search(out, num_trials=NUM_TRIALS)
    assert candidates(resumed)[:3] == candidates(finished)[:3]


@pytest.mark.slow
def test_killed_twice_it_resumes_twice(finished: Study, tmp_path: Path) -> None:
    """What stands in for a lost trial can be lost itself."""
    lines = journal_of(finished).splitlines(keepends=True)
    (last, *_) = [k for k, line in enumerate(lines) if num_told([line])][2:]
    out = unfinished_copy(finished, tmp_path / "once", b"".join(lines[:last]))
    search(out, num_trials=NUM_TRIALS)
    again = (out / "trials.journal").read_bytes().splitlines(keepends=True)
    for count in range(last, len(again)):
        twice = unfinished_copy(finished, tmp_path / f"twice-{count}", b"".join(again[:count]))
        resumed = search(twice, num_trials=NUM_TRIALS)
        assert len(resumed.trials) == NUM_TRIALS
        assert candidates(resumed)[:3] == candidates(finished)[:3]


def test_a_resumed_study_tells_of_what_was_there(finished: Study, tmp_path: Path) -> None:
    """A progress bar starts where it stopped."""
    lines = journal_of(finished).splitlines(keepends=True)
    out = unfinished_copy(finished, tmp_path / "study", b"".join(lines[:-1]))
    told: list[int] = []
    search(out, num_trials=NUM_TRIALS, on_trial=lambda trial: told.append(trial.number))
    assert told[: NUM_TRIALS - 1] == list(range(NUM_TRIALS - 1))
    assert len(told) == NUM_TRIALS


def test_a_lock_of_a_dead_coordinator_holds_nobody_up(finished: Study, tmp_path: Path) -> None:
    """Killed while it wrote, it left a lock file behind."""
    out = unfinished_copy(finished, tmp_path / "study", journal_of(finished))
    (out / "trials.journal.lock").symlink_to(out / "trials.journal")
    assert len(search(out, num_trials=NUM_TRIALS).trials) == NUM_TRIALS


def test_two_coordinators_do_not_share_a_study(finished: Study, tmp_path: Path) -> None:
    """The second is refused while the first lives."""
    out = unfinished_copy(finished, tmp_path / "study", journal_of(finished))
    with (out / "trials.journal").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process"):
            search(out)


def test_a_finished_study_is_not_searched_again(finished: Study) -> None:
    """Its results may have been acted upon."""
    with pytest.raises(RunError, match="finished study; accepted: a new folder"):
        search(finished.path)


def test_an_unfinished_study_is_not_read(finished: Study, tmp_path: Path) -> None:
    """Its best may not be the best; the message says how to go on."""
    out = unfinished_copy(finished, tmp_path / "study", journal_of(finished))
    with pytest.raises(RunError, match="run `tune` on an unfinished one again"):
        read_study(out)


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 9},
    "space": {"space": Space(default(max_seqs_per_batch=9))},
    "checksums": {"on": workload(slo=Slo(ttft_us=1))},
    "min_slo_attainment_frac": {"min_slo_attainment_frac": 0.5},
}


@pytest.mark.parametrize("part", OTHERS)
def test_a_study_of_something_else_is_not_resumed(part: str, finished: Study, tmp_path: Path) -> None:
    """The same requests under other promises are another workload, though its source is the same."""
    out = unfinished_copy(finished, tmp_path / "study", journal_of(finished))
    with pytest.raises(ConfigError, match=rf"something else \({part} differ\)"):
        search(out, **OTHERS[part])


def test_a_journal_of_nonsense_is_named(finished: Study, tmp_path: Path) -> None:
    """It was edited by hand."""
    out = unfinished_copy(finished, tmp_path / "study", b"these are\nno trials\nat all\n")
    with pytest.raises(RunError, match=r"trials\.journal: cannot be read"):
        search(out)


def test_a_worker_that_is_killed_is_replaced(finished: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever killed it: its trial is run again, and the study is as if nothing had been."""
    deaths = iter([False, True, True, False, True])

    class Mortal(WorkersHere):
        def submit(self, *job: Any) -> Any:
            if next(deaths, False):
                raise BrokenProcessPool
            return super().submit(*job)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Mortal)
    assert search(tmp_path / "study", num_trials=NUM_TRIALS).trials == finished.trials


def test_a_trial_that_kills_every_worker_is_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, say: it has a category, is never best, and no other study takes it for granted."""

    class Deadly(WorkersHere):
        def submit(self, function: Any, of: Any, job: Any) -> Any:
            if job["spec"]["candidate"] != default().as_dict():
                raise BrokenProcessPool
            return super().submit(function, of, job)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Deadly)
    study = search(tmp_path / "study", num_trials=3)
    assert [t.report["category"] for t in study.trials] == [None, workers.DIED, workers.DIED]
    assert study.best.number == 0
    assert len(list((tmp_path / "evaluations").rglob("*.json"))) == 1


def job(folder: Path, one: Candidate) -> dict[str, Any]:
    own.write(workload(), folder / "w.jsonl")
    write_calibration(CALIBRATION, folder / "c.json")
    inputs = inputs_of([folder / "w.jsonl", folder / "c.json"])
    served, calibrated = inputs
    return {"spec": {**simulation(served, calibrated, Tiers()), "candidate": one.as_dict()}, "inputs": inputs}


def test_a_pool_too_small_is_a_violation_not_an_accident(tmp_path: Path) -> None:
    """The longest request needs 20 blocks; with 8 the trial is complete, worth nothing, and says why."""
    report = Objective().report([evaluate(job(tmp_path, default(num_kv_blocks=8)))], 1)
    assert report["failure"].startswith("RequestTooLargeError: request 0")
    assert report["category"] == "RequestTooLargeError"
    assert report["goodput_per_s"] == 0
    assert all(violation > 0 for violation in report["constraints"].values())


def test_too_few_promises_kept_is_a_violation(tmp_path: Path) -> None:
    """By how many too few."""
    evaluated = [evaluate(job(tmp_path, default()))]
    attained = evaluated[0]["summary"]["slo_attainment_frac"]
    assert 0 < attained < 1
    free, strict = (Objective(min_slo_attainment_frac=frac).report(evaluated, 1) for frac in (0.0, 1.0))
    assert strict["constraints"]["slo_attainment"] == pytest.approx(1 - attained)
    assert strict["goodput_per_s"] == free["goodput_per_s"]


def test_infeasible_candidates_are_searched_and_not_chosen(finished: Study, tmp_path: Path) -> None:
    """As many promises kept as by the default are asked for: whoever keeps fewer counts, and is not chosen."""
    (attained,) = (s["slo_attainment_frac"] for s in finished.default.report["summaries"])
    study = search(tmp_path / "study", num_trials=10, min_slo_attainment_frac=attained)
    assert len(study.trials) == 10
    assert not all(t.is_feasible for t in study.trials)
    assert study.best.is_feasible


def trial(number: int, goodput_per_s: float, one: Candidate, *, runs: bool = True, ttft_us: float = 1.0) -> Trial:
    report = {
        "goodput_per_s": goodput_per_s,
        "constraints": {"runs": 0.0 if runs else 1.0},
        "summaries": [{"ttft_us": {"p90": ttft_us}}],
    }
    return Trial(number=number, candidate=one, report=report)


def study_of(*trials: Trial) -> Study:
    return Study(path=Path("unwritten"), spec={}, trials=trials)


def test_among_equals_the_fewest_changes_win() -> None:
    """Within 1 % of the best: one knob turned is preferred to three, and the default to one."""
    one = default(max_seqs_per_batch=9)
    three = Candidate(
        instance=replace(one.instance, max_tokens_per_batch=512),
        policies=Policies(make_policy("batch", "decode-first", {"order": "sjf"})),
    )
    worse = trial(0, 50.0, default())
    assert study_of(worse, trial(1, 100.0, three), trial(2, 99.5, one)).best.number == 2
    assert study_of(worse, trial(1, 100.0, three), trial(2, 98.5, one)).best.number == 1
    assert study_of(trial(0, 99.5, default()), trial(1, 100.0, three), trial(2, 99.9, one)).best.number == 0


def test_what_cannot_run_is_never_best() -> None:
    """Whatever it promises; and if nothing can run, the default stays."""
    other = default(max_seqs_per_batch=9)
    assert study_of(trial(0, 1.0, default()), trial(1, 9.0, other, runs=False)).best.number == 0
    assert study_of(trial(0, 1.0, default(), runs=False), trial(1, 9.0, other, runs=False)).best.number == 0


def test_the_front_has_no_trial_that_another_beats() -> None:
    """In both goodput and time to first token."""
    others = [default(max_seqs_per_batch=n) for n in (9, 10, 11)]
    study = study_of(
        trial(0, 10.0, default(), ttft_us=5.0),
        trial(1, 9.0, others[0], ttft_us=6.0),
        trial(2, 8.0, others[1], ttft_us=3.0),
        trial(3, 99.0, others[2], ttft_us=1.0, runs=False),
    )
    assert [t.number for t in study.pareto()] == [0, 2]


REFUSED: dict[str, Callable[[Path], Study]] = {
    "trials is 0": lambda out: search(out, num_trials=0),
    "workers is 0": lambda out: search(out, num_workers=0),
    "seed is -1": lambda out: search(out, seed=-1),
    "min_slo_attainment_frac is nan": lambda out: search(out, min_slo_attainment_frac=float("nan")),
}


@pytest.mark.parametrize("says", REFUSED)
def test_a_number_out_of_range_is_refused_before_anything_is_written(says: str, tmp_path: Path) -> None:
    """With what is accepted."""
    with pytest.raises(ConfigError, match=f"{says}, .* accepted"):
        REFUSED[says](tmp_path / "study")
    assert list(tmp_path.iterdir()) == []


SEARCHING = """
import sys
from pathlib import Path
from tests.tuning.searches import search
if __name__ == "__main__":
    search(Path(sys.argv[1]), num_trials=100_000, num_workers=2)
"""


@pytest.mark.slow
def test_a_coordinator_that_is_killed_takes_its_workers_along_and_loses_no_trial(
    real_workers: None, tmp_path: Path
) -> None:
    """With real processes and SIGKILL, at whatever line it was."""
    out, script = tmp_path / "study", tmp_path / "searching.py"
    script.write_text(SEARCHING, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen([sys.executable, str(script), str(out)], start_new_session=True, env=env)
    journal = out / "trials.journal"
    while running.poll() is None and not (journal.exists() and num_told(journal.read_bytes().splitlines()[:-1]) >= 4):
        time.sleep(0.01)
    running.kill()
    running.wait()
    leaves(running.pid)
    before = [line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    total = num_told(before) + 3
    resumed = search(out, num_trials=total, num_workers=2)
    assert len(resumed.trials) == total
    assert resumed.default.candidate == default()


def leaves(group: int) -> None:
    """All processes of a group do."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("workers outlived their coordinator by 10 s")


@pytest.mark.slow
def test_workers_in_other_processes_find_the_same(finished: Study, real_workers: None, tmp_path: Path) -> None:
    """Where a trial runs is no part of it."""
    assert search(tmp_path / "study", num_trials=NUM_TRIALS).trials == finished.trials
