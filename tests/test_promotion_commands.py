"""`recommend`, `promote` and `drift` as they are typed: what they print, what they write, and their exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tiny_loop import said
from tests.tuning.promotions import bursts, one, verified
from tests.tuning.searches import search
from xllm_lab.formats import own
from xllm_lab.tuning.evidence import METRICS

FOREVER = ("--max-calibration-age-days", "100000")


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("commands") / "verified"
    verified(out, default=one(max_seqs_per_batch=1), tuned=one())
    return out


def test_a_recommendation_tells_intervals_and_changes(tmp_path: Path) -> None:
    search(tmp_path / "study")
    found = json.loads(said("recommend", "--json", tmp_path / "study", "--arrivals", "2").out)
    (only,) = found.values()
    assert set(only["tuned"]) == set(METRICS)
    assert all(i["low"] <= i["expected"] <= i["high"] for i in only["tuned"].values())
    text = said("recommend", tmp_path / "study", "--arrivals", "2").out
    assert "interpolated" in text
    assert "over 2 arrivals" in text


def test_what_passes_is_promoted_and_watched(passed: Path, tmp_path: Path) -> None:
    """`drift` finds nothing new in the very workload, and says so when ten times as much comes."""
    done = said("promote", "--json", passed, "--to", "xllm", "--out", tmp_path / "out", *FOREVER)
    assert json.loads(done.out) == {"promoted": str(tmp_path / "out" / "promoted.json"), "refusals": []}
    own.write(bursts(), tmp_path / "same.jsonl")
    calm = said("drift", tmp_path / "same.jsonl", "--promoted", tmp_path / "out")
    assert "within the tuned region" in calm.out
    wild = said("drift", "--json", tmp_path / "same.jsonl", "--rate-per-s", "400", "--promoted", tmp_path / "out")
    assert [c["feature"] for c in json.loads(wild.out)["changes"] if c["is_drift"]] == ["log_rate"]
    assert (calm.status, wild.status) == (0, 1)


def test_what_is_refused_is_told_why(passed: Path, tmp_path: Path) -> None:
    """Reason and numbers, status 1, and no folder; terms that are none are status 2."""
    shutil.copytree(passed, tmp_path / "v")
    value = json.loads((tmp_path / "v" / "verification.json").read_text(encoding="utf-8"))
    (tmp_path / "v" / "verification.json").write_text(json.dumps({**value, "recommendation": None}), encoding="utf-8")
    words = ("promote", tmp_path / "v", "--to", "xllm", "--out", tmp_path / "out", *FOREVER)
    refused = said(*words)
    assert (refused.status, refused.out.splitlines()) == (
        1,
        ["not promoted", "  not-predicted: nothing was predicted of it; verify the study again"],
    )
    assert [r["reason"] for r in json.loads(said(*words, "--json").out)["refusals"]] == ["not-predicted"]
    assert not (tmp_path / "out").exists()
    wrong = said(*words, "--min-slo-attainment", "2")
    assert wrong.status == 2
    assert "from 0 to 1 is accepted" in wrong.err
