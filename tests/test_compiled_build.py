"""The compiled build: it says what it is, and writes the bytes that pure Python writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report_inputs import calibration, workload
from xllm_lab import provenance
from xllm_lab.formats import own
from xllm_lab.sim.calibrate import write_calibration

ROOT = Path(__file__).parent.parent
FILES = ("requests.parquet", "steps.parquet", "transfers.parquet", "roles.parquet", "workload.jsonl")
FLEET = """
[fleet]
num_instances = 3
heartbeat_us = 50_000
[link]
latency_us = 200
bytes_per_s = 1_000_000
[router]
policy = "cache-aware"
[failover]
policy = "requeue"
[roles]
policy = "static"
[[outage]]
instance = 1
start_us = 60_000
end_us = 700_000
"""


NOT_HERE = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def simulated(python: Path, folder: Path, name: str, env: dict[str, str]) -> Path:
    """What `python -m xllm_lab` writes about the inputs, run away from the checkout."""
    inputs = ("trace.jsonl", "--calibration", "machine.json", "--cluster", "fleet.toml")
    command = (python, "-m", "xllm_lab", "simulate", *inputs, "--out", name, "--quiet")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / name


def test_a_checkout_is_pure() -> None:
    """No extension lies beside a source, where it would win over every edit; and the package says so."""
    assert not [*(ROOT / "xllm_lab").rglob("*.so")]
    assert provenance.versions()["build"] == provenance.build() == "pure"


@pytest.mark.slow
def test_both_builds_write_the_same_bytes(tmp_path: Path) -> None:
    """Of a fleet with links, stale heartbeats and an outage, whatever the seed of Python's hashes."""
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    made = subprocess.run(
        ("make", "compiled", f"COMPILED={tmp_path / 'built'}", f"PYTHON={sys.executable}"),
        cwd=ROOT,
        env=NOT_HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    own.write(workload(), tmp_path / "trace.jsonl")
    write_calibration(calibration(), tmp_path / "machine.json")
    (tmp_path / "fleet.toml").write_text(FLEET, encoding="utf-8")
    here = NOT_HERE | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    pure = simulated(Path(sys.executable), tmp_path, "pure", here)
    python = tmp_path / "built" / "venv" / "bin" / "python"
    compiled = simulated(python, tmp_path, "compiled", NOT_HERE | {"PYTHONHASHSEED": "2"})
    builds = [json.loads((run / "manifest.json").read_text())["versions"]["build"] for run in (pure, compiled)]
    assert builds == ["pure", "compiled"]
    for name in FILES:
        assert (pure / name).read_bytes() == (compiled / name).read_bytes(), f"{name} differs"
