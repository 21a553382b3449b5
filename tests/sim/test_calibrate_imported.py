"""A server's own records as a calibration: what it is fitted to, what it lacks, and a simulation that runs on it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.profiles.folders import BATCH_HEADER, ascend_folder, batch_row, vllm_part, write_csv
from tests.profiles.xllm_lines import PREDICTED, batch_line, request_line
from xllm_lab import verbs
from xllm_lab.cli import run
from xllm_lab.errors import ConfigError
from xllm_lab.profiles.sources.xllm_profile import AVERAGE_LENGTHS
from xllm_lab.profiles.steps import EXACT
from xllm_lab.runs import read_run
from xllm_lab.sim.calibrate import Calibration, read_calibration
from xllm_lab.step_time import Chunk

VOCABULARY = 151_936


def step_us(chunks: Sequence[tuple[int, int]]) -> float:
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


def log(path: Path, num_batches: int = 120) -> Path:
    """A decode instance: sequences come and go, and each of them is a token longer in the next step."""
    draw = random.Random(7)
    lengths: list[int] = []
    lines = []
    for _ in range(num_batches):
        lengths = [length + 1 for length in lengths if draw.random() < 0.9]
        lengths += [draw.randrange(64, 8000) for _ in range(draw.randrange(1, 6))]
        us = step_us([(1, length - 1) for length in lengths])
        lines += [batch_line(lengths, f"{us / 1000:.3f} ms"), PREDICTED]
    lines += [request_line(at=f"{10 + k}.000000", total="900.0ms", prompt=40, output=8) for k in range(5)]
    path.write_text("\n".join(lines) + "\n")
    return path


def instance(path: Path) -> Path:
    """Prompts shorter by a tenth each; averages halved, batches smaller by a tenth each; as xLLM measures them."""
    prompts, decodes = [], []
    length = 8192
    while length > 1:
        prompts.append([length, step_us([(length, 0)]) / 1000])
        length = length * 9 // 10
    average = 8192
    while average > 64:
        size = 64
        while size > 0:
            decodes.append([average, size, step_us([(1, average - 1)] * size) / 1000])
            size = size * 9 // 10
        average //= 2
    path.write_text(json.dumps({"name": "a", "ttft_profiling_data": prompts, "tpot_profiling_data": decodes}))
    return path


def calibrated(source: str, path: Path, out: Path) -> Calibration:
    verbs.import_profile(source, path, out=out)
    return verbs.calibrate([out], vocab_size=VOCABULARY)


DECODES = [[Chunk(1, 3000)] * 8, [Chunk(1, 200), Chunk(1, 7000)], [Chunk(1, 512 * k) for k in range(1, 13)]]
PROMPTS = [[Chunk(512, 0)], [Chunk(4096, 0)], [Chunk(7000, 0)]]


@pytest.mark.parametrize("source", ["msserviceprofiler", "xllm-log", "xllm-profile"])
def test_a_known_machine_comes_back(tmp_path: Path, source: str) -> None:
    """In each form, within what the records cover: a decode instance says nothing about prompts."""
    path = {
        "msserviceprofiler": lambda: service(tmp_path / "svc"),
        "xllm-log": lambda: log(tmp_path / "xllm.INFO"),
        "xllm-profile": lambda: instance(tmp_path / "instance.json"),
    }[source]()
    fitted = calibrated(source, path, tmp_path / "imported")
    for chunks in DECODES + (PROMPTS[:1] if source == "msserviceprofiler" else PROMPTS * (source == "xllm-profile")):
        assert fitted.step_time.step_us(chunks, len(chunks)) == pytest.approx(step_us(chunks), rel=0.01)
    assert fitted.residual.mape_frac < 0.01
    assert fitted.hardware == {"profiled_by": [source]}


def test_a_server_is_imported_calibrated_on_and_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A production log: its batches are the machine, its requests the trace."""
    imported, fitted, sim = tmp_path / "imported", tmp_path / "machine.json", tmp_path / "sim"
    assert run(["import", "xllm-log", str(log(tmp_path / "xllm.INFO")), "--out", str(imported)]) == 0
    assert f"120 steps: {EXACT}" in capsys.readouterr().out
    assert run(["calibrate", str(imported), "--vocab-size", str(VOCABULARY), "--out", str(fitted)]) == 0
    assert capsys.readouterr().err == f"xllm-lab: {imported}: 120 steps: {EXACT}\n"
    assert read_calibration(fitted).runs == ("imported",)
    trace = str(imported / "workload.jsonl")
    assert run(["simulate", trace, "--calibration", str(fitted), "--out", str(sim)]) == 0
    arrivals = [request.arrival_us for request in read_run(sim).workload.requests]
    assert arrivals == [1_000_000 * k for k in range(5)]


def test_tables_of_several_instances_are_one_machine(tmp_path: Path) -> None:
    """A decode instance's log and a mixed instance's table, of one model on one kind of machine."""
    folders = [tmp_path / "log", tmp_path / "table"]
    verbs.import_profile("xllm-log", log(tmp_path / "xllm.INFO"), out=folders[0])
    done = verbs.import_profile("xllm-profile", instance(tmp_path / "instance.json"), out=folders[1])
    assert set(done.num_by_basis) == {EXACT, AVERAGE_LENGTHS}
    fitted = verbs.calibrate(folders, vocab_size=VOCABULARY)
    assert fitted.hardware == {"profiled_by": ["xllm-log", "xllm-profile"]}
    assert fitted.residual.num_steps == 120 + done.parts["steps.parquet"]


def test_what_a_calibration_needs_is_said(tmp_path: Path) -> None:
    svc, npu, few = tmp_path / "svc", tmp_path / "npu", tmp_path / "few"
    verbs.import_profile("msserviceprofiler", service(tmp_path / "a"), out=svc)
    verbs.import_profile("ascend-profiler", ascend_folder(tmp_path / "b"), out=npu)
    verbs.import_profile("msserviceprofiler", service(tmp_path / "c", num_batches=4), out=few)
    with pytest.raises(ConfigError, match="vocab_size is None; that of the profiled model, at least 1, is accepted"):
        verbs.calibrate([svc])
    with pytest.raises(ConfigError, match=r"npu: has no steps.parquet \(no executed batches\); accepted: an import of"):
        verbs.calibrate([npu], vocab_size=10)
    with pytest.raises(ConfigError, match="svc: is an import and others are runs"):
        verbs.calibrate([svc, tmp_path / "run"], vocab_size=10)
    with pytest.raises(ConfigError, match="few: 4 steps, at least"):
        verbs.calibrate([few], vocab_size=10)


def test_a_profile_is_imported_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["calibrate", str(service(tmp_path / "svc")), "--vocab-size", "10", "--out", str(tmp_path / "m.json")]
    assert run(words) == 2
    said = capsys.readouterr().err
    assert said.endswith("svc: is a profile; accepted: engine runs, or folders that `xllm-lab import` wrote\n")
    assert said.count("\n") == 1
