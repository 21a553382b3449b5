"""A run is a folder: manifest.json, workload.jsonl, requests.parquet, steps.parquet; whole, or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xllm_lab import provenance
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.formats import own
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.catalog import configured, make_batch_policy, policy_name, values_of
from xllm_lab.records import Records, records_from, request_table, step_table
from xllm_lab.step_time import StepTime
from xllm_lab.workload import Workload

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a run was. Everything needed to run it again.

    Attributes:
        host: "engine" or "simulator".
        instance: fields of `InstanceConfig`.
        policy: {"name": ..., and its fields}.
        step_time: weights the policy saw, or None.
        timing: how time was had: the engine's clock, or the simulator's cost model and its error.
        model: what was served: name, dtype, kv_bytes_per_token, vocab_size; empty in a simulated run.
        workload: source, checksum, seed, number of requests.
    """

    host: str
    instance: dict[str, Any]
    policy: dict[str, Any]
    step_time: list[float] | None
    timing: dict[str, Any]
    model: dict[str, Any]
    workload: dict[str, Any]
    versions: dict[str, str] = field(default_factory=provenance.versions)
    commit: str = field(default_factory=provenance.commit)
    hardware: dict[str, Any] = field(default_factory=provenance.hardware)
    format: int = FORMAT

    def instance_config(self) -> InstanceConfig:
        return configured(InstanceConfig, self.instance)

    def batch_policy(self) -> BatchPolicy:
        values = dict(self.policy)
        return make_batch_policy(values.pop("name"), values)

    def step_time_model(self) -> StepTime | None:
        return None if self.step_time is None else StepTime(tuple(self.step_time))


def describe(
    config: InstanceConfig, policy: BatchPolicy, step_time: StepTime | None, workload: Workload
) -> dict[str, Any]:
    """The part of a manifest that both hosts fill in the same way."""
    return {
        "instance": values_of(config),
        "policy": {"name": policy_name(policy), **values_of(policy)},
        "step_time": None if step_time is None else list(step_time.weights),
        "workload": {
            "source": workload.source,
            "checksum": workload.checksum,
            "seed": workload.seed,
            "num_requests": len(workload.requests),
        },
    }


class Run:
    """A finished run on disk, read when asked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @cached_property
    def workload(self) -> Workload:
        """The requests as they were sent."""
        return own.read(self.path / "workload.jsonl")

    @cached_property
    def records(self) -> Records:
        return records_from(_read_table(self.path / "requests.parquet"), _read_table(self.path / "steps.parquet"))


def write_run(path: Path, manifest: Manifest, workload: Workload, records: Records) -> Run:
    """Write a new run folder in one go. RunError if it exists or cannot be written."""
    with new_folder(path) as folder:
        write_json(folder / "manifest.json", asdict(manifest))
        own.write(workload, folder / "workload.jsonl")
        pq.write_table(request_table(records.sort()), folder / "requests.parquet", compression="zstd")
        pq.write_table(step_table(records), folder / "steps.parquet", compression="zstd")
    return Run(path, manifest)


def read_run(path: Path) -> Run:
    """Open a run. RunError names what is missing or is not ours."""
    manifest = read_json(path / "manifest.json", "a run folder, as `replay` and `simulate` write it")
    try:
        run = Run(path, Manifest(**manifest))
        run.manifest.instance_config()
    except (TypeError, ConfigError) as error:
        raise RunError(f"{path / 'manifest.json'}: {error}; accepted: a manifest of format {FORMAT}") from None
    return run


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends well; nothing is left when it does not."""
    if path.exists():
        raise RunError(f"{path}: exists already; accepted: a new folder")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """As `new_folder`, for one file; one that exists is replaced."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, accepted: str) -> dict[str, Any]:
    """A JSON object from a file. RunError says what is accepted."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: is not there; accepted: {accepted}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}; accepted: {accepted}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: holds no object; accepted: {accepted}")
    return value


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path}: cannot be read: {error}; accepted: a Parquet file of a finished run") from None
