"""Azure LLM inference traces (2023 code and conversation, and later ones of the same form): CSV.

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44

TIMESTAMP is a date and time with up to nine fractional digits and an optional offset from UTC, ContextTokens the
prompt, GeneratedTokens the output. Other columns are passed over. Prompts are unique: the trace knows no prefixes.
Source: github.com/Azure/AzurePublicDataset, CC-BY 4.0.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from xllm_lab.errors import TraceError
from xllm_lab.formats._rows import Arrival, Row, Text, load, refusal, shown, workload
from xllm_lab.workload import Prompt, Workload

NAME = "azure"

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def sniff(first_line: str, path: Path) -> bool:
    """Whether the header names one of our columns."""
    return "{" not in first_line and any(column in first_line for column in _COLUMNS)


def read(path: Path) -> Workload:
    """The workload in an Azure trace; TraceError names the line and column of what cannot be read."""
    text = load(path)
    return workload([_arrival(row) for row in _rows(text)], text)


def _rows(text: Text) -> Iterator[Row]:
    lines = text.lines()
    number, header_line = next(lines)
    header = [name.strip() for name in header_line.split(",")]
    for column in _COLUMNS:
        if header.count(column) != 1:
            raise refusal(text.path, number, f"header is {shown(header_line)}", f"one column {column}")
    for number, line in lines:
        cells = _cells(text.path, number, line)
        if len(cells) != len(header):
            found = f"row is {shown(line)} of {len(cells)} columns"
            raise refusal(text.path, number, found, f"{len(header)} columns ({', '.join(header)})")
        yield Row(text.path, number, dict(zip(header, cells, strict=True)))


def _cells(path: Path, number: int, line: str) -> list[str]:
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise refusal(path, number, f"row is {shown(line)} ({error})", "comma-separated values") from error


def _arrival(row: Row) -> Arrival:
    return Arrival(_nanoseconds(row), Prompt(num_tokens=_count(row, "ContextTokens")), _count(row, "GeneratedTokens"))


def _count(row: Row, column: str) -> int:
    cell = str(row.cells[column]).strip()
    if not _INTEGER.fullmatch(cell):
        return row.whole(column)  # text is refused with the words that a number out of range gets
    return Row(row.path, row.line, {column: int(cell)}).whole(column)


def _nanoseconds(row: Row) -> int:
    """Nanoseconds since 1970, with every fractional digit: `datetime` alone would drop the seventh."""
    match = _TIMESTAMP.fullmatch(str(row.cells["TIMESTAMP"]).strip())
    try:
        if match is None:
            raise ValueError
        date, time, fraction, offset = match.groups()
        when = datetime.fromisoformat(f"{date}T{time}{offset or 'Z'}")
    except ValueError as error:
        raise _no_timestamp(row) from error
    since = when - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + int((fraction or "0").ljust(9, "0"))


def _no_timestamp(row: Row) -> TraceError:
    return row.refusal("TIMESTAMP", "a time like 2023-11-16 18:15:46.6805900")
