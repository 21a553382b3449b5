"""Which prompts begin alike: found in tokens, and made again from what was found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.errors import TraceError
from xllm_lab.policies.api import RequestId
from xllm_lab.sim.validate.shared_prefixes import (
    known_prefixes,
    prefixes_of_file,
    prompts_that_share,
    shared_prefixes,
)
from xllm_lab.workload import Request, prompt_token_ids

BLOCK = 4
prompts = st.lists(st.lists(st.integers(0, 1), max_size=24), min_size=1, max_size=8)


def common_blocks(a: list[int], b: list[int]) -> int:
    """Equal whole blocks from the start."""
    count = 0
    while (end := (count + 1) * BLOCK) <= min(len(a), len(b)) and a[:end] == b[:end]:
        count += 1
    return count


@given(prompts)
def test_the_longest_run_of_whole_blocks_is_found(tokens: list[list[int]]) -> None:
    found = {s.request: s for s in shared_prefixes(tokens, BLOCK)}
    for i, own in enumerate(tokens):
        longest = max((common_blocks(own, earlier) for earlier in tokens[:i]), default=0)
        assert (found[i].num_tokens if i in found else 0) == longest * BLOCK
        if i in found:
            assert common_blocks(own, tokens[found[i].of]) == longest


@given(prompts)
def test_prompts_made_again_share_the_same_blocks(tokens: list[list[int]]) -> None:
    tokens = [t or [0] for t in tokens]
    made = prompts_that_share([len(t) for t in tokens], shared_prefixes(tokens, BLOCK), BLOCK)
    again = [
        prompt_token_ids(
            Request(id=RequestId(i), arrival_us=0, prompt=p, output_tokens=1), vocab_size=10_000, seed=0
        ).tolist()
        for i, p in enumerate(made)
    ]
    assert [len(t) for t in again] == [len(t) for t in tokens]
    assert shared_prefixes(again, BLOCK) == shared_prefixes(tokens, BLOCK)


def test_a_workloads_file_is_the_folders_own(tmp_path: Path) -> None:
    tokens = [[1] * 9, [1] * 5, [2] * 8]
    path = tmp_path / "workload.jsonl"
    path.write_text("".join(json.dumps({"input_tok_ids": t}) + "\n" for t in tokens))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    found = prefixes_of_file(path, BLOCK, checksum=checksum, lengths=[9, 5, 8])
    assert found == ((1, 0, 4),)
    with pytest.raises(TraceError, match=r"SHA-256 is .*, the folder's workload has beef"):
        prefixes_of_file(path, BLOCK, checksum="beef", lengths=[9, 5, 8])
    with pytest.raises(TraceError, match="not as long as those of the folder"):
        prefixes_of_file(path, BLOCK, checksum=None, lengths=[9, 6, 8])
    path.write_text('{"input_toks": 3}\n')
    with pytest.raises(TraceError, match="line 1: no list of integers input_tok_ids"):
        prefixes_of_file(path, BLOCK, checksum=None, lengths=[3])
    with pytest.raises(TraceError, match="cannot be read"):
        prefixes_of_file(tmp_path / "none", BLOCK, checksum=None, lengths=[3])


def test_the_table_of_public_workloads_is_sound() -> None:
    checksum = "05e48b32da530d4a3dd77f3d47c6fe694ac8308d611aa088e38bb10fba2b3b3a"
    found = known_prefixes(checksum, 16)
    assert len({s.request for s in found}) == len(found) > 0
    assert all(s.of < s.request and s.num_tokens % 16 == 0 for s in found)
    assert known_prefixes(checksum, 32) == known_prefixes("0" * 64, 16) == known_prefixes(None, 16) == ()
    assert np.sum([s.num_tokens for s in found]) < 257_239  # the prompts of the workload have no more tokens
