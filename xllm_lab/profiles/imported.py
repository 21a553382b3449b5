"""What is kept of a profile: a folder that `calibrate`, `simulate` and `replay` accept, whichever profiler it was from.

    import.json         where it is from, units as found, what was left out and why, what is missing and why
    steps.parquet       executed batches as samples of step times, each with what its lengths rest on
    workload.jsonl      requests as a trace
    operators.csv       see `operator_table`
    collectives.csv     fields of `CollectiveRow`

A part that the profiler did not record is not there, and `import.json` says why. Equal sources give equal bytes.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from xllm_lab.errors import ConfigError, ProfileError, RunError
from xllm_lab.formats import own
from xllm_lab.operator_table import OperatorTable, write_operator_table
from xllm_lab.profiles.profile import CollectiveRow, LeftOut, Profile
from xllm_lab.profiles.steps import Steps, steps
from xllm_lab.profiles.trace import trace
from xllm_lab.runs import new_folder, read_json, read_parquet, write_json
from xllm_lab.step_samples import StepSample
from xllm_lab.step_time import Chunk
from xllm_lab.workload import Workload

FORMAT = 1
MANIFEST, STEPS, WORKLOAD, OPERATORS, COLLECTIVES = (
    *("import.json", "steps.parquet", "workload.jsonl"),
    *("operators.csv", "collectives.csv"),
)
_ACCEPTED = "a folder, as `import` writes it"
_STEP_SCHEMA = pa.schema(
    [
        pa.field("step_us", pa.float64(), nullable=False),
        pa.field("num_logits", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.list_(pa.int64()), nullable=False),
        pa.field("num_computed_tokens", pa.list_(pa.int64()), nullable=False),
        pa.field("basis", pa.string(), nullable=False),
    ]
)
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What `import.json` says.

    Attributes:
        source: the reader's name.
        name: of the file or folder that was read.
        checksum: sha256 of the file, or of the names and contents of the folder's files, in hexadecimal.
        kv_block_tokens: as it was given, for lengths that were estimated; None if it was not.
        units: of each column of times, as found.
        parts: the files of the folder, and the rows in each.
        num_by_basis: samples of step times, by what their lengths rest on.
        left_out: rows that went into nothing.
        missing: parts that are not there, and what else the simulator could have used, each with the reason.
        notes: what else a user of the figures has to know.
    """

    source: str
    name: str
    checksum: str
    kv_block_tokens: int | None
    units: Mapping[str, str]
    parts: Mapping[str, int]
    num_by_basis: Mapping[str, int]
    left_out: tuple[LeftOut, ...]
    missing: Mapping[str, str]
    notes: tuple[str, ...]
    format: int = FORMAT


def write_import(profile: Profile, out: Path, *, kv_block_tokens: int | None = None) -> Imported:
    """Write a new folder of what can be used of a profile.

    Args:
        kv_block_tokens: tokens of a KV block in the engine that was profiled; see `profiles.steps`.

    Raises:
        ConfigError: `kv_block_tokens` below 1, or nothing in the profile can be used.
        RunError: the folder exists or cannot be written.
    """
    checksum = _checksum(profile.path)
    found, requests = steps(profile, kv_block_tokens=kv_block_tokens), trace(profile, checksum=checksum)
    parts: dict[str, tuple[int, Callable[[Path], None]]] = {
        STEPS: (len(found.samples), lambda path: _write_steps(found, path)),
        OPERATORS: (len(profile.operators.rows), lambda path: write_operator_table(profile.operators, path)),
        COLLECTIVES: (len(profile.collectives), lambda path: _write_collectives(profile.collectives, path)),
    }
    if (workload := requests.workload) is not None:
        parts[WORKLOAD] = (len(workload.requests), _trace_writer(workload))
    if not any(num for num, _ in parts.values()):
        raise ConfigError(f"{profile.path}: has no steps, operators, collectives or requests; at least one is accepted")
    imported = Imported(
        source=profile.source,
        name=profile.path.resolve().name,
        checksum=checksum,
        kv_block_tokens=kv_block_tokens,
        units=profile.units,
        parts={name: num for name, (num, _) in parts.items() if num},
        num_by_basis=found.num_by_basis,
        left_out=(*profile.left_out, *found.left_out, *requests.left_out, *_only_shown(profile)),
        missing=dict(_missing(profile, found, workload)),
        notes=(*profile.notes, *_blocks(profile)),
    )
    with new_folder(out) as folder:
        for name in imported.parts:
            parts[name][1](folder / name)
        write_json(folder / MANIFEST, asdict(imported))
    return imported


def is_import(path: Path) -> bool:
    """Whether `import` wrote this folder."""
    return (path / MANIFEST).is_file()


def read_import(path: Path) -> Imported:
    """What `import.json` of a folder says; RunError if it is missing or not ours."""
    value = read_json(path / MANIFEST, _ACCEPTED)
    try:
        if value["format"] != FORMAT:
            raise ValueError(f"format is {value['format']}, {FORMAT} is accepted")
        left_out = tuple(LeftOut(**row) for row in value["left_out"])
        imported = Imported(**{**value, "left_out": left_out, "notes": tuple(value["notes"])})
        for name in ("units", "parts", "num_by_basis", "missing"):
            dict(getattr(imported, name))
        return imported
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path / MANIFEST}: {error}; accepted: {_ACCEPTED}") from None


def read_steps(path: Path) -> list[StepSample]:
    """The samples in a folder; RunError if its file is damaged or holds others than the manifest says."""
    imported, file = read_import(path), path / STEPS
    table = read_parquet(file, _STEP_SCHEMA, _ACCEPTED)
    expected = imported.parts.get(STEPS, 0)
    if table.num_rows != expected:
        raise RunError(f"{file}: holds {table.num_rows} steps, {MANIFEST} says {expected}; accepted: {_ACCEPTED}")
    try:
        return [
            StepSample(
                chunks=tuple(map(Chunk, row["num_tokens"], row["num_computed_tokens"])),
                num_logits=row["num_logits"],
                step_us=row["step_us"],
            )
            for row in table.to_pylist()
        ]
    except ConfigError as error:
        raise RunError(f"{file}: {error}; accepted: {_ACCEPTED}") from None


def _write_steps(found: Steps, path: Path) -> None:
    columns = {
        "step_us": [sample.step_us for sample in found.samples],
        "num_logits": [sample.num_logits for sample in found.samples],
        "num_tokens": [[chunk.num_tokens for chunk in sample.chunks] for sample in found.samples],
        "num_computed_tokens": [[chunk.num_computed_tokens for chunk in sample.chunks] for sample in found.samples],
        "basis": list(found.bases),
    }
    table = pa.Table.from_pydict(columns, schema=_STEP_SCHEMA)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _write_collectives(rows: tuple[CollectiveRow, ...], path: Path) -> None:
    columns = [field.name for field in fields(CollectiveRow)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([getattr(row, name) for name in columns] for row in rows)


def _trace_writer(workload: Workload) -> Callable[[Path], None]:
    return lambda path: own.write(workload, path)


def _missing(profile: Profile, found: Steps, workload: Workload | None) -> Iterator[tuple[str, str]]:
    """Why each part that is not there is not there; and why there is no profile bundle."""
    if not found.samples:
        yield STEPS, "no batch whose lengths are known" if profile.batches else "no executed batches"
    if workload is None:
        yield WORKLOAD, "no request that can be served again" if profile.requests else "no requests"
    if not profile.operators.rows:
        yield OPERATORS, "no kernels"
    if not profile.collectives:
        yield COLLECTIVES, "no collectives"
    yield "bundle of `simulate --profile`", _no_bundle(profile.operators)


def _only_shown(profile: Profile) -> Iterator[LeftOut]:
    """Rows of which the simulator learns nothing; `profile` shows them."""
    shown = {
        "a step's split of its time": [split.step_us for split in profile.splits],
        "an operator's time on the host": [row.host_us for row in profile.host_operators],
        "a forward pass without its requests": [row.step_us for row in profile.forwards],
    }
    name = profile.path.resolve().name
    return (LeftOut(name, f"{what}, which `profile` shows", len(us), sum(us)) for what, us in shown.items() if us)


def _blocks(profile: Profile) -> list[str]:
    if profile.peak_used_blocks is None:
        return []
    return [f"{profile.peak_used_blocks} of {profile.num_blocks or '?'} KV blocks in use at most"]


def _no_bundle(operators: OperatorTable) -> str:
    if not operators.rows:
        return "no kernels"
    hidden = sum(row.num_calls for row in operators.rows if row.hides_lengths)
    unshaped = sum(row.num_calls for row in operators.rows if row.shapes is None)
    lacks = ["which layer of the model a kernel serves"]
    lacks += [f"KV lengths of {hidden} calls of attention, whose shapes are the whole pool's"] * bool(hidden)
    lacks += [f"shapes of {unshaped} calls"] * bool(unshaped)
    return f"not recorded: {'; '.join(lacks)}"


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    folder = path if path.is_dir() else path.parent
    files = sorted(file for file in path.rglob("*.csv") if file.is_file()) if path.is_dir() else [path]
    try:
        for file in files:
            if file != path:
                digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
            with file.open("rb") as content:
                while piece := content.read(_HASHED_BYTES):
                    digest.update(piece)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); a profile is accepted") from error
    return digest.hexdigest()
