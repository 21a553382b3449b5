"""Writes `xllm_flags.csv` anew from a clone of xLLM: `python -m xllm_lab.tuning.lint.xllm_source CLONE`.

Names, types, defaults and places only, as its gflags macros define them; for a new release add a line to
`flag_table.VERSIONS` first.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from xllm_lab.errors import ConfigError
from xllm_lab.tuning.lint.flag_table import COLUMNS, FLAGS_FILE, VERSIONS, XllmVersion, long_path

_MACRO = re.compile(r"^\s*DEFINE_(bool|int32|int64|uint32|uint64|double|string)\(\s*(\w+)\s*,\s*([^,]*?)\s*,", re.M)
_READ = re.compile(r"XLLM_CONFIG_ASSIGN_FROM_JSON\((\w+)\)")
# Defaults that are expressions in the source.
_CONSTANTS = {
    "0.09f": "0.09",
    "std::numeric_limits<int32_t>::max()": str(2**31 - 1),
    "128 * 1024 * 1024": str(128 * 2**20),
    "2 * 1024 * 1024": str(2 * 2**20),
    "kEnableGraphVmmPoolDefault": "",  # differs between builds
}


class Definition(NamedTuple):
    """A flag as one version defines it. `is_in_json`: the file of `--config_json_file` may hold it."""

    name: str
    type: str
    default: str
    path: str
    line: int
    is_in_json: bool


def definitions(text: str, path: str) -> Iterator[Definition]:
    """Of one source file, in its order."""
    read = set(_READ.findall(re.sub(r"//.*", "", text)))
    for found in _MACRO.finditer(text):
        kind, name, told = found.groups()
        default = _CONSTANTS.get(told, told.strip('"'))
        yield Definition(name, kind, default, path, text.count("\n", 0, found.start(1)) + 1, name in read)


def of_version(clone: Path, version: XllmVersion) -> dict[str, Definition]:
    """Every flag of a version by name. Where builds differ, the first definition, which is the NPU's."""
    listed = _git(clone, "ls-tree", "-r", "--name-only", version.commit, "xllm").split()
    found: dict[str, Definition] = {}
    for path in listed:
        if path.endswith("_flags.cpp") or ("framework/config/" in path and path.endswith(".cpp")):
            for one in definitions(_git(clone, "show", f"{version.commit}:{path}"), path):
                found.setdefault(one.name, one)
    return found


def _git(clone: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{clone}: {done.stderr.strip()}; accepted: a clone of xLLM with its whole history")
    return done.stdout


def rows(versions: Iterable[tuple[str, dict[str, Definition]]]) -> list[dict[str, str]]:
    """One row for each flag, and another wherever its type or default changed; a cell for each version that has it."""
    table: dict[tuple[str, str, str], dict[str, str]] = {}
    for version, found in versions:
        for one in found.values():
            key = (one.name, one.type, one.default)
            row = table.setdefault(key, {"name": one.name, "type": one.type, "default": one.default})
            row[version] = f"{_short(one.path)}:{one.line}{'' if one.is_in_json else ' cli'}"
    return [table[key] for key in sorted(table)]


def _short(path: str) -> str:
    name = Path(path).stem.removesuffix("_config")
    assert long_path(name) == path, path
    return name


def write(file: IO[str], table: Iterable[dict[str, str]]) -> None:
    """The table as `xllm_flags.csv` has it."""
    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)


if __name__ == "__main__":
    _clone = Path(sys.argv[1])
    _table = rows((_version.name, of_version(_clone, _version)) for _version in VERSIONS)
    with FLAGS_FILE.open("w", encoding="utf-8", newline="") as _file:
        write(_file, _table)
