"""Our own trace format: JSON lines, a header and then one request a line.

    {"format": "xllm-lab-trace", "version": 1, "seed": 7, "closed_loop": null, "source": "traces/make.py"}
    {"id": 0, "arrival_us": 0, "prompt": {"num_tokens": 120}, "output_tokens": 30}

A request's fields are those of `Request`, read from the dataclass itself; fields at their default are left out.
Unknown fields are refused. Reading what was written gives an equal workload, but for its checksum, which is that of
the file.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from xllm_lab.errors import TraceError
from xllm_lab.formats._rows import LARGEST_INT, Row, json_row, load, refusal
from xllm_lab.workload import ClosedLoop, Request, Workload

NAME = "xllm-lab"

_FORMAT = "xllm-lab-trace"
_VERSION = 1
_HEADER = ("format", "version", "seed", "closed_loop", "source")

T = TypeVar("T")
_Reader = Callable[[Row, str], Any]


def sniff(first_line: str, path: Path) -> bool:
    """Whether the file starts with our header."""
    return f'"{_FORMAT}"' in first_line


def read(path: Path) -> Workload:
    """The workload in a file of our format; TraceError names the line and field of what cannot be read."""
    text = load(path)
    lines = text.lines()
    header = _header(json_row(path, *next(lines)))
    requests: dict[int, Request] = {}
    for number, line in lines:
        row = json_row(path, number, line)
        request = _value(Request, row, "")
        if request.id in requests:
            raise row.refusal("id", "an id that no earlier line has")
        requests[request.id] = request
    if not requests:
        raise TraceError(f"{path}: holds no requests; a trace of at least one request is accepted")
    return Workload(
        requests=tuple(requests.values()),
        closed_loop=header.closed_loop,
        source=header.source,
        checksum=text.checksum,
        seed=header.seed,
    )


def write(workload: Workload, path: Path) -> None:
    """Write a workload; `path` holds the old file or the whole new one, never a part.

    Raises:
        TraceError: the file cannot be written.
    """
    content = encode(workload)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TraceError(f"{path}: cannot be written ({error.strerror}); a writable path is accepted") from error


def encode(workload: Workload) -> bytes:
    """The file's content; equal for equal workloads."""
    closed_loop = workload.closed_loop
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "seed": workload.seed,
        "closed_loop": None if closed_loop is None else _cells(closed_loop),
        "source": workload.source,
    }
    rows = [header, *(_cells(request) for request in workload.requests)]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def request_cells(request: Request) -> dict[str, Any]:
    """A request as a row of the file."""
    return _cells(request)


def request_from(cells: dict[str, Any], where: str) -> Request:
    """Inverse of `request_cells`; TraceError names `where`, and the field of what cannot be read."""
    return _value(Request, Row(Path(where), 1, cells), "")


class _Header(typing.NamedTuple):
    seed: int
    closed_loop: ClosedLoop | None
    source: str


def _header(row: Row) -> _Header:
    if row.cells.get("format") != _FORMAT:
        raise row.refusal("format", repr(_FORMAT))
    row.whole("version", least=_VERSION, most=_VERSION)
    _refuse_unknown(row, "", _HEADER)
    cells = {"seed": 0, "closed_loop": None, "source": row.path.name, **row.cells}
    filled = Row(row.path, row.line, cells)
    source = cells["source"]
    if not isinstance(source, str):
        raise filled.refusal("source", "text")
    return _Header(
        seed=filled.whole("seed", least=0, most=LARGEST_INT),
        closed_loop=_reader_of(ClosedLoop | None)(filled, "closed_loop"),
        source=source,
    )


def _cells(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default."""
    cells: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item != field.default:
            cells[field.name] = _cells(item) if dataclasses.is_dataclass(item) else item
    return cells


def _value(cls: Callable[..., T], row: Row, inside: str) -> T:
    """An object of dataclass `cls` from cells; `inside` is the dotted path of the field they stand in, or empty."""
    readers = _readers(cls)
    _refuse_unknown(row, inside, tuple(readers))
    arguments = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = f"{inside}{field.name}"
        if name in row.cells:
            arguments[field.name] = readers[field.name](row, name)
        elif field.default is dataclasses.MISSING:
            raise row.refusal(name, "a value")
    try:
        return cls(**arguments)
    except TraceError as error:
        raise TraceError(f"{row.path}:{row.line}: {error}") from error


@functools.cache
def _readers(cls: Any) -> Mapping[str, _Reader]:
    hints = typing.get_type_hints(cls)
    return {field.name: _reader_of(hints[field.name]) for field in dataclasses.fields(cls)}


def _reader_of(hint: Any) -> _Reader:
    """How a cell of a type is read; the dataclasses of `workload` use no other types than these."""
    hint = getattr(hint, "__supertype__", hint)
    if typing.get_origin(hint) is types.UnionType:
        (inner,) = (_reader_of(part) for part in typing.get_args(hint) if part is not type(None))
        return lambda row, name: None if row.cells[name] is None else inner(row, name)
    if typing.get_origin(hint) is tuple:
        return Row.wholes
    if dataclasses.is_dataclass(hint):
        nested: Any = hint
        return lambda row, name: _nested(nested, row, name)
    if issubclass(hint, enum.IntEnum):
        return lambda row, name: _member(hint, row, name)
    return _SCALARS[hint]


def _nested(cls: Callable[..., T], row: Row, name: str) -> T:
    cells = row.cells[name]
    if not isinstance(cells, dict):
        raise row.refusal(name, "a JSON object")
    return _value(cls, Row(row.path, row.line, {f"{name}.{key}": item for key, item in cells.items()}), f"{name}.")


def _member(members: type[enum.IntEnum], row: Row, name: str) -> enum.IntEnum:
    value = row.cells[name]
    if type(value) is not int or value not in {member.value for member in members}:
        raise row.refusal(name, " or ".join(f"{member.value}" for member in members))
    return members(value)


def _refuse_unknown(row: Row, inside: str, known: tuple[str, ...]) -> None:
    for name in row.cells:
        if name.removeprefix(inside) not in known:
            raise refusal(row.path, row.line, f"field {name!r} is unknown", f"one of {', '.join(known)}")


def _bool(row: Row, name: str) -> bool:
    value = row.cells[name]
    if not isinstance(value, bool):
        raise row.refusal(name, "true or false")
    return value


def _text(row: Row, name: str) -> str:
    value = row.cells[name]
    if not isinstance(value, str):
        raise row.refusal(name, "text")
    return value


_SCALARS: Mapping[type, _Reader] = {
    bool: _bool,
    str: _text,
    int: lambda row, name: row.whole(name, least=-LARGEST_INT, most=LARGEST_INT),
    float: lambda row, name: float(row.number(name, least=-LARGEST_INT, most=LARGEST_INT)),
}
