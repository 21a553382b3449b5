"""What a device can do: arithmetic, memory, kernels and links, in SI units, each figure with its source.

The built-in devices are `hardware.toml` beside this file; a user's own file has the same form and the same checks.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from xllm_lab.errors import ConfigError

BUILT_IN = Path(__file__).with_name("hardware.toml")
THIS_CPU = "this-cpu"
# Other names of the same part.
_ALIASES = {"ascend-a3": "ascend-910c", "910c": "ascend-910c", "a3": "ascend-910c"}

DTYPES = ("fp32", "bf16", "int8", "fp8", "fp4")
# Least and greatest value that can be right, and the unit. Wide enough for a laptop and for the next ten years; too
# narrow for anyone who writes 3.35 for 3.35 TB/s.
_RANGES = {
    "matrix_flops_per_s": (1e9, 1e18, "operations per second"),
    "vector_flops_per_s": (1e8, 1e17, "operations per second"),
    "hbm_bytes": (1e8, 1e14, "bytes"),
    "hbm_bytes_per_s": (1e9, 1e15, "bytes per second"),
    "matrix_frac": (0.01, 1.0, "a fraction"),
    "hbm_frac": (0.01, 1.0, "a fraction"),
    "kernel_us": (0.0, 1e4, "microseconds"),
    "launch_us": (0.0, 1e4, "microseconds"),
    "bytes_per_s": (1e6, 1e14, "bytes per second, one way"),
    "latency_us": (0.0, 1e6, "microseconds"),
    "num_devices": (1, 1e6, "devices"),
    "frac": (0.01, 1.0, "a fraction"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins `num_devices` devices.

    Attributes:
        bytes_per_s: one way, into and out of each device at once.
        latency_us: of one hop.
        num_devices: the largest group it joins.
        frac: the part of `bytes_per_s` that collectives reach.
    """

    bytes_per_s: float
    latency_us: float
    num_devices: int
    frac: float

    def us(self, num_bytes: float) -> float:
        """Time for a device to send, and meanwhile receive, so many bytes; without the latency."""
        return num_bytes / (self.bytes_per_s * self.frac) * 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator: a die, where a package holds several.

    Attributes:
        matrix_flops_per_s: dense peak of the matrix units by number format (`DTYPES`).
        vector_flops_per_s: peak of the vector units, fp32.
        matrix_frac: the part of the matrix peak that large multiplications reach.
        hbm_frac: the part of the memory bandwidth that kernels reach.
        kernel_us: time of a kernel beyond its arithmetic and its bytes.
        launch_us: time the host needs per kernel when no graph is replayed.
        link: joins the devices of a node.
        far_link: joins nodes.
        sources: where each figure is from, by its name.
    """

    name: str
    matrix_flops_per_s: Mapping[str, float]
    vector_flops_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    matrix_frac: float
    hbm_frac: float
    kernel_us: float
    launch_us: float
    link: Link
    far_link: Link
    sources: Mapping[str, str]

    def flops_per_s(self, dtype: str) -> float:
        """What large multiplications reach in this number format.

        Raises:
            ConfigError: the device's matrix units do not know it.
        """
        if dtype not in self.matrix_flops_per_s:
            known = ", ".join(self.matrix_flops_per_s)
            raise ConfigError(f"{self.name} has no matrix units for {dtype}; accepted are {known}")
        return self.matrix_flops_per_s[dtype] * self.matrix_frac

    def link_for(self, num_devices: int) -> Link:
        """The link of a group of so many devices: a node's own if they fit into one.

        Raises:
            ConfigError: no link joins so many.
        """
        for link in (self.link, self.far_link):
            if num_devices <= link.num_devices:
                return link
        most = self.far_link.num_devices
        raise ConfigError(f"{num_devices} devices of {self.name} are asked to work together; up to {most} are accepted")


_FIGURES = tuple(field.name for field in fields(Device) if field.name not in ("name", "sources"))
_LINK_FIGURES = tuple(field.name for field in fields(Link))


def hardware(name: str | Path) -> Device:
    """A built-in device by name, the machine this runs on (`this-cpu`), or the only device of a TOML file.

    Raises:
        ConfigError: an unknown name, or a file that `read_hardware` refuses or that holds several devices.
    """
    if str(name).endswith(".toml"):
        found = read_hardware(name)
        if len(found) != 1:
            raise ConfigError(f"{name}: holds {', '.join(found) or 'no device'}; a file of one device is accepted here")
        return next(iter(found.values()))
    key = str(name).lower()
    if key == THIS_CPU:
        from xllm_lab.this_cpu import measure_this_cpu

        return measure_this_cpu()
    key = _ALIASES.get(key, key)
    devices = _built_in()
    # As cards and profiles spell them, too: RTXPRO6000.
    key = next((name for name in devices if _letters(name) == _letters(key)), key)
    if key not in devices:
        accepted = ", ".join((*devices, *_ALIASES, THIS_CPU))
        raise ConfigError(f"no hardware {str(name)!r} is known; accepted are {accepted}, or a .toml file")
    return devices[key]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name))


@cache
def _built_in() -> dict[str, Device]:
    return read_hardware(BUILT_IN)


def read_hardware(path: str | Path) -> dict[str, Device]:
    """The devices of a TOML file by name. A device may be `like` one above it and give only what differs.

    Raises:
        ConfigError: an unreadable file; a figure that is missing, unknown, without a source, or impossible in its unit.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: no hardware file can be read there ({error})") from error
    found: dict[str, Device] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} is {table!r}; a table of figures for each device is accepted")
        found[name] = _device(name, table, found, str(path))
    return found


def _device(name: str, table: dict[str, Any], above: Mapping[str, Device], path: str) -> Device:
    where = f"{path}: {name}"
    given = {key: value for key, value in table.items() if key not in ("sources", "like")}
    sources = table.get("sources", {})
    for key in given:
        if key not in _FIGURES:
            raise ConfigError(f"{where}.{key} is no figure of a device; accepted are {', '.join(_FIGURES)}")
        source = sources.get(key)
        if not isinstance(source, str) or not source.strip():
            raise ConfigError(f"{where}.{key} has no source; a text under {name}.sources.{key} is expected")
    for key in sources:
        if key not in given:
            raise ConfigError(f"{where}.sources.{key} is the source of no figure of {name}; one each is accepted")
    figures = {**_inherited(table, above, where), **{k: _figure(k, v, f"{where}.{k}") for k, v in given.items()}}
    missing = [key for key in _FIGURES if key not in figures]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing; every figure is expected, or `like` another device")
    return Device(name=name, **{**figures, "sources": {**figures.get("sources", {}), **sources}})


def _inherited(table: dict[str, Any], above: Mapping[str, Device], where: str) -> dict[str, Any]:
    if "like" not in table:
        return {}
    like = table["like"]
    known = {**(above if where.startswith(str(BUILT_IN)) else _built_in()), **above}
    if like not in known:
        raise ConfigError(f"{where}.like is {like!r}; accepted are {', '.join(known) or 'devices above it'}")
    figures = {key: getattr(known[like], key) for key in _FIGURES}
    return {**figures, "sources": {k: f"{v} (as {like})" for k, v in known[like].sources.items()}}


def _figure(key: str, value: Any, where: str) -> Any:
    if key == "matrix_flops_per_s":
        _expect_table(value, DTYPES, where)
        return {dtype: _number(key, flops, f"{where}.{dtype}") for dtype, flops in value.items()}
    if key in ("link", "far_link"):
        _expect_table(value, _LINK_FIGURES, where)
        missing = [figure for figure in _LINK_FIGURES if figure not in value]
        if missing:
            raise ConfigError(f"{where}: {', '.join(missing)} missing; expected are {', '.join(_LINK_FIGURES)}")
        figures = {figure: _number(figure, value[figure], f"{where}.{figure}") for figure in _LINK_FIGURES}
        num_devices = int(figures.pop("num_devices"))
        return Link(num_devices=num_devices, **figures)
    return _number(key, value, where)


def _expect_table(value: Any, accepted: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{where} is {value!r}; a table of {', '.join(accepted)} is expected")
    for key in value:
        if key not in accepted:
            raise ConfigError(f"{where}.{key} is unknown; accepted are {', '.join(accepted)}")


def _number(key: str, value: Any, where: str) -> float:
    least, most, unit = _RANGES[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}; a number, in {unit}, is expected")
    if not least <= value <= most:
        raise ConfigError(f"{where} is {value:g}; {least:g} to {most:g} {unit} can be right")
    return float(value)
