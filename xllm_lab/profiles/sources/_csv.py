"""CSV files as profilers write them: columns found by any of their names, times converted by the unit in the header.

A refusal is one line, `FILE:LINE: COLUMN is VALUE; WHAT is accepted`.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from xllm_lab.errors import ProfileError

# Cells that say "nothing": pandas, CANN and MindIE each have their own.
ABSENT = frozenset({"", "N/A", "NA", "<NA>", "nan", "NaN", "None", "null"})

NS = {
    **dict.fromkeys(("ns", "nanosecond"), 1.0),
    **dict.fromkeys(("us", "µs", "μs", "microsecond"), 1e3),
    **dict.fromkeys(("ms", "millisecond"), 1e6),
    **dict.fromkeys(("s", "second"), 1e9),
}
UNITS = "ns, us, microsecond, ms, millisecond, s or second"
# A kernel or a step that takes an hour, a request that takes a day, a clock that shows the year 2100: a wrong unit.
LONGEST_STEP_NS = 3_600 * 10**9
LONGEST_REQUEST_NS = 86_400 * 10**9
LATEST_CLOCK_NS = 4_102_444_800 * 10**9

_MOST = 2**53  # the integers that a float cell writes exactly
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Column:
    """Where a column stands, under the name it has in this file."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class TimeColumn:
    """A column of times, and the nanoseconds in its unit."""

    index: int
    name: str
    unit_ns: float


@dataclass(frozen=True, slots=True)
class Row:
    """One row, and where it stands."""

    path: Path
    line: int
    cells: list[str]

    def text(self, column: Column | TimeColumn | None) -> str:
        """The cell; "" for a column that the file lacks and for a cell that says nothing."""
        if column is None:
            return ""
        cell = self.cells[column.index].strip()
        return "" if cell in ABSENT else cell

    def ns(self, column: TimeColumn, *, most: int) -> int:
        """The time in whole nanoseconds, 0 to `most`: sums of integers come out the same in any order."""
        value = self._number(column, f"a time from 0 to {most / column.unit_ns:g}")
        ns = value * column.unit_ns
        if not 0 <= ns <= most:
            raise self.refusal(column, f"a time from 0 to {most / column.unit_ns:g} (or another unit in the header)")
        return round(ns)

    def maybe_ns(self, column: TimeColumn | None, *, most: int) -> int | None:
        """As `ns`, or None where there is no such column or nothing in the cell."""
        return None if column is None or not self.text(column) else self.ns(column, most=most)

    def count(self, column: Column) -> int:
        """A whole number of at least 0; tables made by pandas write 12 as 12.0."""
        value = self._number(column, "a whole number of at least 0")
        if not 0 <= value <= _MOST or value != int(value):
            raise self.refusal(column, "a whole number of at least 0")
        return int(value)

    def maybe_count(self, column: Column | None) -> int | None:
        """As `count`, or None where there is no such column or nothing in the cell."""
        return None if column is None or not self.text(column) else self.count(column)

    def _number(self, column: Column | TimeColumn, accepted: str) -> float:
        try:
            value = float(self.cells[column.index])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.refusal(column, accepted)
        return value

    def refusal(self, column: Column | TimeColumn, accepted: str) -> ProfileError:
        """The error to raise about a cell; `accepted` says what would have been right."""
        return refusal(self.path, self.line, f"{column.name} is {shown(self.cells[column.index].strip())}", accepted)


class CsvFile:
    """A CSV file with a header: ask for the columns, then read the rows, which are never all held at once.

    Attributes:
        units: of the columns of times that were asked for.

    Raises:
        ProfileError: from the constructor, for a file that cannot be read or is empty; from the others, as they say.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.units: dict[str, str] = {}
        first = next(self._numbered(), None)
        if first is None:
            raise ProfileError(f"{path}: is empty; a header and at least one row are accepted")
        self._header_line = first[0]
        self.header = [name.strip() for name in first[1]]

    def _numbered(self) -> Iterator[tuple[int, list[str]]]:
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file, strict=True)
                line = 1
                for cells in reader:
                    if any(cell.strip() for cell in cells):
                        yield line, cells
                    # A quoted cell may span lines, so a row starts on the line after the last one.
                    line = reader.line_num + 1
        except OSError as error:
            raise ProfileError(f"{self.path}: cannot be read ({error.strerror}); a file is accepted") from error
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ProfileError(f"{self.path}: holds the byte {byte:#04x}; UTF-8 text is accepted") from error
        except csv.Error as error:
            found = f"row cannot be split ({error})"
            raise refusal(self.path, reader.line_num, found, "comma-separated text") from error

    def maybe(self, *names: str) -> Column | None:
        """The column under the first of these names that the header has."""
        return next((Column(self._only(name), name) for name in names if name in self.header), None)

    def column(self, *names: str) -> Column:
        """As `maybe`; ProfileError if the file lacks it."""
        found = self.maybe(*names)
        if found is None:
            self._missing(" or ".join(names))
        return found

    def maybe_time(self, *names: str, unit: str | None = None) -> TimeColumn | None:
        """The column `name(unit)`, or a bare `name` where the format says the unit elsewhere: then `unit`.

        Raises:
            ProfileError: the header's unit is none that is known.
        """
        for name in names:
            if unit is not None and name in self.header:
                return self._timed(name, name, unit)
            for written in self.header:
                found = written.removeprefix(f"{name}(").removesuffix(")").strip()
                if written == f"{name}({found})" and found in NS:
                    return self._timed(name, written, found)
                if written == f"{name}({found})" and unit is None:
                    raise refusal(self.path, self._header_line, f"unit of {name} is {shown(found)}", UNITS)
        return None

    def time(self, *names: str, unit: str | None = None) -> TimeColumn:
        """As `maybe_time`; ProfileError also if the file lacks it."""
        wanted = " or ".join(name if unit is not None else f"{name}(us)" for name in names)
        found = self.maybe_time(*names, unit=unit)
        if found is None:
            self._missing(wanted)
        return found

    def rows(self) -> Iterator[Row]:
        """The rows below the header. ProfileError for none at all, or one of another length."""
        lines = self._numbered()
        next(lines)
        empty = True
        for line, cells in lines:
            empty = False
            if len(cells) != len(self.header):
                found = f"row has {len(cells)} cells"
                raise refusal(self.path, line, found, f"{len(self.header)}, as the header has,")
            yield Row(self.path, line, cells)
        if empty:
            raise ProfileError(f"{self.path}: has a header and no rows; at least one row is accepted")
        # Half a number is a number: that the last row is whole shows only in its end.
        if not _ends_with_a_line(self.path):
            raise refusal(self.path, line, "row has no end of line, so the file was cut off", "a whole file")

    def _timed(self, name: str, written: str, unit: str) -> TimeColumn:
        self.units[name] = unit
        return TimeColumn(self._only(written), written, NS[unit])

    def _only(self, name: str) -> int:
        if self.header.count(name) != 1:
            raise refusal(self.path, self._header_line, f"header has {name} twice", f"one column {name}")
        return self.header.index(name)

    def _missing(self, wanted: str) -> NoReturn:
        found = " ".join(", ".join(self.header).split())
        raise refusal(self.path, self._header_line, f"column {wanted} is missing (columns: {found})", wanted)


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) in (b"\n", b"\r")


def refusal(path: Path, line: int, found: str, accepted: str) -> ProfileError:
    """`FILE:LINE: found; accepted is accepted`."""
    return ProfileError(f"{path}:{line}: {found}; {accepted} is accepted")


def shown(value: object) -> str:
    """A value as one short line."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
