"""`xllm-lab replay --device npu` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.npu.engines import folder, install_operators
from tests.npu.test_npu_serving import crowd
from tests.tiny_loop import said
from xllm_lab.formats import own
from xllm_lab.runs import read_run

SETTINGS = tuple(
    word
    for setting in ("max_model_len=400", "block_size=128", "num_kv_blocks=40", "max_seqs_per_batch=8")
    for word in ("--set", setting)
)


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    own.write(crowd(5), tmp_path / "trace.jsonl")
    return (
        "replay",
        str(tmp_path / "trace.jsonl"),
        "--model",
        str(folder()),
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    )


def test_a_replay_within_the_operators_limits(words: tuple[str, ...], tmp_path: Path) -> None:
    """In bfloat16, the device's own type; eager prompts, captured decodes, every call held against its limits."""
    outcome = said(*words, *SETTINGS, "--device", "npu", "--check-ops", "--shapes", "xllm-buckets")
    assert (outcome.status, outcome.err) == (0, "")
    run = read_run(tmp_path / "run")
    assert run.manifest.model is not None
    assert run.manifest.graphs is not None
    assert run.manifest.model["dtype"] == "bfloat16"
    assert run.manifest.graphs["replays"] > 0
    assert all(len(r.output_token_ids) for r in run.records.requests)


def test_another_block_size(words: tuple[str, ...]) -> None:
    outcome = said(*words, *SETTINGS, "--set", "block_size=16", "--device", "npu")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "block_size is 16; the attention of npu takes KV blocks of 128 tokens; accepted: 128" in outcome.err


def test_limits_where_there_are_none(words: tuple[str, ...]) -> None:
    """Asking for a check that cannot be made is an oversight."""
    outcome = said(*words, *SETTINGS, "--device", "cpu", "--check-ops")
    assert outcome.status == 2
    assert "operators of cpu have no documented limits; accepted on: npu" in outcome.err
