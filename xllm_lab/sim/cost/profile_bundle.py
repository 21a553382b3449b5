"""Operator times as a profiler wrote them: a folder with `meta.yaml` and, for each degree of tensor parallelism, CSVs.

    profile/meta.yaml             what was profiled, and how
    profile/tpN/dense.csv         layer,tokens,time_us
    profile/tpN/per_sequence.csv  layer,sequences,time_us
    profile/tpN/attention.csv     prefill_chunk,kv_prefill,n_decode,kv_decode,time_us
    profile/tpN/moe.csv           tokens,activated_experts,time_us                       mixtures of experts only
                                  ep,tokens,activated_experts,time_us                    of later profilers
    profile/tpN/skew.csv          one long decode among short ones, beside equally long ones

The form is LLMServingSim's (casys-kaist, commit 5daddb2, docs/docs/profiler/output-bundle.md). Each time is one call of
one module of one layer on one device, the sum of its kernels, in microseconds. Grids need not be full: a device has not
the memory for the longest contexts of the largest batches. They must have no holes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xllm_lab.errors import ConfigError, ProfileError
from xllm_lab.page_time import PageTime

# No kernel is shorter than a tenth of a microsecond and no call of one operator lasts a second: times outside are
# in another unit.
SHORTEST_US, LONGEST_US = 0.1, 1e6

Key = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SkewShot:
    """Decodes of two lengths, and the time of their attention beside that of as many of equal length.

    Attributes:
        max_kv, mean_kv: longest and mean length in tokens.
        excess_frac: how much longer it takes than decodes that are all of the mean length.
    """

    prefill_chunk: int
    kv_prefill: int
    num_decodes: int
    max_kv: float
    mean_kv: float
    excess_frac: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileBundle:
    """One device's share of a model.

    Attributes:
        model: as its repository is called.
        tensor_parallel: devices the model was cut for.
        dense: operator -> tokens -> microseconds.
        per_sequence: operator -> rows -> microseconds.
        attention: (prefill chunk, KV before it, decodes, KV of each) -> microseconds.
        moe: (tokens, activated experts) -> microseconds; empty without experts. A token is as many rows as it has
            experts, so that there may be half of one.
        skew: empty if there is none, or if the bundle says that it is not to be used.
        page_time: of mapping pages of virtual KV, if it was measured.
    """

    folder: Path
    model: str
    hardware: str
    tensor_parallel: int
    dense: Mapping[str, Mapping[int, float]]
    per_sequence: Mapping[str, Mapping[int, float]]
    attention: Mapping[Key, float]
    moe: Mapping[tuple[float, int], float]
    skew: tuple[SkewShot, ...]
    page_time: PageTime | None = None


def read_bundle(folder: Path, tensor_parallel: int = 1, expert_devices: int = 1) -> ProfileBundle:
    """Read a bundle's tables for one degree of tensor parallelism.

    Args:
        expert_devices: over which the experts are divided; matters where their table tells several apart.

    Raises:
        ProfileError: a missing file, column or operator, a cell that is no number, a time that cannot be microseconds,
            a row twice, or a hole in a grid; with file and row.
    """
    meta = _meta(folder / "meta.yaml")
    tables = folder / f"tp{tensor_parallel}"
    if not tables.is_dir():
        found = ", ".join(sorted(p.name for p in folder.glob("tp*"))) or "none"
        raise ProfileError(f"{tables}: no such folder; the bundle has {found}")
    attention = _table(tables / "attention.csv", ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode"), least=0)
    _refuse_holes(tables / "attention.csv", attention)
    moe = tables / "moe.csv"
    if not moe.exists():  # an expert's kernels do not change with tensor parallelism, so tp1 alone may have them
        moe = folder / "tp1" / "moe.csv"
    return ProfileBundle(
        folder=folder,
        model=str(meta["model"]),
        hardware=str(meta.get("hardware") or meta.get("gpu") or "unnamed"),
        tensor_parallel=tensor_parallel,
        dense=_by_layer(tables / "dense.csv", "tokens"),
        per_sequence=_by_layer(tables / "per_sequence.csv", "sequences"),
        attention=attention,
        moe=_moe(moe, expert_devices) if moe.exists() else {},
        skew=_skew(tables / "skew.csv") if _uses_skew(meta) else (),
        page_time=_page_time(folder / "meta.yaml", meta.get("page_time")),
    )


def bundle_model(folder: Path) -> str:
    """The profiled model, as its repository is called. ProfileError if there is no bundle."""
    return str(_meta(folder / "meta.yaml")["model"])


def _meta(path: Path) -> dict[str, Any]:
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(
            f"{path}: cannot be read as YAML ({error}); a profile bundle's meta.yaml is accepted"
        ) from None
    if not isinstance(meta, dict) or not meta.get("model"):
        raise ProfileError(f"{path}: has no field 'model'; the name of the profiled model is expected")
    return meta


def _page_time(path: Path, told: Any) -> PageTime | None:
    """Bundles of other profilers say nothing of it."""
    if told is None:
        return None
    try:
        return PageTime(**{name: told[name] + 0 for name in PageTime.__slots__})
    except (TypeError, KeyError, ConfigError) as error:
        accepted = ", ".join(PageTime.__slots__)
        raise ProfileError(f"{path}: page_time is {told} ({error}); accepted: {accepted}, microseconds") from None


def _uses_skew(meta: Mapping[str, Any]) -> bool:
    """The bundle says itself whether its skew sweep is to be used (`skew_fit.enabled`)."""
    fit = meta.get("skew_fit")
    return bool(fit.get("enabled")) if isinstance(fit, dict) else False


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells) of each row."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in columns if c not in (reader.fieldnames or ())]
            if missing:
                raise ProfileError(f"{path}, line 1: no column {', '.join(missing)}; expected {','.join(columns)}")
            empty = True
            for cells in reader:
                empty = False
                yield reader.line_num, cells
            if empty:
                raise ProfileError(f"{path}: holds no rows; expected {','.join(columns)}")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read ({error}); a CSV of {','.join(columns)} is expected") from None


def _number(path: Path, line: int, cells: Mapping[str, str], column: str) -> float:
    try:
        value = float(cells[column])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ProfileError(f"{path}, line {line}: {column} is {cells[column]!r}, a number is expected")
    return value


def _count(path: Path, line: int, cells: Mapping[str, str], column: str, least: int) -> int:
    value = _number(path, line, cells, column)
    if value != int(value) or value < least:
        raise ProfileError(
            f"{path}, line {line}: {column} is {cells[column]}, an integer of at least {least} is expected"
        )
    return int(value)


def _time_us(path: Path, line: int, cells: Mapping[str, str], column: str = "time_us") -> float:
    value = _number(path, line, cells, column)
    if not SHORTEST_US <= value <= LONGEST_US:
        raise ProfileError(
            f"{path}, line {line}: {column} is {cells[column]}; one operator takes {SHORTEST_US:g} to {LONGEST_US:g} "
            "microseconds, so this is another unit or no time"
        )
    return value


def _table(path: Path, keys: tuple[str, ...], least: int) -> dict[Key, float]:
    table: dict[Key, float] = {}
    for line, cells in _rows(path, (*keys, "time_us")):
        key = tuple(_count(path, line, cells, k, least) for k in keys)
        if key in table:
            raise ProfileError(f"{path}, line {line}: {','.join(keys)} = {key} is there twice, once is expected")
        table[key] = _time_us(path, line, cells)
    return table


def _moe(path: Path, expert_devices: int) -> dict[tuple[float, int], float]:
    """The rows of as many devices, or of 1: a device's kernels depend on its own rows and experts."""
    columns = ("tokens", "activated_experts")
    if "ep" not in _columns(path):
        return {(float(n), e): us for (n, e), us in _table(path, columns, least=1).items()}
    table = _table(path, ("ep", *columns), least=1)
    measured = sorted({ep for ep, _, _ in table})
    ep = expert_devices if expert_devices in measured else 1
    if ep not in measured:
        raise ProfileError(f"{path}: ep is {', '.join(map(str, measured))}; rows of {expert_devices} or 1 are expected")
    return {(n / ep, e): us for (of, n, e), us in table.items() if of == ep}


def _columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def _by_layer(path: Path, size: str) -> dict[str, dict[int, float]]:
    layers: dict[str, dict[int, float]] = {}
    for line, cells in _rows(path, ("layer", size, "time_us")):
        times = layers.setdefault(cells["layer"], {})
        count = _count(path, line, cells, size, 1)
        if count in times:
            raise ProfileError(
                f"{path}, line {line}: {cells['layer']} at {count} {size} is there twice, once is expected"
            )
        times[count] = _time_us(path, line, cells)
    grid = max((set(t) for t in layers.values()), key=len)
    for layer, times in layers.items():
        if holes := grid - set(times):
            raise ProfileError(f"{path}: {layer} has no row for {min(holes)} {size}, which other layers have")
    return layers


def _refuse_holes(path: Path, attention: Mapping[Key, float]) -> None:
    """Lengths may be missing from the long end, as memory ran out there; nowhere else."""
    lengths: dict[Key, dict[int, set[int]]] = {}
    for chunk, before, decodes, kv in attention:
        if chunk + decodes == 0:
            raise ProfileError(f"{path}: a row has neither a prefill chunk nor a decode; it measured nothing")
        if decodes:
            lengths.setdefault((chunk, before), {}).setdefault(decodes, set()).add(kv)
    if not any(chunk == 0 for chunk, _ in lengths):
        raise ProfileError(f"{path}: no row with prefill_chunk 0; batches of decodes alone are expected")
    for (chunk, before), batches in lengths.items():
        longest = max((sorted(kvs) for kvs in batches.values()), key=len)
        for decodes, kvs in batches.items():
            holes = set(longest[: len(kvs)]) - kvs
            if holes:
                key = (chunk, before, decodes, min(holes))
                raise ProfileError(f"{path}: the grid has a hole; prefill_chunk,kv_prefill,n_decode,kv_decode = {key}")


def _skew(path: Path) -> tuple[SkewShot, ...]:
    """The sweep at its most frequent ratio of long to short, which alone covers the whole grid.

    The file's times are sums over the profiler's repetitions, so only their quotients mean anything.
    """
    shots: dict[float, list[SkewShot]] = {}
    columns = ("n", "pc", "kp", "skew", "kv_big", "kv_mean", "t_mean_us", "t_skew_us")
    for line, cells in _rows(path, columns):
        t_mean, t_skew = (_time_us(path, line, cells, c) for c in ("t_mean_us", "t_skew_us"))
        shot = SkewShot(
            prefill_chunk=_count(path, line, cells, "pc", 0),
            kv_prefill=_count(path, line, cells, "kp", 0),
            num_decodes=_count(path, line, cells, "n", 1),
            max_kv=_number(path, line, cells, "kv_big"),
            mean_kv=_number(path, line, cells, "kv_mean"),
            excess_frac=t_skew / t_mean - 1.0,
        )
        if not 0 < shot.mean_kv <= shot.max_kv:
            raise ProfileError(f"{path}, line {line}: kv_mean is {shot.mean_kv:g}, at most kv_big is expected")
        shots.setdefault(_number(path, line, cells, "skew"), []).append(shot)
    most = max(shots, key=lambda skew: len(shots[skew]))
    return tuple(shots[most])
