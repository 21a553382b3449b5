"""Which prompts of a workload begin as earlier ones do: all that a simulator needs of their tokens.

A measured folder names its workload by checksum and gives lengths only. Where the workload's file is at hand its tokens
tell; for some public workloads `shared_prefixes.toml` holds what `shared_prefixes` found in them. Without either, no
two prompts share anything.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from xllm_lab.errors import TraceError
from xllm_lab.workload import Prompt


class SharedPrefix(NamedTuple):
    """The first `num_tokens` tokens of request `request` are those of the earlier request `of`."""

    request: int
    of: int
    num_tokens: int


def shared_prefixes(prompts: Iterable[Sequence[int]], block_size: int) -> tuple[SharedPrefix, ...]:
    """For each prompt, the longest run of whole blocks that it shares with an earlier one, if it shares any."""
    first_with: dict[bytes, int] = {}
    found = []
    for request, tokens in enumerate(prompts):
        keys = []
        key = b""
        for end in range(block_size, len(tokens) + 1, block_size):
            block = ",".join(map(str, tokens[end - block_size : end]))
            key = hashlib.sha256(key + block.encode()).digest()
            keys.append(key)
        shared = 0
        while shared < len(keys) and keys[shared] in first_with:
            shared += 1
        if shared:
            found.append(SharedPrefix(request, first_with[keys[shared - 1]], shared * block_size))
        for key in keys:
            first_with.setdefault(key, request)
    return tuple(found)


def prompts_that_share(lengths: Sequence[int], shared: Iterable[SharedPrefix], block_size: int) -> list[Prompt]:
    """Prompts of these lengths of which exactly those blocks are equal."""
    by_request = {s.request: s for s in shared}
    hashes: list[tuple[int, ...]] = []
    next_hash = 0
    for request, length in enumerate(lengths):
        s = by_request.get(request)
        inherited = hashes[s.of][: s.num_tokens // block_size] if s is not None else ()
        own = range(next_hash, next_hash + length // block_size - len(inherited))
        next_hash = own.stop
        hashes.append((*inherited, *own))
    return [
        Prompt(num_tokens=length, block_hashes=h, hash_block_tokens=block_size)
        for length, h in zip(lengths, hashes, strict=True)
    ]


def prefixes_of_file(
    path: Path, block_size: int, *, checksum: str | None, lengths: Sequence[int]
) -> tuple[SharedPrefix, ...]:
    """From a workload in LLMServingSim's form: JSON lines with `input_tok_ids`.

    Raises:
        TraceError: the file cannot be read, is another one than the folder's, or does not fit its requests.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); the folder's workload is expected") from None
    found = hashlib.sha256(content).hexdigest()
    if checksum is not None and found != checksum:
        raise TraceError(f"{path}: SHA-256 is {found}, the folder's workload has {checksum}")
    prompts = [_prompt(path, n, line) for n, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if [len(p) for p in prompts[: len(lengths)]] != list(lengths):
        raise TraceError(f"{path}: its prompts are not as long as those of the folder; its own workload is expected")
    return shared_prefixes(prompts[: len(lengths)], block_size)


def known_prefixes(checksum: str | None, block_size: int) -> tuple[SharedPrefix, ...]:
    """Of a public workload with this SHA-256, as far as it was looked at; none of any other."""
    text = files("xllm_lab.sim.validate").joinpath("shared_prefixes.toml").read_text(encoding="utf-8")
    for entry in tomllib.loads(text)["workload"]:
        if entry["sha256"] == checksum and entry["block_size"] == block_size:
            return tuple(SharedPrefix(*row) for row in entry["shared"])
    return ()


def _prompt(path: Path, number: int, line: bytes) -> list[int]:
    try:
        row: Any = json.loads(line)
        tokens = row["input_tok_ids"]
        if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens):
            raise TypeError
    except (ValueError, LookupError, TypeError):
        raise TraceError(
            f"{path}, line {number}: no list of integers input_tok_ids; one request a line is accepted"
        ) from None
    return tokens
