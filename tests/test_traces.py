"""The traces we ship are what their script makes and what their table says."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from pathlib import Path

import pytest

from xllm_lab.formats import read_trace
from xllm_lab.transforms import mean_rate_per_s

TRACES = Path(__file__).parents[1] / "traces"
NAMES = ("bursty.jsonl", "chat.jsonl", "shared-prefix.jsonl")


def test_the_script_makes_the_same_bytes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_traces", TRACES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in TRACES.glob("*.jsonl"))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (TRACES / path.name).read_bytes()


def test_the_table_names_every_checksum() -> None:
    table = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", (TRACES / "README.md").read_text(), re.M))
    shipped = {name: hashlib.sha256((TRACES / name).read_bytes()).hexdigest() for name in NAMES}
    assert {name: table[name] for name in NAMES} == shipped
    for name in set(table) - set(NAMES):
        path = Path(os.environ.get("XLLM_LAB_DATA", "")) / name
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == table[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_requests_are_small(name: str) -> None:
    """Small enough for a model of some hundred million weights on two CPU cores."""
    path = TRACES / name
    workload = read_trace(path)
    some = workload.requests[:100]
    assert path.stat().st_size < 100_000
    assert len(workload.requests) == 600
    assert sum(r.prompt.num_tokens for r in some) < 22_000
    assert sum(r.output_tokens for r in some) < 5_000
    assert mean_rate_per_s(workload) == pytest.approx(1.0, rel=0.1)


def test_agents_share_their_first_blocks_and_nothing_else() -> None:
    prompts = [r.prompt for r in read_trace(TRACES / "shared-prefix.jsonl").requests]
    prefixes = {prompt.block_hashes for prompt in prompts}
    hashes = [h for prefix in prefixes for h in prefix]
    assert len(prefixes) == 8
    assert len(hashes) == len(set(hashes))
    assert all(prompt.num_tokens > len(prompt.block_hashes) * prompt.hash_block_tokens for prompt in prompts)
