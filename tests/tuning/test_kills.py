"""A study of 200 trials whose coordinator, workers and disk fail ten times each: in the end nobody could tell."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tuning.killing import NUM_TRIALS
from xllm_lab.cluster_services import free_ports, started_postgres
from xllm_lab.errors import ConfigError
from xllm_lab.tuning.study import Study, read_study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


def killed(what: str, folder: Path, sampler: str, storage: str | None = None) -> Path:
    """The folder of a study after it ended."""
    out = folder / f"{what.replace(' ', '-')}-{storage is not None}" / sampler
    run([what, str(out), *([] if storage is None else [storage])])
    return out


def run(words: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.tuning.killing", *words]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def undisturbed(folder: Path, sampler: str) -> Path:
    """Once a sampler."""
    out = folder / f"undisturbed-{sampler}" / sampler
    if not out.exists():
        run(["nobody", str(out)])
    return out


def reports(study: Path) -> dict[str, bytes]:
    """Every evaluation that was kept, byte for byte."""
    kept = study.parent / "evaluations"
    return {path.relative_to(kept).as_posix(): path.read_bytes() for path in kept.rglob("*") if path.is_file()}


def assert_nobody_could_tell(out: Path, whole: Path) -> Study:
    assert (out / "study.json").read_bytes() == (whole / "study.json").read_bytes()
    assert reports(out) == reports(whole)
    study = read_study(out)
    assert [t.number for t in study.trials] == list(range(NUM_TRIALS))
    return study


def test_ten_coordinators_are_killed(folder: Path) -> None:
    """With TPE, which learns from what was told: nothing is lost, repeated, or drawn otherwise."""
    assert_nobody_could_tell(killed("coordinator", folder, "tpe"), undisturbed(folder, "tpe"))


def test_ten_workers_are_killed(folder: Path) -> None:
    """The coordinator goes on."""
    assert_nobody_could_tell(killed("worker", folder, "random"), undisturbed(folder, "random"))


def test_the_disk_is_full_ten_times(folder: Path) -> None:
    """Each time the study ends with one line, and is resumed where there is more room."""
    whole = undisturbed(folder, "random")
    assert_nobody_could_tell(killed("disk", folder, "random"), whole)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`")
def test_ten_ray_workers_are_killed(folder: Path) -> None:
    """Ray gives their tasks to others."""
    assert_nobody_could_tell(killed("ray worker", folder, "random"), undisturbed(folder, "random"))


@pytest.fixture
def postgres() -> Iterator[str]:
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs the extra `postgresql`")
    (port,) = free_ports(1)
    try:
        with started_postgres(port=port) as url:
            yield url
    except ConfigError as error:
        pytest.skip(str(error))


def test_ten_coordinators_are_killed_whose_book_is_in_postgresql(folder: Path, postgres: str) -> None:
    """The same trials as with a journal."""
    study = assert_same_trials(killed("coordinator", folder, "random-50", postgres), undisturbed(folder, "random-50"))
    assert study.spec["storage"] == postgres


def test_a_database_file_will_do(folder: Path, tmp_path: Path) -> None:
    """SQLite's, undisturbed."""
    url = f"sqlite:///{tmp_path / 'book.sqlite'}"
    out = tmp_path / "random-50"
    run(["nobody", str(out), url])
    assert_same_trials(out, undisturbed(folder, "random-50"))


def assert_same_trials(out: Path, whole: Path) -> Study:
    assert reports(out) == reports(whole)
    study = read_study(out)
    assert study.trials == read_study(whole).trials
    return study
