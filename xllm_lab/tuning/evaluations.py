"""What was evaluated once is not evaluated again: reports by content, on disk, for every study that comes.

An evaluation is a pure function from a specification to a report, both plain data. The specification names its inputs
by what they hold (SHA-256 of the workload, of the calibration) and the code that reads them, so its own hash is the
report's address, and a report never has to be thrown away.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import xllm_lab
from xllm_lab.errors import RunError
from xllm_lab.policies.catalog import ENTRY_POINT_GROUP
from xllm_lab.runs import new_file, read_json, write_json

Spec = dict[str, Any]
Report = dict[str, Any]

# What people read and type decides nothing about a report.
_SURFACE = ("cli", "report", "verbs", "text.py", "demo.py", "__main__.py", "tuning/lint", "tuning/export")


class Evaluations:
    """Reports in a folder, which is made when the first one is kept; any number of studies may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, spec: Spec) -> Report | None:
        """The report of such a specification, if one was kept."""
        try:
            found = read_json(self._place(spec), "an evaluation")
        except RunError:  # not there, or cut off by a machine that lost power: it is made again
            return None
        report: Report = found["report"]
        return report

    def keep(self, spec: Spec, report: Report) -> None:
        """For everybody who asks for it again. RunError if it cannot be written; then nothing is."""
        place = self._place(spec)
        with new_file(place) as file:
            write_json(file, {"spec": spec, "report": report})

    def _place(self, spec: Spec) -> Path:
        key = address(spec)
        return self.folder / key[:2] / f"{key}.json"


def address(spec: Spec) -> str:
    """SHA-256 of a specification, whatever the order of its names."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, allow_nan=False).encode()).hexdigest()


def checksum(content: bytes) -> str:
    """Of an input, as a specification names it."""
    return hashlib.sha256(content).hexdigest()


def inputs_of(paths: Sequence[Path]) -> dict[str, str]:
    """Where inputs lie, by what they hold."""
    return {checksum(path.read_bytes()): str(path) for path in paths}


@functools.cache
def code_version() -> str:
    """SHA-256 of all sources that can decide a report: this package's, and those of policies of other packages."""
    root = Path(xllm_lab.__file__).parent
    sources = {
        name: path
        for path in sorted(root.rglob("*.py"))
        if not (name := path.relative_to(root).as_posix()).startswith(_SURFACE)
    }
    others = sorted(e.value for e in entry_points(group=ENTRY_POINT_GROUP))
    sources |= {name: Path(file) for name in others if (file := importlib.import_module(name).__file__)}
    digest = hashlib.sha256()
    for name, path in sources.items():
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def job(spec: Spec, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What a worker gets: the specification, and where each of its inputs lies on this machine."""
    named = {value for value in spec.values() if isinstance(value, str)}
    return {"spec": spec, "inputs": {key: path for key, path in inputs.items() if key in named}}
