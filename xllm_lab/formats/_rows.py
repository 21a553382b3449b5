"""What every reader needs: the bytes of a file as text, and checked cells that say where they stand.

A refusal is one line, `FILE:LINE: FIELD is VALUE; WHAT is accepted`, so that a row can be found and mended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from xllm_lab.errors import TraceError
from xllm_lab.workload import Prompt, Request, RequestId, Workload

LARGEST_INT = 2**63 - 1
LARGEST_TOKENS = 2**31 - 1
# Any clock in use stays far below: 1e12 seconds are 30,000 years, 1e12 milliseconds 30.
LARGEST_TIME = 1e12

_SHOWN_CHARACTERS = 60


class Text(NamedTuple):
    """A trace file as read."""

    path: Path
    content: str
    checksum: str  # sha256 of the bytes, in hexadecimal

    def lines(self) -> Iterator[tuple[int, str]]:
        """Number from 1 and content of each line that is not blank.

        Lines end at a line feed only: JSON strings may hold the other characters that `str.splitlines` breaks at.
        """
        for number, line in enumerate(self.content.split("\n"), start=1):
            if line.strip():
                yield number, line.rstrip("\r")


def load(path: Path) -> Text:
    """Read a whole trace file; TraceError if it is missing, empty, not a regular file or not UTF-8."""
    if path.is_dir():
        raise TraceError(f"{path}: is a directory; a trace file is accepted")
    if path.exists() and not path.is_file():
        raise TraceError(f"{path}: is not a regular file; a trace file is accepted")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); a readable trace file is accepted") from error
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TraceError(f"{path}:{line}: byte is {data[error.start]:#04x}; UTF-8 text is accepted") from error
    if not content.strip():
        raise TraceError(f"{path}: is empty; a trace of at least one request is accepted")
    return Text(path, content, hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one row, and where it stands."""

    path: Path
    line: int
    cells: Mapping[str, object]

    def whole(self, field: str, *, least: int = 1, most: int = LARGEST_TOKENS) -> int:
        """The integer in `field`, from `least` to `most`; true and false are no integers."""
        value = self.cells.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refusal(field, f"an integer from {least} to {most}")
        return value

    def number(self, field: str, *, least: float = 0, most: float = LARGEST_TIME) -> int | float:
        """The finite number in `field`, from `least` to `most`."""
        value = self.cells.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.refusal(field, f"a number from {least:g} to {most:g}")
        return value

    def wholes(self, field: str) -> tuple[int, ...]:
        """The integers, 0 or more each, of the list in `field`."""
        value = self.cells.get(field)
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise self.refusal(field, "a list of integers of at least 0")
        return tuple(value)

    def refusal(self, field: str, accepted: str) -> TraceError:
        """The error to raise about `field`; `accepted` says what would have been right."""
        found = f"is {shown(self.cells[field])}" if field in self.cells else "is missing"
        return refusal(self.path, self.line, f"{field} {found}", accepted)


def json_row(path: Path, line: int, text: str) -> Row:
    """The JSON object in `text`. NaN and Infinity pass here, so that the check of their field can name it."""
    try:
        cells = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        at = line + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
        raise refusal(path, at, f"row is {shown(text)} ({reason})", "a JSON object") from error
    if not isinstance(cells, dict):
        raise refusal(path, line, f"row is {shown(cells)}", "a JSON object")
    return Row(path, line, cells)


def refusal(path: Path, line: int, found: str, accepted: str) -> TraceError:
    """`FILE:LINE: found; accepted is accepted`."""
    return TraceError(f"{path}:{line}: {found}; {accepted} is accepted")


def shown(value: object) -> str:
    """A value as one short line."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


class Arrival(NamedTuple):
    """One request of a foreign trace; `time_ns` is on the trace's own clock."""

    time_ns: int
    prompt: Prompt
    output_tokens: int


def workload(arrivals: list[Arrival], text: Text, *, note: str = "") -> Workload:
    """Arrivals as a workload that starts with the earliest one.

    Rows need not be in order of time: servers log a request when it ends. Ids count from 0 in order of arrival, equal
    times in order of rows. Times are rounded to the nearest microsecond after the first arrival is taken off.
    """
    if not arrivals:
        raise TraceError(f"{text.path}: holds no requests; a trace of at least one request is accepted")
    ordered = sorted(arrivals, key=lambda arrival: arrival.time_ns)
    start_ns = ordered[0].time_ns
    return Workload(
        requests=tuple(
            Request(
                id=RequestId(number),
                arrival_us=(arrival.time_ns - start_ns + 500) // 1000,
                prompt=arrival.prompt,
                output_tokens=arrival.output_tokens,
            )
            for number, arrival in enumerate(ordered)
        ),
        source=f"{text.path.name}{note}",
        checksum=text.checksum,
    )


def nanoseconds(value: int | float, per_unit: int) -> int:
    """A finite time on a trace's clock, exactly rounded: epoch seconds times 1e9 are beyond a float's 53 bits."""
    if isinstance(value, int):
        return value * per_unit
    numerator, denominator = value.as_integer_ratio()
    return (numerator * per_unit + denominator // 2) // denominator
