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
from collections.abc import Iterator, Sequence
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
        for table, accepted, to_row in _TABLES:
            rows = instance.rows(table)
            batches += _batches(instance, table, rows, accepted, to_row, unused)
            notes += [] if rows else [f"{instance.name}: {table} is empty"]
        notes += instance.notes()
    if not batches:
        raise ProfileError(
            f"{path}: {_PROMPTS} and {_DECODES} hold no measured step; those of an instance of role MIX are accepted"
        )
    return Profile(
        source=NAME,
        path=path,
        num_steps=len(batches),
        batches=tuple(batches),
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
        return str(self.fields.get("name") or f"line {self.line}")

    def rows(self, table: str) -> list[Any]:
        if table not in self.fields:
            raise refusal(self.path, self.line, f"{table} is missing (fields: {', '.join(self.fields)})", table)
        rows = self.fields[table]
        if not isinstance(rows, list):
            raise refusal(self.path, self.line, f"{table} is {shown(str(rows))}", "a list of rows")
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
        raise ProfileError(f"{path}: holds the byte {error.object[error.start]:#04x}; UTF-8 text is accepted") from error
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
        raise refusal(path, line, f"is {shown(str(fields))}", HOLDS)
    return _Instance(path, line, fields)


def _batches(
    instance: _Instance, table: str, rows: Sequence[Any], accepted: str, to_row: Any, unused: Unused
) -> Iterator[BatchRow]:
    for number, row in enumerate(rows):
        *counts, ms = row if isinstance(row, list) and row else (None,)
        if not all(map(_is_count, counts)) or not _is_time(ms) or (batch := to_row(number, counts, ms)) is None:
            found = f"{table}[{number}] is {shown(json.dumps(row))}"
            raise refusal(instance.path, instance.line, found, accepted)
        if ms == 0:
            unused.add(instance.path.name, f"a row of {table} that took no time")
        else:
            yield batch


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MOST_TOKENS


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LONGEST_MS  # type: ignore[operator]


def _prompt(number: int, counts: Sequence[int], ms: float) -> BatchRow | None:
    if len(counts) != 1:
        return None
    part = SequencePart(request="0", is_prefill=True, num_tokens=counts[0], num_computed_tokens=0)
    return BatchRow(line=number, step_us=ms * 1e3, parts=(part,))


def _decodes(number: int, counts: Sequence[int], ms: float) -> BatchRow | None:
    if len(counts) != 2 or counts[1] > _MOST_SEQS:
        return None
    length, num_seqs = counts
    parts = tuple(
        SequencePart(request=str(k), is_prefill=False, num_tokens=1, num_computed_tokens=length - 1)
        for k in range(num_seqs)
    )
    return BatchRow(line=number, step_us=ms * 1e3, parts=parts, basis=AVERAGE_LENGTHS)


_ROWS_MS = f"milliseconds from 0 to {_LONGEST_MS:g}"
_TABLES = (
    (_PROMPTS, f"[tokens, {_ROWS_MS}]", _prompt),
    (_DECODES, f"[average length, sequences up to {_MOST_SEQS}, {_ROWS_MS}]", _decodes),
)
