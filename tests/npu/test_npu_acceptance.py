"""Hardware acceptance runs to its end on the fake device, and leaves what the simulator wants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.npu.engines import folder, install_operators
from tests.tiny_loop import said
from xllm_lab import verbs
from xllm_lab.acceptance import PLAN
from xllm_lab.runs import read_run


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()


def test_acceptance_of_a_device(tmp_path: Path) -> None:
    """In bfloat16, every call held against the operators' limits; the same plan as on real hardware."""
    out = tmp_path / "found"
    line = ("accept", "--device", "npu", "--model", folder(), "--requests", 2, "--repeats", 1, "--out", out)
    told = said(*line)
    found = json.loads((out / "acceptance.json").read_text())
    assert told.status == 0, [f for f in found["findings"] if not f["passed"]]
    assert [part.name for part in PLAN] == list(dict.fromkeys(f["part"] for f in found["findings"]))
    assert found["model"]["dtype"] == "bfloat16"
    assert {served["by"] for served in found["model"]["ops"].values()} >= {"torch_npu"}
    fitted = verbs.calibrate([out / name for name in ("full", "graphs", "paced")])
    again = verbs.simulate(read_run(out / "held-out"), fitted, out=tmp_path / "again")
    assert again.manifest.graphs is not None
