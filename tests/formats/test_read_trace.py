"""A format is found by its file, and a new module is a new format."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.formats.refusals import assert_refuses_what_is_no_text_file
from xllm_lab.errors import TraceError
from xllm_lab.formats import formats, read_trace

TRACES = Path(__file__).parents[2] / "traces"
ACCEPTED = ", ".join(formats())

with_public_data = pytest.mark.skipif("XLLM_LAB_DATA" not in os.environ, reason="XLLM_LAB_DATA names no folder")


def public(name: str) -> Path:
    return Path(os.environ["XLLM_LAB_DATA"]) / name


def test_every_format_of_the_package_is_found() -> None:
    assert set(formats()) >= {"azure", "mooncake", "vllm-bench", "xllm-lab"}


def test_a_file_that_looks_like_nothing_known_is_refused_with_the_formats(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(TraceError) as refused:
        read_trace(path)
    assert str(refused.value) == f"{path}: looks like none of the accepted formats ({ACCEPTED}); name its format"


def test_an_unknown_format_is_refused_with_the_formats(tmp_path: Path) -> None:
    with pytest.raises(TraceError) as refused:
        read_trace(tmp_path / "t", format="parquet")
    assert str(refused.value) == f"{tmp_path / 't'}: format 'parquet' is unknown; one of {ACCEPTED} is accepted"


def test_a_named_format_is_not_guessed_again(tmp_path: Path) -> None:
    """The reader says what is wrong even where no guess would have found it."""
    path = tmp_path / "t"
    path.write_text("{}\n")
    with pytest.raises(TraceError, match="input_length is missing"):
        read_trace(path, format="mooncake")


def test_a_path_may_be_text() -> None:
    assert len(read_trace(str(TRACES / "chat.jsonl")).requests) == 600


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    assert_refuses_what_is_no_text_file(read_trace, tmp_path)


@with_public_data
def test_the_azure_conversation_trace() -> None:
    workload = read_trace(public("azure/AzureLLMInferenceTrace_conv.csv"))
    prompt_tokens = sum(r.prompt.num_tokens for r in workload.requests) / len(workload.requests)
    assert len(workload.requests) == 19_366
    assert prompt_tokens == pytest.approx(1154.7, abs=0.05)
    assert workload.requests[-1].arrival_us == 3_501_721_937


@with_public_data
def test_the_mooncake_trace_shares_prefixes() -> None:
    requests = read_trace(public("mooncake/synthetic_trace.jsonl")).requests
    hashes = [h for r in requests for h in r.prompt.block_hashes]
    assert len(requests) == 3_993
    assert len(set(hashes)) < len(hashes)


@with_public_data
def test_measured_runs() -> None:
    runs = sorted(public("measured").glob("*/vllm/requests.jsonl"))
    assert runs
    assert {len(read_trace(run).requests) for run in runs} == {300}
