"""Read a cluster file: a `FleetConfig` as people write it, in TOML.

    [fleet]
    num_instances = 4
    heartbeat_us = 500_000

    [link]                      # from the router to each instance
    latency_us = 100
    bytes_per_s = 1.25e9

    [router]
    policy = "prefix-affinity"  # and its knobs
    max_load_factor = 2.0

    [failover]
    policy = "requeue"

    [roles]
    policy = "static"
    num_prefill = 1

    [[outage]]                  # or one table [failures], see `outages.FailureProcess`
    instance = 2
    start_us = 60_000_000
    end_us = 90_000_000

Only `num_instances` must be there; `FleetConfig` says what the rest is without it. What a table may hold is read from
the class it becomes.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, NewType, get_args, get_type_hints

from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FleetConfig, LinkConfig
from xllm_lab.outages import FailureProcess, Outage
from xllm_lab.policies.catalog import policies

_TABLES = ("fleet", "link", "router", "failover", "roles", "outage", "failures")
_FLEET_KEYS = ("num_instances", "heartbeat_us", "role_interval_us", "role_window_us")
_TOLD = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false"}
_SHOWN_CHARACTERS = 60


def read_fleet(path: Path) -> FleetConfig:
    """Read a cluster file.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or says something impossible; with the file, the line or the
            table and key, the value, and what is accepted.
    """
    document = _parsed(path)
    try:
        return _fleet(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parsed(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; a cluster file is accepted")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: is not a regular file; a cluster file is accepted")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); a readable cluster file is accepted") from error
    try:
        text = data.decode("utf-8-sig")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: byte is {data[error.start]:#04x}; UTF-8 text is accepted") from error
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).rpartition(" (at ")  # "line 3, column 5)" or "end of document)"
        found = re.match(r"line (\d+)", place)
        line = int(found[1]) if found else len(text.splitlines())
        raise ConfigError(f"{path}:{line}: {what}; TOML is accepted") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply; tables of plain values are accepted") from error


def _fleet(document: Mapping[str, Any]) -> FleetConfig:
    for name in document:
        if name not in _TABLES:
            raise ConfigError(f"has no table {name!r}; accepted: {', '.join(_TABLES)}")
    fleet: FleetConfig = _built("[fleet]", FleetConfig, document.get("fleet", {}), _FLEET_KEYS)
    parts: dict[str, Any] = {"link": _built("[link]", LinkConfig, document.get("link", {}))}
    if "router" in document:
        parts["route"] = _policy("[router]", document["router"], "route")
    if "failover" in document:
        parts["failover"] = _policy("[failover]", document["failover"], "failover")
    if "roles" in document:
        parts["roles"] = _policy("[roles]", document["roles"], "roles")
    return replace(fleet, outages=_outages(document, fleet.num_instances), **parts)


def _outages(document: Mapping[str, Any], num_instances: int) -> tuple[Outage, ...]:
    if "failures" in document and "outage" in document:
        raise ConfigError("has [failures] and [[outage]]; one of them is accepted")
    if "failures" in document:
        process: FailureProcess = _built("[failures]", FailureProcess, document["failures"])
        try:
            return process.outages(num_instances)
        except ConfigError as error:
            raise ConfigError(f"[failures] {error}") from None
    rows = document.get("outage", [])
    if not isinstance(rows, list):
        raise ConfigError(f"outage is {_shown(rows)}; tables [[outage]] are accepted")
    return tuple(_built(f"[[outage]] {number}", Outage, row) for number, row in enumerate(rows, start=1))


def _policy(where: str, cells: Any, decides: str) -> Any:
    known = policies(decides)
    name = _table(where, cells).get("policy", MISSING)
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{where} policy {_found(name)}; accepted: {', '.join(known)}")
    return _built(where, known[name], {k: v for k, v in cells.items() if k != "policy"})


def _built(where: str, cls: type[Any], cells: Any, keys: tuple[str, ...] = ()) -> Any:
    """An instance of a dataclass, from a table whose keys are its fields, or `keys` of them."""
    hints = get_type_hints(cls)
    types = {f.name: _plain(hints[f.name]) for f in fields(cls) if not keys or f.name in keys}
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    for key in _table(where, cells):
        if key not in types:
            raise ConfigError(f"{where} has no key {key!r}; accepted: {', '.join(types) or 'none'}")
    for key in needed:
        if key not in cells:
            raise ConfigError(f"{where} {key} is missing; {_TOLD[types[key]]} is accepted")
    values = {key: _typed(f"{where} {key}", value, types[key]) for key, value in cells.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where} {error}") from None


def _table(where: str, cells: Any) -> dict[str, Any]:
    if isinstance(cells, dict):
        return cells
    raise ConfigError(f"{where} is {_shown(cells)}; a table is accepted")


def _typed(where: str, value: Any, wanted: type[Any]) -> Any:
    """The value, if it is of that type; true is no integer, and 1.25e9 is one."""
    if wanted is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if wanted is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is not wanted or wanted is float:
        raise ConfigError(f"{where} is {_shown(value)}; {_TOLD[wanted]} is accepted")
    return value


def _plain(hint: Any) -> Any:
    """The type that a cell has to have; TOML cannot say None."""
    if isinstance(hint, UnionType):
        hint = next(h for h in get_args(hint) if h is not type(None))
    return hint.__supertype__ if isinstance(hint, NewType) else hint


def _found(value: object) -> str:
    return "is missing" if value is MISSING else f"is {_shown(value)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
