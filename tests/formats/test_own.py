"""What is written is what is read, and nothing else is read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from tests.formats.refusals import assert_refused, assert_refuses_what_is_no_text_file
from tests.workload_strategies import plain_request, workloads
from xllm_lab.errors import TraceError
from xllm_lab.formats import own, read_trace
from xllm_lab.workload import Slo, Workload

HEADER = '{"format": "xllm-lab-trace", "version": 1, "seed": 0, "closed_loop": null, "source": "here"}\n'
LINE = '{"id": 0, "arrival_us": 0, "prompt": {"num_tokens": 5}, "output_tokens": 3}\n'
FIELDS = "id, arrival_us, prompt, output_tokens, slo, priority, sampling, cancel_us, kind"


@given(workload=workloads())
def test_reading_what_was_written_gives_the_same_workload(
    tmp_path_factory: pytest.TempPathFactory, workload: Workload
) -> None:
    """All but the checksum, which is that of the file."""
    path = tmp_path_factory.mktemp("own") / "trace.jsonl"
    own.write(workload, path)
    again = read_trace(path)
    assert again == replace(workload, checksum=hashlib.sha256(path.read_bytes()).hexdigest())


def test_fields_at_their_default_are_left_out(tmp_path: Path) -> None:
    own.write(Workload(requests=(plain_request(0, prompt_tokens=5, output_tokens=3),), source="here"), tmp_path / "t")
    assert (tmp_path / "t").read_text() == HEADER + LINE


def test_a_nested_field_is_written_alone(tmp_path: Path) -> None:
    request = replace(plain_request(0), slo=Slo(tpot_us=50_000))
    own.write(Workload(requests=(request,)), tmp_path / "t")
    assert '"slo": {"tpot_us": 50000}}' in (tmp_path / "t").read_text()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TraceError, match="cannot be written \\(No space left on device\\)"):
        own.write(Workload(requests=(plain_request(0),)), path)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert path.read_text() == "old"


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\n\n{LINE}\n".replace("\n", "\r\n").encode())
    assert own.read(path).requests == (plain_request(0, prompt_tokens=5, output_tokens=3),)


def row(**cells: str) -> str:
    """The header and one request with some cells replaced by other JSON; an empty one is left out."""
    usual = {"id": "0", "arrival_us": "0", "prompt": '{"num_tokens": 5}', "output_tokens": "3"}
    kept = {name: cell for name, cell in (usual | cells).items() if cell}
    return HEADER + "{" + ", ".join(f'"{name}": {cell}' for name, cell in kept.items()) + "}"


ANY_INT = f"an integer from -{2**63 - 1} to {2**63 - 1} is accepted"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (row(output_tokens=""), "2: output_tokens is missing; a value is accepted"),
        (row(output_tokens='"3"'), f"2: output_tokens is '3'; {ANY_INT}"),
        (row(output_tokens="3.0"), f"2: output_tokens is 3.0; {ANY_INT}"),
        (row(output_tokens="NaN"), f"2: output_tokens is nan; {ANY_INT}"),
        (row(output_tokens="true"), f"2: output_tokens is True; {ANY_INT}"),
        (row(output_tokens="null"), f"2: output_tokens is None; {ANY_INT}"),
        (row(output_tokens="-3"), "2: request 0: output_tokens is -3, at least 1 is accepted"),
        (row(prompt="5"), "2: prompt is 5; a JSON object is accepted"),
        (row(prompt="{}"), "2: prompt.num_tokens is missing; a value is accepted"),
        (
            row(prompt='{"num_tokens": 5, "text": "hi"}'),
            "2: field 'prompt.text' is unknown; "
            "one of num_tokens, token_ids, block_hashes, hash_block_tokens is accepted",
        ),
        (
            row(prompt='{"num_tokens": 5, "block_hashes": [-1]}'),
            "2: prompt.block_hashes is [-1]; a list of integers of at least 0 is accepted",
        ),
        (
            row(prompt='{"num_tokens": 5, "token_ids": [1]}'),
            "2: prompt: num_tokens is 5, the 1 token_ids differ",
        ),
        (row(tokens="5"), f"2: field 'tokens' is unknown; one of {FIELDS} is accepted"),
        (row(priority="4"), "2: priority is 4; 1 or 2 or 3 is accepted"),
        (row(slo='{"ttft_us": 0}'), "2: slo: ttft_us is 0, at least 1 is accepted"),
        (row(sampling='{"top_p": 2}'), "2: sampling: top_p is 2.0, more than 0 and at most 1 is accepted"),
        (row(kind="5"), "2: kind is 5; text is accepted"),
        (row(sampling='{"ignore_eos": 1}'), "2: sampling.ignore_eos is 1; true or false is accepted"),
        (HEADER + LINE + LINE, "3: id is 0; an id that no earlier line has is accepted"),
        (
            HEADER + LINE + LINE[:20],
            f"3: row is {LINE[:20]!r} (Unterminated string starting at); a JSON object is accepted",
        ),
        (HEADER + "[1]", "2: row is [1]; a JSON object is accepted"),
        (HEADER, " holds no requests; a trace of at least one request is accepted"),
        (LINE, "1: format is missing; 'xllm-lab-trace' is accepted"),
        (HEADER.replace("1,", "2,") + LINE, "1: version is 2; an integer from 1 to 1 is accepted"),
        (HEADER.replace("null", "3") + LINE, "1: closed_loop is 3; a JSON object is accepted"),
        (
            HEADER.replace("null", '{"num_clients": 0}') + LINE,
            "1: closed loop: num_clients is 0, at least 1 is accepted",
        ),
        (
            HEADER.replace('"seed"', '"seeds"') + LINE,
            "1: field 'seeds' is unknown; one of format, version, seed, closed_loop, source is accepted",
        ),
    ],
)
def test_a_flaw_is_named(tmp_path: Path, content: str, said: str) -> None:
    assert_refused(own.read, tmp_path / "trace.jsonl", content, said)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    assert_refuses_what_is_no_text_file(own.read, tmp_path)
