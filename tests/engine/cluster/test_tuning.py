"""A fleet tuned in the simulator, and measured on engine processes: by the command, as a person would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.cluster.conftest import options
from tests.tiny_models import tiny_model
from tests.tuning.searches import WorkersHere
from tests.tuning.test_tiers import SETTINGS, sessions
from xllm_lab import cli, verbs
from xllm_lab.engine.engine import Engine
from xllm_lab.errors import ConfigError
from xllm_lab.formats import own
from xllm_lab.runs import read_run
from xllm_lab.tuning import workers
from xllm_lab.tuning.study import read_study
from xllm_lab.tuning.verify import read_verification, runs_of


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert cli.run([*map(str, arguments), "--json", "--quiet"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


@pytest.mark.slow
def test_a_fleet_is_tuned_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two engine processes serve default and best in turn, each with its own router's policies."""
    monkeypatch.setattr(workers, "ProcessPoolExecutor", WorkersHere)
    one = options("virtual")
    knobs = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    with Engine(one) as engine:
        run = verbs.replay(sessions(0), out=tmp_path / "run", engine=engine, settings=SETTINGS, progress=False)
        verbs.calibrate([run], out=tmp_path / "machine.json")
        own.write(sessions(0), tmp_path / "seen.jsonl")
        own.write(sessions(1), tmp_path / "held-out.jsonl")
        tuned = told(
            capsys,
            *("tune", tmp_path / "seen.jsonl", "--calibration", tmp_path / "machine.json", *knobs),
            *("--instances", 2, "--route", "cache-aware-corrected:match_weight=0.5", "--also", "prefix-affinity"),
            *("--trials", 6, "--workers", 1, "--out", tmp_path / "study"),
        )
        study = read_study(tmp_path / "study")
        assert tuned["default"]["candidate"]["fleet"]["route"]["match_weight"] == 0.5
        assert study.spec["space"]["knobs"]["route.cache-aware-corrected.waiting_weight"] == [0.0, 16.0, False]
        with pytest.raises(ConfigError, match="a fleet on an engine that is open already"):
            verbs.verify(study, sessions(1), out=tmp_path / "single", engine=engine, progress=False)
    done = told(
        capsys,
        *("verify", tmp_path / "study", tmp_path / "held-out.jsonl", "--out", tmp_path / "verified"),
        *("--model", tiny_model(), "--device", "cpu", "--dtype", "float32", "--timer", "cpu"),
    )
    assert len(done["gain"]["default_per_s"]) == 3
    assert all(goodput > 0 for goodput in done["gain"]["default_per_s"])
    verified = read_verification(tmp_path / "verified")
    assert (verified.default, verified.tuned) == (study.default.candidate, study.best.candidate)
    for name, candidate in (("default", verified.default), ("tuned", verified.tuned)):
        for folder in runs_of(tmp_path / "verified", name):
            measured = read_run(folder)
            assert candidate.fleet is not None
            assert measured.manifest.fleet == candidate.fleet.as_dict()
            assert measured.manifest.instance_policies() == candidate.policies
            assert {r.instance for r in measured.records.requests} == {0, 1}
