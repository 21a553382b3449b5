"""Operator tables: what each kind of operator cost on each shape, as a profiler measured it, and their CSV form.

    operator,core,device,shapes,dtypes,num_calls,total_us,min_us,max_us
    MatMulV2,AI_CORE,0,"16,5120;5120,3200",DT_BF16;DT_BF16,128,2419.2,17.4,20.1

Shapes are the inputs', `;` between tensors, `,` between dimensions, nothing for a scalar, `N/A` where the profiler did
not record any. Written and read again, a table is equal.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from xllm_lab.errors import ProfileError
from xllm_lab.runs import new_file

Shapes = tuple[tuple[int, ...], ...]

NO_SHAPES = "N/A"
# Attention over a paged KV cache: what the profiler shows as K and V is the whole pool, and the true lengths, a list
# on the host, are nowhere in the file. Keys of the comparison are lower case.
_PAGED_ATTENTION = ("fusedinferattentionscore", "increflashattention", "promptflashattention", "pagedattention")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRow:
    """All calls of one operator on one shape, on one device.

    Attributes:
        operator: the kernel's type, `MatMulV2`.
        core: what it ran on, `AI_CORE`, `AI_VECTOR_CORE`, `MIX_AIC`, `AI_CPU`; "" if not told.
        device: the profiler's number of the device; "" if not told.
        shapes: of the inputs, scalars as (); None if not recorded.
        dtypes: of the inputs, as the profiler writes them, `;` between them; "" if not recorded.
        total_us, min_us, max_us: over the calls.
    """

    operator: str
    core: str
    device: str
    shapes: Shapes | None
    dtypes: str
    num_calls: int
    total_us: float
    min_us: float
    max_us: float

    @property
    def mean_us(self) -> float:
        return self.total_us / self.num_calls

    @property
    def hides_lengths(self) -> bool:
        """Whether the K and V shapes are those of the KV pool, so that they say nothing about the work done.

        A prefill that gets K and V as they were computed has them with as many tokens as its query.
        """
        if not self.operator.lower().startswith(_PAGED_ATTENTION):
            return False
        if self.shapes is None or len(self.shapes) < 2 or not self.shapes[0] or not self.shapes[1]:
            return True
        query, key = self.shapes[:2]
        return (len(query), query[0], query[-1]) != (len(key), key[0], key[-1])


@dataclass(frozen=True, slots=True)
class OperatorTable:
    """Rows in order of time, longest first; no two of the same operator, core, device, shapes and dtypes."""

    rows: tuple[OperatorRow, ...] = ()

    @property
    def total_us(self) -> float:
        return math.fsum(row.total_us for row in self.rows)

    @property
    def num_calls(self) -> int:
        return sum(row.num_calls for row in self.rows)

    def by_operator(self) -> OperatorTable:
        """The same times with shapes, devices and dtypes put together."""
        found: dict[tuple[str, str], list[OperatorRow]] = {}
        for row in self.rows:
            found.setdefault((row.operator, row.core), []).append(row)
        return table(
            OperatorRow(
                operator=operator,
                core=core,
                device="",
                shapes=None,
                dtypes="",
                num_calls=sum(row.num_calls for row in rows),
                total_us=math.fsum(row.total_us for row in rows),
                min_us=min(row.min_us for row in rows),
                max_us=max(row.max_us for row in rows),
            )
            for (operator, core), rows in found.items()
        )


def table(rows: Iterator[OperatorRow]) -> OperatorTable:
    """The rows in the order that a table has."""
    return OperatorTable(tuple(sorted(rows, key=_order)))


def _order(row: OperatorRow) -> tuple[float, str, str, str, str, str]:
    return (-row.total_us, row.operator, row.core, row.device, shapes_text(row.shapes), row.dtypes)


def shapes_text(shapes: Shapes | None) -> str:
    """`16,5120;5120,3200`; `N/A` for None."""
    return NO_SHAPES if shapes is None else ";".join(",".join(map(str, shape)) for shape in shapes)


@functools.lru_cache(maxsize=1 << 16)  # a million kernels have few hundred shapes
def shapes_of(text: str) -> Shapes | None:
    """What `shapes_text` wrote, or a profiler: it may wrap the whole in quotes, or each shape in brackets.

    Raises:
        ValueError: a dimension is no whole number.
    """
    bare = text.strip().strip('"').strip()
    if bare == NO_SHAPES:
        return None
    parts = (part.strip().removeprefix("[").removesuffix("]") for part in bare.split(";"))
    return tuple(tuple(int(dim) for dim in part.split(",")) if part.strip() else () for part in parts)


_COLUMNS = tuple(field.name for field in fields(OperatorRow))


def write_operator_table(table: OperatorTable, path: Path) -> None:
    """Write a table as CSV. RunError if it cannot be written."""
    with new_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for row in table.rows:
            cells = {name: getattr(row, name) for name in _COLUMNS} | {"shapes": shapes_text(row.shapes)}
            writer.writerow(cells.values())


def read_operator_table(path: Path) -> OperatorTable:
    """Read a table that was written as CSV. ProfileError names the line of what cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ProfileError(f"{path}: cannot be read ({reason}); an operator table is accepted") from error
    if not lines or tuple(lines[0]) != _COLUMNS:
        raise ProfileError(f"{path}:1: header is {lines[:1]}; {','.join(_COLUMNS)} is accepted")
    return table(_row(path, number, cells) for number, cells in enumerate(lines[1:], start=2))


def _row(path: Path, line: int, cells: list[str]) -> OperatorRow:
    try:
        operator, core, device, shapes, dtypes, *numbers = cells
        num_calls, (total_us, min_us, max_us) = int(numbers[0]), map(float, numbers[1:])
        row = OperatorRow(
            operator=operator,
            core=core,
            device=device,
            shapes=shapes_of(shapes),
            dtypes=dtypes,
            num_calls=num_calls,
            total_us=total_us,
            min_us=min_us,
            max_us=max_us,
        )
    except (ValueError, IndexError) as error:
        accepted = f"a row of {', '.join(_COLUMNS)}"
        raise ProfileError(f"{path}:{line}: row is {','.join(cells)!r} ({error}); {accepted} is accepted") from None
    if not (num_calls >= 1 and 0 <= min_us <= max_us <= total_us * (1 + 1e-9) < math.inf):
        found = f"{num_calls} calls of {min_us:g} to {max_us:g} us, {total_us:g} us together"
        raise ProfileError(f"{path}:{line}: row has {found}; at least 1 call, 0 <= min <= max <= total is accepted")
    return row
