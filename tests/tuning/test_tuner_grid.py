"""The comparison of tuners on a measured grid runs from end to end, on a grid of four and a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import write_tiny_model

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tuner_grid.py"
AXES = {"max_seqs_per_batch": [4, 16], "max_tokens_per_batch": [64, 512], "policy": ["decode-first"]}


def run(*words: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(SCRIPT), *words], env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_each_method_is_judged_by_what_the_engine_measured(tmp_path: Path) -> None:
    """Regret only falls short of all, and the tuner makes no engine run of its own: everything was measured before."""
    model = str(write_tiny_model(tmp_path / "model", max_position_embeddings=2048))
    known = ["--model", model, "--axes", json.dumps(AXES)]
    folder, svg = tmp_path / "grid", tmp_path / "regret.svg"
    run("measure", str(folder), "--requests", "16", "--only", "chat", *known)
    assert len((folder / "grid.jsonl").read_text(encoding="utf-8").splitlines()) == 4 * 2
    run("compare", str(folder), "--seeds", "1", "--trials", "4", *known)
    found = [json.loads(line) for line in (folder / "regret.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["method"] for row in found} >= {"tuner", "random", "vLLM auto_tune order"}
    for row in found:
        assert all(0 <= regret <= 1 for regret in row["regret_frac"])
    run("draw", str(folder), str(svg))
    assert svg.read_text(encoding="utf-8").startswith("<svg")
