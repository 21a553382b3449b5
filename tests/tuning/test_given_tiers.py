"""A study of tiers that nobody calibrated: they are part of it, and of the engine that verifies it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.tiny_models import VOCAB_SIZE, tiny_model
from tests.tuning.searches import CALIBRATION, WorkersHere, default, search, workload
from tests.tuning.test_tiers import SETTINGS, sessions
from xllm_lab import cli, verbs
from xllm_lab.candidate import Candidate
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.errors import ConfigError
from xllm_lab.formats import own
from xllm_lab.policies.api import Knob
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.cache.storing import Storing
from xllm_lab.policies.catalog import knobs
from xllm_lab.runs import read_run
from xllm_lab.sim.calibrate import write_calibration
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.store.directory import blocks_in
from xllm_lab.tuning import workers
from xllm_lab.tuning.objective import worth
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import read_study
from xllm_lab.tuning.tiers import Tiers, tiers_of
from xllm_lab.tuning.verify import runs_of

GIVEN = Tiers(host_link_bytes_per_s=2e6, store="sim:?bytes=1MiB&bytes_per_s=1e6&latency_us=100")
PREFETCH = "cache.prefetch_timeout_us"


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", WorkersHere)


def storing() -> Candidate:
    return replace(default(), policies=replace(default().policies, cache=Lru()))


def test_a_study_keeps_its_tiers_and_its_trials_have_them(tmp_path: Path) -> None:
    """Trial 0 is the default there; evaluated without them, it could not run."""
    study = search(tmp_path / "study", space=Space(storing()), tiers=GIVEN, num_trials=3)
    assert study.default.candidate == storing()
    assert all(trial.report["failure"] is None for trial in study.trials)
    assert PREFETCH in study.spec["space"]["knobs"]
    assert tiers_of(read_study(study.path).spec) == GIVEN
    on = ([study.path / "workload-0.jsonl"], study.path / "calibration.json")
    assert worth(storing(), *on, tiers=tiers_of(study.spec)) == study.default.report
    assert "what a copy to the host and back takes is not known" in worth(storing(), *on)["failure"]


def test_a_link_alone_brings_no_knob_of_a_store(tmp_path: Path) -> None:
    study = search(tmp_path / "study", space=Space(storing()), tiers=replace(GIVEN, store=None), num_trials=1)
    assert PREFETCH not in study.spec["space"]["knobs"]


@pytest.mark.parametrize("knob", sorted(f.name for f in fields(Storing)))
def test_a_knob_that_needs_a_store_does_nothing_without_one(knob: str) -> None:
    """At either end of its range every record is the same; with one, which has what the host gave up, they are not."""
    note = knobs(Lru)[knob]
    assert isinstance(note, Knob)
    tight = replace(storing().instance, num_kv_blocks=40)
    for tiers, is_searched in ((replace(GIVEN, store=None), False), (GIVEN, True)):
        found = []
        for value in (int(note.low), int(note.high)):
            policies = replace(storing().policies, cache=replace(Lru(host_blocks_factor=0.25), **{knob: value}))
            machine = tiers.machine(CALIBRATION, policies)
            told = {"step_time": machine.step_time, "copy_time": machine.copy_time, "vocab_size": VOCAB_SIZE}
            served = run_simulation(sessions(0), tight, policies, machine.predicts(tight), **told)  # type: ignore[arg-type]
            assert served.copies
            found.append(served)
        assert (found[0] != found[1]) == is_searched


@pytest.mark.parametrize("other", [{"store": None}, {"store": "sim:?bytes_per_s=9e9"}, {"host_link_bytes_per_s": 3e6}])
def test_with_other_tiers_it_is_another_study(other: dict[str, object], tmp_path: Path) -> None:
    """With the same ones it is resumed, trial by trial as if nothing had been."""
    whole = search(tmp_path / "whole", space=Space(storing()), tiers=GIVEN, num_trials=3)
    (whole.path / "study.json").unlink()
    again = search(whole.path, space=Space(storing()), tiers=GIVEN, num_trials=3)
    assert again.trials == whole.trials
    (whole.path / "study.json").unlink()
    with pytest.raises(ConfigError, match="is a study of something else"):
        search(whole.path, space=Space(storing()), tiers=replace(GIVEN, **other), num_trials=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tiers", "space", "told"),
    [
        (GIVEN, Space(default()), "device-only copies nothing; accepted: with another cache policy"),
        (GIVEN, Space(storing(), ["device-only"]), "device-only never uses it; accepted: another policy"),
        (replace(GIVEN, store="dir:/tmp"), Space(storing()), "names no simulated store"),
        (Tiers(store=GIVEN.store), Space(storing()), "a copy to the host and back takes is not known"),
    ],
)
def test_tiers_without_use_or_price_are_refused(tiers: Tiers, space: Space, told: str, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match=told):
        search(tmp_path / "study", space=space, tiers=tiers)
    assert list(tmp_path.iterdir()) == []


def test_the_command_is_told_of_them(tmp_path: Path) -> None:
    """As `simulate` is."""
    own.write(workload(), tmp_path / "trace.jsonl")
    write_calibration(CALIBRATION, tmp_path / "machine.json")
    given = ("--host-link", "2e6", "--store", GIVEN.store, "--set", "num_kv_blocks=64", "--set", "prefetch_blocks=7")
    words = ("tune", tmp_path / "trace.jsonl", "--calibration", tmp_path / "machine.json", "--cache", "lru", *given)
    assert cli.run([*map(str, words), "--trials", "1", "--quiet", "--out", str(tmp_path / "study")]) == 0
    study = read_study(tmp_path / "study")
    assert tiers_of(study.spec) == GIVEN
    assert study.default.candidate.policies.cache == Lru(prefetch_blocks=7)


def test_a_link_may_be_for_one_of_several_policies(tmp_path: Path) -> None:
    """Whether it is worth it is the question."""
    tiers = replace(GIVEN, store=None)
    study = search(tmp_path / "study", space=Space(default(), ["cache.lru"]), tiers=tiers, num_trials=2)
    assert study.default.candidate == default()


def test_a_store_is_tuned_and_verified_on_an_engine_that_has_one(tmp_path: Path) -> None:
    """Each run begins with nothing in it; an engine without one, or with somebody's blocks, measures another thing."""
    study = verbs.tune(
        [sessions(0)],
        CALIBRATION,
        out=tmp_path / "study",
        cache="lru",
        settings=SETTINGS,
        trials=4,
        workers=1,
        host_link_bytes_per_s=2e8,
        store="sim:?bytes_per_s=1e8",
        progress=False,
    )
    store = tmp_path / "store"
    options = EngineOptions(model=str(tiny_model()), device="cpu", dtype="float32", timer="cpu")
    linked = replace(options, host_link_bytes_per_s=2e8)
    for lacking, told in (
        (options, "has none; accepted: --host-link 2e"),
        (linked, "accepted: with --store dir:/PATH"),
    ):
        with pytest.raises(ConfigError, match=told):
            verbs.verify(study, sessions(1), out=tmp_path / "none", engine=Engine(lacking), progress=False)
    with Engine(replace(linked, store=f"dir:{store}")) as engine:
        done = verbs.verify(study, sessions(1), out=tmp_path / "verified", engine=engine, progress=False)
        for name in ("default", "tuned"):
            for folder in runs_of(tmp_path / "verified", name):
                run = read_run(folder)
                first = min((c for c in run.records.copies if c.kind == "prefetch"), key=lambda c: (c.asked_us, c.copy))
                assert first.num_moved_tokens == 0, "somebody's blocks were there"
                assert run.manifest.copy_time["prefetch"] == [0.0, 1.0], "a hundred bytes a token, as searched"
        assert len(done.gain.default_per_s) == 3
        assert blocks_in(store), "the last run's are there"
        with pytest.raises(ConfigError, match="has blocks that a run would find; accepted: a store with none"):
            verbs.verify(study, sessions(1), out=tmp_path / "again", engine=engine, progress=False)
