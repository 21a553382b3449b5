"""Mooncake traces: JSON lines with the hashes of prompt blocks, so prefix hits can be replayed.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}

timestamp is in milliseconds; hash_ids has one id per 512 tokens of prompt, the last of them for a part of a block or
left out. Equal ids are equal text at equal places. Other fields are passed over.
Source: github.com/kvcache-ai/Mooncake, FAST25-release, Apache-2.0.
"""

from __future__ import annotations

from pathlib import Path

from xllm_lab.formats._rows import Arrival, Row, json_row, load, nanoseconds, workload
from xllm_lab.workload import Prompt, Workload

NAME = "mooncake"

_BLOCK_TOKENS = 512
_NS_PER_MS = 1_000_000


def sniff(first_line: str, path: Path) -> bool:
    """Whether the first row names a field that only this format has."""
    return '"hash_ids"' in first_line or '"input_length"' in first_line


def read(path: Path) -> Workload:
    """The workload in a Mooncake trace; TraceError names the line and field of what cannot be read."""
    text = load(path)
    return workload([_arrival(json_row(path, number, line)) for number, line in text.lines()], text)


def _arrival(row: Row) -> Arrival:
    prompt_tokens = row.whole("input_length")
    block_hashes = row.wholes("hash_ids")
    most = -(-prompt_tokens // _BLOCK_TOKENS)
    # Other tools write this form with other block sizes and do not say so; the count is what gives them away.
    if not prompt_tokens // _BLOCK_TOKENS <= len(block_hashes) <= most:
        accepted = f"one id per {_BLOCK_TOKENS} of the {prompt_tokens} tokens, so {most} of them,"
        raise row.refusal("hash_ids", accepted)
    return Arrival(
        nanoseconds(row.number("timestamp"), _NS_PER_MS),
        Prompt(num_tokens=prompt_tokens, block_hashes=block_hashes, hash_block_tokens=_BLOCK_TOKENS),
        row.whole("output_length"),
    )
