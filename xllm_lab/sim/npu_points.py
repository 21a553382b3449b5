"""Published measurements on Ascend NPUs, read from `npu_points.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from xllm_lab.errors import ConfigError
from xllm_lab.sim.validate.published import Point

FILE = Path(__file__).with_name("npu_points.toml")


Row = Mapping[str, Any]


class Points(NamedTuple):
    """One table.

    Attributes:
        rows: what each row gives, by name; each has its source under `source`.
        is_fitted: whether constants were fitted to it, so that its error is no prediction's.
        assumed: what the source does not say; empty if it says all.
    """

    rows: Sequence[Mapping[str, Any]]
    is_fitted: bool
    assumed: str


@cache
def points(table: str, file: Path = FILE) -> Points:
    """A table by name.

    Raises:
        ConfigError: no such table, or a row without a source.
    """
    read = tomllib.loads(file.read_text(encoding="utf-8"))
    sources = read.pop("sources")
    if table not in read:
        raise ConfigError(f"{file}: no table {table!r}; accepted are {', '.join(read)}")
    found = read[table]
    rows = []
    for k, row in enumerate(found["rows"], start=1):
        source = row.get("source", found.get("source"))
        if source not in sources:
            raise ConfigError(
                f"{file}: row {k} of {table} has source {source!r}; one of {', '.join(sources)} is expected"
            )
        rows.append({**row, "source": sources[source]})
    return Points(rows, found.get("is_fitted", False), found.get("assumed", ""))


def point(
    row: Row,
    table: Points,
    *,
    name: str,
    what: str,
    published: float,
    predicted: float | None,
    is_fitted: bool = False,
) -> Point:
    """A row beside a prediction; None: it cannot be modelled."""
    note = f"not modelled: {row['not_modelled']}" if "not_modelled" in row else row.get("assumed", "")
    return Point(
        table=name,
        what=what,
        published=published,
        predicted=predicted,
        source=row["source"],
        is_fitted=is_fitted,
        note=note,
        assumed=table.assumed,
    )
