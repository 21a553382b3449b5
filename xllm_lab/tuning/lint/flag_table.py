"""xLLM's flags, version by version: name, type, default, accepted values, and where each is defined.

`xllm_flags.csv` is written by `xllm_source` from the gflags macros. `xllm_bounds.csv` is ours: what values do what they
say, with the line of xLLM that says so.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from xllm_lab.errors import ConfigError

FLAGS_FILE = Path(__file__).with_name("xllm_flags.csv")
BOUNDS_FILE = Path(__file__).with_name("xllm_bounds.csv")


class XllmVersion(NamedTuple):
    """A release, or a commit of the main branch."""

    name: str
    commit: str
    date: str


# In the order of their dates; releases are cut from branches of their own, so a later one may lack what an earlier
# commit has.
VERSIONS = (
    XllmVersion("0.7.0", "53b6e6f4f", "2025-11-06"),
    XllmVersion("0.7.2", "075af2de4", "2025-12-25"),
    XllmVersion("570925079", "570925079", "2026-01-23"),
    XllmVersion("0.8.0", "00afcc19c", "2026-01-28"),
    XllmVersion("3011eb4c7", "3011eb4c7", "2026-03-27"),
    XllmVersion("0.9.0", "145c290b4", "2026-03-30"),
    XllmVersion("0.9.1", "ef1543abb", "2026-04-14"),
    XllmVersion("0.10.0", "5e814b188", "2026-06-30"),
    XllmVersion("87e8d6ed6", "87e8d6ed6", "2026-07-02"),
    XllmVersion("0.10.1", "066781fa2", "2026-07-14"),
    XllmVersion("3906f5a91", "3906f5a91", "2026-08-21"),
)
LATEST = VERSIONS[-1].name
COLUMNS = ("name", "type", "default", *(version.name for version in VERSIONS))
_INTEGERS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1), "uint32": (0, 2**32 - 1)}
_INTEGERS["uint64"] = (0, 2**64 - 1)
# What gflags reads as a boolean, in any case.
_BOOLS = {**dict.fromkeys(("1", "t", "true", "y", "yes"), True), **dict.fromkeys(("0", "f", "false", "n", "no"), False)}


def long_path(short: str) -> str:
    """The source file that a cell of the table abbreviates."""
    if short.endswith("_flags"):
        return f"xllm/core/common/{short}.cpp"
    return f"xllm/core/framework/config/{short}{'' if short.endswith('_utils') else '_config'}.cpp"


class Bounds(NamedTuple):
    """Values that do what they say: a closed range, or one of several."""

    least: float
    most: float
    choices: tuple[str, ...]
    source: str


_ANY = Bounds(-math.inf, math.inf, (), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class XllmFlag:
    """One flag of one version.

    Attributes:
        default: in its own type; None where builds differ.
        source: file and line of its definition.
        is_in_json: whether the file of `--config_json_file` may hold it.
    """

    name: str
    type: str
    default: bool | int | float | str | None
    source: str
    is_in_json: bool
    bounds: Bounds = _ANY

    @property
    def accepted(self) -> str:
        """What is accepted, in words."""
        if self.bounds.choices:
            return ", ".join(self.bounds.choices)
        if self.type == "bool":
            return "true, false"
        if self.type == "string":
            return "text"
        least, most = self._range()
        kind = "numbers" if self.type == "double" else "whole numbers"
        if math.isinf(least) and math.isinf(most):
            return kind
        if most >= 2**31 - 1:
            return f"{kind} of at least {least:.12g}"
        return f"{kind} from {least:.12g} to {most:.12g}"

    def parsed(self, text: str) -> bool | int | float | str | None:
        """The value that gflags reads from a command line; None if it refuses the text."""
        if self.type == "bool":
            return _BOOLS.get(text.lower())
        if self.type == "string":
            return text
        try:
            return float(text) if self.type == "double" else int(text, 16 if text[:2].lower() == "0x" else 10)
        except ValueError:
            return None

    def is_of_type(self, value: Any) -> bool:
        """Whether JSON's value is one of the flag's type. xLLM takes a whole number for a fraction."""
        if self.type == "bool":
            return isinstance(value, bool)
        if self.type == "string":
            return isinstance(value, str)
        if isinstance(value, bool):
            return False
        return isinstance(value, int | float) if self.type == "double" else isinstance(value, int)

    def is_within(self, value: Any) -> bool:
        """Whether a value of the flag's type is one that does what it says."""
        if self.bounds.choices:
            return str(value) in self.bounds.choices
        if self.type in ("bool", "string"):
            return True
        least, most = self._range()
        return bool(least <= value <= most)

    def nearest(self, value: float) -> int | float:
        """The accepted number next to one outside the range."""
        least, most = self._range()
        found = min(max(value, least), most)
        return float(found) if self.type == "double" else int(found)

    def _range(self) -> tuple[float, float]:
        least, most = _INTEGERS.get(self.type, (-math.inf, math.inf))
        return max(least, self.bounds.least), min(most, self.bounds.most)


def refuse_unsayable(config: Mapping[str, Any], version: str = LATEST) -> None:
    """Raise ConfigError unless every flag is one of that version's, of its type and within its bounds."""
    known = xllm_flags(version)
    for name, value in config.items():
        if name not in known:
            raise ConfigError(f"{name} is no flag of xLLM {version}; `xllm-lab lint` knows those it has")
        flag = known[name]
        if not flag.is_of_type(value) or not flag.is_within(value):
            raise ConfigError(f"{name} is {value!r}; xLLM {version} accepts {flag.accepted} ({flag.source})")


def version_named(name: str) -> XllmVersion:
    """A version by its release number, with or without "v", or by the beginning of its commit.

    Raises:
        ConfigError: none of those in the table.
    """
    bare = name.lower().removeprefix("v")
    for version in VERSIONS:
        if bare == version.name or (len(bare) >= 7 and (version.commit.startswith(bare) or bare[:9] == version.commit)):
            return version
    told = ", ".join(version.name for version in VERSIONS)
    raise ConfigError(f"no flags of xLLM {name!r} are known; accepted: {told}")


@cache
def xllm_flags(version: str = LATEST) -> dict[str, XllmFlag]:
    """The flags of a version by name. ConfigError for a version that is not in the table."""
    commit, name = version_named(version).commit, version_named(version).name
    bounds = _bounds()
    found: dict[str, XllmFlag] = {}
    for line, row in enumerate(_rows(FLAGS_FILE, COLUMNS), 2):
        if cell := row[name]:
            place, _, reach = cell.partition(" ")
            short, _, number = place.partition(":")
            flag = XllmFlag(
                name=row["name"],
                type=row["type"],
                default=None,
                source=f"xllm@{commit} {long_path(short)}:{number}",
                is_in_json=reach != "cli",
            )
            value = flag.parsed(row["default"]) if row["default"] or row["type"] == "string" else None
            assert value is not None or not row["default"], f"{FLAGS_FILE}:{line}: {row['default']!r}"
            assert flag.name not in found, f"{FLAGS_FILE}:{line}: {flag.name} is there twice"
            own = bounds.get(flag.name, _ANY)
            found[flag.name] = XllmFlag(
                name=flag.name,
                type=flag.type,
                default=value,
                source=flag.source,
                is_in_json=flag.is_in_json,
                bounds=own.get(name, _ANY) if isinstance(own, dict) else own,
            )
    return found


@cache
def _bounds() -> dict[str, Bounds | dict[str, Bounds]]:
    names = [version.name for version in VERSIONS]
    found: dict[str, Any] = {}
    for row in _rows(BOUNDS_FILE, ("name", "least", "most", "choices", "since", "until", "source")):
        own = Bounds(
            float(row["least"] or -math.inf),
            float(row["most"] or math.inf),
            tuple(row["choices"].split("|")) if row["choices"] else (),
            row["source"],
        )
        first = names.index(row["since"]) if row["since"] else 0
        last = names.index(row["until"]) if row["until"] else len(names) - 1
        found.setdefault(row["name"], {}).update(dict.fromkeys(names[first : last + 1], own))
    return found


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == columns, f"{path}: columns {reader.fieldnames}"
        return list(reader)


@cache
def every_name() -> frozenset[str]:
    """Names of the flags of all versions."""
    return frozenset(row["name"] for row in _rows(FLAGS_FILE, COLUMNS))


@cache
def _bools() -> frozenset[str]:
    return frozenset(row["name"] for row in _rows(FLAGS_FILE, COLUMNS) if row["type"] == "bool")


def is_bool(name: str) -> bool:
    """Whether any version has a boolean flag of that name."""
    return name in _bools()


def versions_with(name: str) -> list[str]:
    """Versions that have a flag of that name."""
    return [version.name for version in VERSIONS if name in xllm_flags(version.name)]
