"""What an xLLM instance measures when it starts, and registers in etcd under `XLLM:<ROLE>:<name>`, as JSON.

    {"name": "10.0.0.1:9000", "type": 3, "dp_size": 1, ...
     "ttft_profiling_data": [[32768, 5210.4], [29491, 4388.0], ...],
     "tpot_profiling_data": [[4096, 64, 31.2], [4096, 57, 29.9], ...]}

ttft: a prompt of so many tokens, alone and from nothing, and the milliseconds of its step. tpot: decodes whose lengths,
the new token included, are drawn at random and sum up to the average times their number, and the milliseconds of their
step (`DisaggPDScheduler::profile_ttft` and `profile_tpot`, xllm 3906f5a9). Only instances of role MIX measure; the
tables of others are empty.

A file holds one such object, or what `etcdctl get` prints: lines of keys, each followed by a line of JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xllm_lab.errors import ProfileError
from xllm_lab.profiles.profile import BatchRow, Profile, SequencePart
from xllm_lab.profiles.sources._csv import LONGEST_STEP_NS, refusal, shown
from xllm_lab.profiles.sources._tally import Unused

NAME = "xllm-profile"
HOLDS = "the JSON that an instance of xLLM registers in etcd, with ttft_profiling_data and tpot_profiling_data"

AVERAGE_LENGTHS = "lengths as their average, whose sum is recorded"

_PROMPTS, _DECODES = "ttft_profiling_data", "tpot_profiling_data"
_KEY = "XLLM:"
_MARKS = (f'"{_PROMPTS}"', f'"{_DECODES}"', '"incarnation_id"')
_SNIFFED_BYTES = 1 << 20
_LONGEST_MS = LONGEST_STEP_NS / 1e6
_MOST_TOKENS = 2**31 - 1
_MOST_SEQS = 2**16
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def recognises(path: Path) -> bool:
    """Whether one of the names that only an instance has stands in the first megabyte."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_SNIFFED_BYTES).decode("utf-8", errors="replace")
    return start.lstrip().startswith(("{", _KEY)) and any(mark in start for mark in _MARKS)


def read(path: Path) -> Profile:
    """Both tables of each instance in a file; ProfileError names the row of what cannot be read."""
    unused = Unused()
    batches: list[BatchRow] = []
    notes: list[str] = []
    for instance in _instances(path):
        for table in _TABLES:
            rows = instance.rows(table.name)
            batches += _batches(instance, table, rows, unused)
            notes += [] if rows else [f"{instance.name}: {table.name} is empty"]
        notes += instance.notes()
    if not batches:
        raise ProfileError(
            f"{path}: {_PROMPTS} and {_DECODES} hold no measured step; those of an instance of role MIX are accepted"
        )
    return Profile(
        source=NAME,
        path=path,
        num_steps=len(batches),
        batches=tuple(_scattered(batches)),
        units={f"{path.name}: {table}": "ms" for table in (_PROMPTS, _DECODES)},
        left_out=unused.rows(),
        notes=tuple(notes),
    )


class _Instance(NamedTuple):
    """One registered object, and the line where it starts."""

    path: Path
    line: int
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        name = self.fields.get("name")
        return f"instance {shown(name)}" if name else f"instance of line {self.line}"

    def rows(self, table: str) -> list[Any]:
        if table not in self.fields:
            raise refusal(self.path, self.line, f"{table} is missing (fields: {', '.join(self.fields)})", table)
        rows = self.fields[table]
        if not isinstance(rows, list):
            raise refusal(self.path, self.line, f"{table} is {shown(rows)}", "a list of rows")
        return rows

    def notes(self) -> list[str]:
        ranks = self.fields.get("dp_size")
        several = isinstance(ranks, int) and ranks > 1
        return [f"{self.name}: batches are those of {ranks} data-parallel ranks together"] if several else []


def _instances(path: Path) -> Iterator[_Instance]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); {HOLDS} is accepted") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: byte is {error.object[error.start]:#04x}; UTF-8 text is accepted") from error
    if not text.lstrip().startswith(_KEY):
        yield _parsed(path, 1, text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith(_KEY):
            yield _parsed(path, number, line)


def _parsed(path: Path, line: int, text: str) -> _Instance:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        found = f"is no JSON ({error.msg} at column {error.colno})"
        raise refusal(path, line + error.lineno - 1, found, HOLDS) from None
    except (ValueError, RecursionError) as error:
        raise refusal(path, line, f"is no JSON ({type(error).__name__})", HOLDS) from None
    if not isinstance(fields, dict):
        raise refusal(path, line, f"is {shown(fields)}", HOLDS)
    return _Instance(path, line, fields)


def _scattered(batches: list[BatchRow]) -> list[BatchRow]:
    """The tables' rows dealt out, so that any stretch of them has some of every size.

    A table is no sequence of steps, but sorted. Where a stretch is held out to tell the error of a fit, it would be all
    long prompts, and the error that of lengths never seen. Multiples of the golden ratio fill an interval evenly.
    """
    order = sorted(range(len(batches)), key=lambda k: (k * _GOLDEN_RATIO) % 1.0)
    return [batches[k] for k in order]


class _Table(NamedTuple):
    """A table, the most that the whole numbers of its rows may be, and what they say about a batch."""

    name: str
    most: tuple[int, ...]
    accepted: str
    parts: Callable[..., tuple[SequencePart, ...]]
    basis: str = ""


def _batches(instance: _Instance, table: _Table, rows: list[Any], unused: Unused) -> Iterator[BatchRow]:
    for number, row in enumerate(rows):
        if not _is_row(row, table.most):
            found = f"{table.name}[{number}] is {shown(row)}"
            raise refusal(instance.path, instance.line, found, table.accepted)
        *counts, ms = row
        if ms == 0:
            unused.add(instance.path.name, f"a row of {table.name} that took no time")
        else:
            yield BatchRow(line=number, step_us=ms * 1e3, parts=table.parts(*counts), basis=table.basis)


def _is_row(row: object, most: tuple[int, ...]) -> bool:
    """Whether these are whole numbers from 1 to `most`, and a time."""
    if not isinstance(row, list) or len(row) != len(most) + 1:
        return False
    *counts, ms = row
    are_counts = all(type(count) is int and 1 <= count <= high for count, high in zip(counts, most, strict=True))
    return are_counts and type(ms) in (int, float) and 0 <= ms <= _LONGEST_MS


def _prompt(length: int) -> tuple[SequencePart, ...]:
    return (SequencePart(request="0", is_prefill=True, num_tokens=length, num_computed_tokens=0),)


def _decodes(length: int, num_seqs: int) -> tuple[SequencePart, ...]:
    return tuple(
        SequencePart(request=str(k), is_prefill=False, num_tokens=1, num_computed_tokens=length - 1)
        for k in range(num_seqs)
    )


_MS = f"milliseconds up to {_LONGEST_MS:g}"
_TABLES = (
    _Table(name=_PROMPTS, most=(_MOST_TOKENS,), accepted=f"[tokens, {_MS}]", parts=_prompt),
    _Table(
        name=_DECODES,
        most=(_MOST_TOKENS, _MOST_SEQS),
        accepted=f"[average length, sequences up to {_MOST_SEQS}, {_MS}]",
        parts=_decodes,
        basis=AVERAGE_LENGTHS,
    ),
)
