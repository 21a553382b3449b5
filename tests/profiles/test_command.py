"""The verb `profile`: what is there, and what is not used and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.profiles.folders import (
    BATCH_HEADER,
    COLLECTIVE_US,
    OPERATORS_US,
    SHADOW_US,
    ascend_folder,
    batch_row,
    vllm_part,
    write_csv,
)
from xllm_lab.cli import run


def test_a_table_for_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ascend_folder(tmp_path)
    assert run(["profile", str(tmp_path), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: ascend-profiler, 2 steps"
    operators = lines[lines.index("operators") + 2 :]
    assert operators[0].split() == ["MatMulV2", "AI_CORE", "12", "0.187", "33", "%", "15.6", "12.2", "18.9"]
    assert operators[2] == "3 more"
    words = {line.split("  ")[0]: line.split() for line in lines}
    assert words["all_reduce"][1:] == ["0", "503", "-", "-", "6", "0.119", "19.8", "19.8", "19.8"]
    assert [words[name][-3:] for name in ("computing", "free")] == [["12.1", "69", "%"], ["1.20", "6.8", "%"]]
    second = "kernel_details.csv: the kernel of a collective that an hcom row counts already"
    assert words[second][-2:] == ["6", "0.118"]
    assert any(line.startswith("FusedInferAttentionScore: 6 calls read paged KV") for line in lines)


def test_json_accounts_for_all_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ascend_folder(tmp_path)
    assert run(["profile", str(tmp_path), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    sums = {part: sum(row["total_us"] for row in value[part]) for part in ("operators", "collectives", "left_out")}
    assert sums["operators"] == pytest.approx(6 * OPERATORS_US)
    assert sums["collectives"] == pytest.approx(6 * COLLECTIVE_US)
    assert sums["left_out"] == pytest.approx(6 * SHADOW_US)


def test_a_link_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10 us and 100 GB/s, at two sizes."""
    path = tmp_path / "all_reduce.txt"
    header = "data_size(Bytes): | aveg_time(us): | alg_bandwidth(GB/s): | check_result:"
    path.write_text(f"{header}\n1000000 | 20 | 50 | success\n9000000 | 100 | 90 | success\n")
    assert run(["profile", str(path)]) == 0
    assert "all_reduce      -        10.0                  100\n" in capsys.readouterr().out
    path.write_text(f"{header}\n1000000 | 20 | 50 | success\n9000000 | 10 | 900 | success\n")
    assert run(["profile", str(path)]) == 0
    assert "all_reduce      -           -                    -\n" in capsys.readouterr().out


def test_batches_and_what_they_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The size of a block turns batches that could not be used into samples."""
    rows = [
        batch_row("modelExec", ms=19.4, parts=[vllm_part("a", 1, 1, 10, 10)]),
        batch_row("modelExec", ms=15.4, parts=[{"rid": "b", "iter": 1}], decodes=(1, 1), used_blocks=9),
    ]
    write_csv(tmp_path / "batch.csv", BATCH_HEADER, rows)
    assert run(["profile", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 executed, 17.4 ms in the mean\n1 to learn step times from: lengths as recorded\n" in said
    assert "its lengths need the tokens of a KV block" in said
    assert run(["profile", str(tmp_path), "--kv-block-tokens", "128"]) == 0
    said = capsys.readouterr().out
    assert "1 to learn step times from: lengths estimated from the KV blocks in use" in said
    assert "not used" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top", "0"], "--top is 0, at least 1 is accepted"),
        (["--kv-block-tokens", "0"], "kv_block_tokens is 0, at least 1 is accepted"),
        (["--out", "o.csv"], "which is only shown; accepted: `xllm-lab import` to keep it"),
        (
            ["--source", "nsys"],
            "source 'nsys' is unknown; one of ascend-profiler, hccl-test, msserviceprofiler, xllm-log, xllm-profile",
        ),
    ],
)
def test_refusals_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    write_csv(tmp_path / "batch.csv", BATCH_HEADER, [batch_row("modelExec", ms=19.4)])
    assert run(["profile", str(tmp_path), *options]) == 2
    heard = capsys.readouterr()
    assert said in heard.err
    assert heard.err.count("\n") == 1
    assert not heard.out
