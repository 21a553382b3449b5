"""Mooncake's JSON lines: hashes make prefixes, milliseconds make microseconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.formats.refusals import assert_refused, assert_refuses_what_is_no_text_file
from xllm_lab.formats import mooncake, read_trace
from xllm_lab.workload import prompt_token_ids

GOOD = {"timestamp": 27482, "input_length": 700, "output_length": 52, "hash_ids": [46, 47]}


def row(**cells: object) -> str:
    return json.dumps({name: cell for name, cell in (GOOD | cells).items() if cell != "left out"})


def test_equal_hashes_are_equal_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([row(), row(timestamp=30535, hash_ids=[46, 2366])]))
    one, other = read_trace(path).requests
    assert (one.arrival_us, other.arrival_us) == (0, 3_053_000)
    mine, yours = (prompt_token_ids(r, vocab_size=49_152, seed=0) for r in (one, other))
    assert np.array_equal(mine[:512], yours[:512])
    assert not np.array_equal(mine[512:], yours[512:])


def test_a_fraction_of_a_millisecond_counts(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([row(timestamp=0.25), row(timestamp=0.5)]))
    assert [r.arrival_us for r in read_trace(path).requests] == [0, 250]


def test_the_last_block_may_go_without_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(row(hash_ids=[46]))
    assert read_trace(path).requests[0].prompt.block_hashes == (46,)


LENGTH = "an integer from 1 to 2147483647 is accepted"
HASHES = "one id per 512 of the 700 tokens, so 2 of them, is accepted"


@pytest.mark.parametrize(
    ("flawed", "said"),
    [
        (row(input_length=-1), f"input_length is -1; {LENGTH}"),
        (row(output_length=float("nan")), f"output_length is nan; {LENGTH}"),
        (row(output_length="52"), f"output_length is '52'; {LENGTH}"),
        (row(output_length="left out"), f"output_length is missing; {LENGTH}"),
        (row(timestamp=float("inf")), "timestamp is inf; a number from 0 to 1e+12 is accepted"),
        (row(timestamp=-1), "timestamp is -1; a number from 0 to 1e+12 is accepted"),
        (row(hash_ids=[46, "x"]), "hash_ids is [46, 'x']; a list of integers of at least 0 is accepted"),
        (row(hash_ids=[46, 47, 48]), f"hash_ids is [46, 47, 48]; {HASHES}"),
        (row(hash_ids=[]), f"hash_ids is []; {HASHES}"),
        (
            row()[:30],
            f"row is {row()[:30]!r} (Unterminated string starting at); a JSON object is accepted",
        ),
    ],
)
def test_a_flaw_is_named(tmp_path: Path, flawed: str, said: str) -> None:
    assert_refused(read_trace, tmp_path / "t.jsonl", f"{row()}\n{flawed}", f"2: {said}")


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    assert_refuses_what_is_no_text_file(mooncake.read, tmp_path)
