"""Readers and writers of traces, one module per format.

A format is a module in this package with three names; nothing else lists it:

    NAME                       what `--format` and error messages call it
    sniff(first_line, path)    whether a file that starts like this is meant to be of this format; lenient, so that a
                               file with a flaw reaches the reader that can name the flaw
    read(path)                 the file as a Workload; TraceError in one line for anything else

Modules whose name starts with an underscore are shared by the formats and are none themselves.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from xllm_lab.errors import TraceError
from xllm_lab.formats._rows import load
from xllm_lab.workload import Workload


class Format(Protocol):
    """A module that reads one format."""

    NAME: str

    def sniff(self, first_line: str, path: Path) -> bool: ...
    def read(self, path: Path) -> Workload: ...


@functools.cache
def formats() -> Mapping[str, Format]:
    """Every format by name, in order of name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    modules: list[Format] = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.NAME: module for module in sorted(modules, key=lambda module: module.NAME)}


def read_trace(path: str | Path, *, format: str | None = None) -> Workload:
    """The workload in a trace file; `format` is found from the file's suffix and first line unless it is given.

    Raises:
        TraceError: an unknown format, or a file or row that cannot be read.
    """
    path = Path(path)
    accepted = ", ".join(formats())
    if format is not None:
        if format not in formats():
            raise TraceError(f"{path}: format {format!r} is unknown; one of {accepted} is accepted")
        return formats()[format].read(path)
    first_line = next(load(path).lines())[1]
    meant = [reader for reader in formats().values() if reader.sniff(first_line, path)]
    if len(meant) != 1:
        found = " and ".join(reader.NAME for reader in meant) or "none"
        raise TraceError(f"{path}: looks like {found} of the accepted formats ({accepted}); name its format")
    return meant[0].read(path)
