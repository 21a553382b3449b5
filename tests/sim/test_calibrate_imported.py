"""A server's profile as a calibration: what it is fitted to, what it lacks, and a simulation that runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.profiles.folders import BATCH_HEADER, batch_row, ascend_folder, vllm_part, write_csv
from xllm_lab import verbs
from xllm_lab.cli import run
from xllm_lab.errors import ConfigError
from xllm_lab.sim.calibrate import read_calibration
from xllm_lab.step_time import Chunk

TRACE = Path(__file__).parents[2] / "traces" / "chat.jsonl"


def step_us(chunks: list[tuple[int, int]]) -> float:
    """2,600 us to read the weights of a Qwen3-32B over 16 dies, 3 us a token, 0.02 us a token of KV."""
    return 2600 + 3 * sum(new for new, _ in chunks) + 0.02 * sum(new + computed for new, computed in chunks)


def service(folder: Path, num_batches: int = 120) -> Path:
    """Decodes of 1 to 23 sequences, and a prompt in every third batch."""
    rows = []
    for k in range(num_batches):
        chunks = [(1, 500 * i + 37 * k) for i in range(1, 2 + k % 23)] + [(64 + 16 * k, 0)] * (k % 3 == 0)
        parts = [vllm_part(f"r{i}", k, new, computed, new) for i, (new, computed) in enumerate(chunks)]
        rows.append(batch_row("modelExec", ms=step_us(chunks) / 1000, parts=parts, at_ms=100 * k))
    rows.append(batch_row("specDecoding", ms=2))
    write_csv(folder / "batch.csv", BATCH_HEADER, rows)
    return folder


def test_a_profile_is_calibrated_on_and_simulated_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, sim = tmp_path / "machine.json", tmp_path / "sim"
    words = ["calibrate", str(service(tmp_path / "svc")), "--vocab-size", "151936", "--out", str(out)]
    assert run(words) == 0
    told = capsys.readouterr().err
    assert "120 steps: lengths as recorded" in told
    assert "1 rows of batch.csv not used: specDecoding is no execution of the model" in told
    fitted = read_calibration(out)
    chunks = [Chunk(1, 3000)] * 8
    assert fitted.step_time.step_us(chunks, 8) == pytest.approx(step_us(list(chunks)), rel=0.01)
    assert fitted.residual.mape_frac < 0.01
    assert run(["simulate", str(TRACE), "--requests", "5", "--calibration", str(out), "--out", str(sim)]) == 0


def test_what_a_calibration_needs_is_said(tmp_path: Path) -> None:
    folder = service(tmp_path / "svc")
    with pytest.raises(ConfigError, match="vocab_size is None; that of the profiled model, at least 1, is accepted"):
        verbs.calibrate([folder])
    with pytest.raises(ConfigError, match="has no executed batches; a profile with"):
        verbs.calibrate([ascend_folder(tmp_path / "npu")], vocab_size=10)
    with pytest.raises(ConfigError, match="is a profile and others are runs"):
        verbs.calibrate([folder, tmp_path / "run"], vocab_size=10)
    with pytest.raises(ConfigError, match="svc: 4 steps, at least"):
        verbs.calibrate([service(tmp_path / "few" / "svc", num_batches=4)], vocab_size=10)
