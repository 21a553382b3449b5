"""The options of a line of text that names a store, as NAME=VALUE&NAME=VALUE behind its "?"."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl

from xllm_lab.errors import ConfigError

Options = dict[str, str]
_UNITS: Final = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def options_of(spec: str) -> Options:
    """ConfigError for what is no option, or given twice."""
    try:
        pairs = parse_qsl(spec.partition("?")[2], keep_blank_values=True, strict_parsing="?" in spec)
    except ValueError as error:
        raise ConfigError(f"{spec!r}: {error}; options are accepted as NAME=VALUE&NAME=VALUE") from error
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ConfigError(f"{spec!r} gives an option twice; once each is accepted")
    return options


def size_of(spec: str, options: Options, name: str, default: int) -> int:
    """Takes a number of bytes, or of KiB, MiB, GiB or TiB, out of the options."""
    if name not in options:
        return default
    told = options.pop(name)
    number = told.rstrip("KMGTiB")
    unit = told[len(number) :]
    if not number.isascii() or not number.isdigit() or unit not in _UNITS:
        raise ConfigError(
            f"{spec!r}: {name} is {told!r}; a whole number of bytes is accepted, or of KiB, MiB, GiB or TiB"
        )
    return int(number) * _UNITS[unit]


def count_of(spec: str, options: Options, name: str, default: int) -> int:
    """Takes a whole number of at least 1 out of the options."""
    told = options.pop(name, str(default))
    if not told.isascii() or not told.isdigit() or int(told) < 1:
        raise ConfigError(f"{spec!r}: {name} is {told!r}; a whole number of at least 1 is accepted")
    return int(told)


def number_of(spec: str, options: Options, name: str, default: float | None) -> float | None:
    """Takes a number above 0 out of the options."""
    if name not in options:
        return default
    told = options.pop(name)
    try:
        number = float(told.replace(" ", "+"))  # as 2e+9 comes through
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{spec!r}: {name} is {told!r}; a number above 0 is accepted")
    return number
