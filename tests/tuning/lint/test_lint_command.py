"""`xllm-lab lint`: what it prints, what it writes, and the status with which it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xllm_lab.cli import run

WRONG = '{"max_seqs_per_batch": 64, "use_zero_evict": true}'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "xllm.json"
    path.write_text(WRONG, encoding="utf-8")
    return path


def test_findings_are_told_with_line_rule_and_source(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the status says that there are some."""
    assert run(["lint", str(config)]) == 1
    out = capsys.readouterr().out
    assert f"{config}:1: warning: use_zero_evict changes nothing" in out
    assert "[zero-evict-is-dead]" in out
    assert "source: xllm@3906f5a91 xllm/core/scheduler/zero_eviction_scheduler.cpp:347" in out
    assert out.endswith("1 warning\n")


@pytest.mark.parametrize("as_json", [["--json"], ["--format", "json"]])
def test_findings_as_data(config: Path, capsys: pytest.CaptureFixture[str], as_json: list[str]) -> None:
    """Either option."""
    assert run(["lint", str(config), *as_json]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["form"], told["is_clean"]) == ("xLLM", "JSON", False)
    assert [(one["rule"], one["line"], one["repair"]) for one in told["findings"]] == [
        ("zero-evict-is-dead", 1, "without use_zero_evict")
    ]


def test_a_clean_configuration_ends_with_0(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes do not count."""
    config.write_text('{"enable_chunked_prefill": false}', encoding="utf-8")
    assert run(["lint", str(config)]) == 0
    assert capsys.readouterr().out.endswith("1 note\n")


def test_a_repair_goes_to_stdout_and_leaves_the_file_alone(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was done goes to stderr."""
    assert run(["lint", str(config), "--fix"]) == 0
    got = capsys.readouterr()
    assert json.loads(got.out) == {"max_seqs_per_batch": 64}
    assert "repaired: warning: use_zero_evict" in got.err
    assert config.read_text(encoding="utf-8") == WRONG


def test_a_repair_goes_to_a_file(config: Path, tmp_path: Path) -> None:
    """Which then lints clean."""
    out = tmp_path / "new" / "fixed.json"
    assert run(["lint", str(config), "--fix", "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8")) == {"max_seqs_per_batch": 64}
    assert config.read_text(encoding="utf-8") == WRONG
    assert run(["lint", str(out)]) == 0


def test_a_repair_in_place(config: Path) -> None:
    """Only where it was asked for."""
    assert run(["lint", str(config), "--fix", "--in-place"]) == 0
    assert json.loads(config.read_text(encoding="utf-8")) == {"max_seqs_per_batch": 64}


def test_what_cannot_be_repaired_is_left_and_counts(config: Path) -> None:
    """The status is that of the result."""
    config.write_text("--num_speculative_tokens=2\n--colour=red\n", encoding="utf-8")
    assert run(["lint", str(config), "--fix", "--in-place"]) == 1
    assert config.read_text(encoding="utf-8") == "--num_speculative_tokens=2\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give a configuration, or --rules"),
        (["CONFIG", "--in-place"], "--out and --in-place are where --fix writes"),
        (["CONFIG", "--fix", "--out", "CONFIG"], "the configuration itself"),
        (["CONFIG", "--fix", "--out", "x", "--in-place"], "two places"),
        (["CONFIG", "--engine-version", "7"], "no flags of xLLM '7' are known"),
        (["CONFIG", "--platform", "tpu"], "--platform is 'tpu', accepted: npu, mlu"),
        (["CONFIG", "--concurrency", "0"], "--concurrency is 0, at least 1 is accepted"),
        (["CONFIG", "--model", "gpt-5"], "no model 'gpt-5' is known"),
        (["nowhere.json"], "no configuration can be read there"),
    ],
)
def test_what_is_unclear_ends_with_2(
    config: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    """In one line."""
    assert run(["lint", *(str(config) if option == "CONFIG" else option for option in options)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"{", b"[", b"%", b'{"a": NaN}', b"- x\n- y", b"!!python/object:os.x {}"]
)
def test_odd_files_end_without_a_trace(config: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    """Whatever is in them."""
    config.write_bytes(content)
    assert run(["lint", str(config)]) in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_memory_is_a_matter_of_model_and_device(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file fits one device, and not another."""
    config.write_text("--max_memory_utilization=0.8\n", encoding="utf-8")
    for device, status in (("ascend-910b3", 0), ("ascend-910b4", 1)):
        assert run(["lint", str(config), "--model", "qwen3-14b", "--hardware", device]) == status
    assert "takes 27.5 GiB of weights on each of 1 ascend-910b4" in capsys.readouterr().out


def test_the_table_of_rules(capsys: pytest.CaptureFixture[str]) -> None:
    """As data, too."""
    assert run(["lint", "--rules", "--json"]) == 0
    assert {"id", "what", "source"} == set(json.loads(capsys.readouterr().out)[0])
