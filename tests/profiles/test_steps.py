"""Batches as samples: lengths are exact where they can be, estimated where the user lets them, and never made up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles.folders import (
    BATCH_HEADER,
    EPOCH_MS,
    OLD_BATCH_HEADER,
    OLD_REQUEST_HEADER,
    batch_row,
    vllm_part,
    write_csv,
)
from xllm_lab.errors import ConfigError
from xllm_lab.profiles import read_profile
from xllm_lab.profiles.profile import BatchRow, Profile
from xllm_lab.profiles.steps import EXACT, FROM_BLOCKS, FROM_REQUESTS, NO_CONTEXT, Steps, steps
from xllm_lab.step_time import TERMS, Chunk, fit


def of(*batches: BatchRow, kv_block_tokens: int | None = None) -> Steps:
    return steps(Profile(source="test", path=Path(), batches=batches), kv_block_tokens=kv_block_tokens)


def counts(prefills: tuple[int, int], decodes: tuple[int, int], used_blocks: int | None = None) -> BatchRow:
    return BatchRow(
        line=2,
        step_us=1000,
        num_prefills=prefills[0],
        prefill_tokens=prefills[1],
        num_decodes=decodes[0],
        decode_tokens=decodes[1],
        used_blocks=used_blocks,
    )


def test_recorded_lengths_are_kept(tmp_path: Path) -> None:
    """A chunk that ends before its prompt does asks for no logits."""
    parts = [vllm_part("a", 3, 1, 4098, 4096), vllm_part("b", 0, 512, 1024, 4096), vllm_part("c", 1, 96, 4000, 4096)]
    write_csv(tmp_path / "batch.csv", BATCH_HEADER, [batch_row("modelExec", ms=31.25, parts=parts)])
    found = steps(read_profile(tmp_path))
    (sample,) = found.samples
    assert sample.chunks == (Chunk(1, 4098), Chunk(512, 1024), Chunk(96, 4000))
    assert (sample.num_logits, sample.step_us) == (2, 31_250)
    assert found.num_by_basis == {EXACT: 1}
    assert not found.left_out


def old_row(parts: str, size: int, type: str, start_us: int, us: int) -> list[object]:
    return ["modelExec", parts, start_us, start_us + us, float(size), type, us]


def test_lengths_follow_from_the_requests(tmp_path: Path) -> None:
    """Older releases name requests and iterations; request.csv has their prompts."""
    start = EPOCH_MS * 1000
    rows = [
        old_row("[{'rid': 2, 'iter': 0}]", 1, "prefill", start, 64_000),
        old_row("[{'rid': 1, 'iter': 1}, {'rid': 2, 'iter': 5}]", 2, "decode", start + 70_000, 15_400),
        old_row("[{'rid': 9, 'iter': 1}]", 1, "decode", start + 90_000, 15_000),
    ]
    write_csv(tmp_path / "batch.csv", OLD_BATCH_HEADER, rows)
    requests = [[1, start, 100, 10, 200_000, 0], [2, start, 4096, 10, 200_000, 0]]
    write_csv(tmp_path / "request.csv", OLD_REQUEST_HEADER, requests)
    found = steps(read_profile(tmp_path))
    assert [sample.chunks for sample in found.samples] == [(Chunk(4096, 0),), (Chunk(1, 100), Chunk(1, 4100))]
    assert found.num_by_basis == {FROM_REQUESTS: 2}
    (left,) = found.left_out
    assert (left.file, left.num_rows, left.total_us) == ("batch.csv", 1, 15_000)
    assert left.reason == "the KV blocks in use are not recorded"


def test_the_size_of_a_block_is_not_guessed() -> None:
    decode = counts((0, 0), (4, 4), used_blocks=40)
    (left,) = of(decode).left_out
    assert left.reason == "its lengths need the tokens of a KV block, which no file tells"
    assert of(decode, kv_block_tokens=128).num_by_basis == {FROM_BLOCKS: 1}
    with pytest.raises(ConfigError, match="kv_block_tokens is 0, at least 1 is accepted"):
        of(decode, kv_block_tokens=0)


def test_prompts_alone_need_no_block_size() -> None:
    found = of(counts((3, 1000), (0, 0)))
    assert found.samples[0].chunks == (Chunk(334, 0), Chunk(333, 0), Chunk(333, 0))
    assert found.num_by_basis == {NO_CONTEXT: 1}


@pytest.mark.parametrize(
    "batch",
    [
        counts((0, 0), (0, 0)),
        counts((2, 1), (0, 0)),
        counts((0, 7), (1, 1)),
        BatchRow(line=2, step_us=1000),
    ],
)
def test_counts_that_say_nothing_are_left_out(batch: BatchRow) -> None:
    (left,) = of(batch, kv_block_tokens=16).left_out
    assert left.reason == "neither its requests' lengths nor its tokens are recorded"


@given(
    st.lists(st.integers(0, 20_000), min_size=1, max_size=64),
    st.lists(st.integers(1, 4096), max_size=4),
    st.sampled_from((16, 128)),
)
def test_blocks_tell_the_context_to_half_a_block_a_sequence(
    contexts: list[int], prompts: list[int], kv_block_tokens: int
) -> None:
    """Where the batch's requests hold all the blocks in use: the error of the sum is at most what can be in doubt."""
    held = [context + 1 for context in contexts] + prompts
    used = sum(-(-tokens // kv_block_tokens) for tokens in held)
    found = of(
        counts((len(prompts), sum(prompts)), (len(contexts), len(contexts)), used), kv_block_tokens=kv_block_tokens
    )
    (sample,) = found.samples
    assert sum(chunk.num_tokens for chunk in sample.chunks) == len(contexts) + sum(prompts)
    estimated = sum(chunk.num_computed_tokens for chunk in sample.chunks)
    assert abs(estimated - sum(contexts)) <= len(held) * (kv_block_tokens - 1) / 2 + 1


def test_samples_of_a_known_machine_give_it_back(tmp_path: Path) -> None:
    """2,600 us a step, 3 us a token, 0.02 us a token of KV read, through CSV files and back out of the fit."""
    rows: list[list[object]] = []
    for k in range(80):
        parts = [vllm_part(f"r{i}", k, 1, 500 * i + 37 * k, 1) for i in range(1, 2 + k % 23)]
        if k % 3 == 0:
            parts.append(vllm_part(f"p{k}", 0, 64 + 16 * k, 0, 64 + 16 * k))
        tokens = [int(str(part["num_scheduled_tokens"])) for part in parts]
        read = sum(new + int(str(part["num_computed_tokens"])) for new, part in zip(tokens, parts, strict=True))
        us = 2600 + 3 * sum(tokens) + 0.02 * read
        rows.append(batch_row("modelExec", ms=us / 1000, parts=parts, at_ms=100 * k))
    write_csv(tmp_path / "batch.csv", BATCH_HEADER, rows)
    samples = steps(read_profile(tmp_path)).samples
    weights = dict(zip(TERMS, fit([s.features() for s in samples], [s.step_us for s in samples]).weights, strict=True))
    assert weights["eager_us"] == pytest.approx(2600, rel=0.01)
    assert weights["token_us"] == pytest.approx(3, rel=0.01)
    assert weights["kv_read_us"] == pytest.approx(0.02, rel=0.02)
