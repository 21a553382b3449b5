"""A run is a folder: manifest.json, workload.jsonl, requests.parquet, steps.parquet; whole, or not there.

Of an instance with tiers, copies.parquet, too; of one with divided experts, experts.parquet and expert_loads.parquet.
"""

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
from xllm_lab.copy_time import CopyTime, CopyWeights
from xllm_lab.draft_time import DraftTime, Weights
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.expert_records import (
    EXPERT_LOADS_FILE,
    EXPERT_LOADS_SCHEMA,
    EXPERTS_FILE,
    EXPERTS_SCHEMA,
    ExpertLoadRecord,
    ExpertsRecord,
    decisions_from,
    expert_loads_from,
    expert_loads_table,
    experts_table,
)
from xllm_lab.formats import own
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import configured, values_of
from xllm_lab.policies.of_instance import Policies, policies_from
from xllm_lab.records import (
    COPY_SCHEMA,
    REQUEST_SCHEMA,
    STEP_SCHEMA,
    Records,
    copy_table,
    records_from,
    request_table,
    step_table,
    table_of_steps,
)
from xllm_lab.step_time import StepTime
from xllm_lab.workload import Workload

FORMAT = 7
_FINISHED = "a Parquet file of a finished run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a run was. Everything needed to run it again.

    Attributes:
        host: "engine" or "simulator".
        instance: fields of `InstanceConfig`.
        policies: by decision, {"name": ..., and its fields}.
        step_time: weights the policy saw, or None.
        draft_time: those of drafting, by method.
        copy_time: those of copies between tiers, by kind.
        timing: how time was had: the engine's clock, or the simulator's cost model and its error.
        model: what was served: name, dtype, kv_bytes_per_token (on each device), vocab_size; an engine also says over
            how many devices, tensor_parallel. A simulated run has its calibration's.
        workload: source, checksum, seed, number of requests.
        fleet: fields of `FleetConfig`; None is a single instance.
        store: below the host, and what became of its blocks, see `store.StoreCounters`; of a fleet, by instance.
        graphs: what became of steps, see `step_shape.ShapeCounts`; of an engine, with its captures and their memory.
            None if every step was eager.
        expert_layout: who shares the experts, see `rebalancing.describe_experts`; None: there are none.
        drafts: of an engine that may speculate, the methods that it could draft by, and what its draft model was.
    """

    host: str
    instance: dict[str, Any]
    policies: dict[str, dict[str, Any]]
    step_time: list[float] | None
    timing: dict[str, Any]
    model: dict[str, Any]
    workload: dict[str, Any]
    fleet: dict[str, Any] | None = None
    graphs: dict[str, Any] | None = None
    store: dict[str, Any] | None = None
    draft_time: dict[str, list[float]] = field(default_factory=dict)
    copy_time: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=provenance.versions)
    commit: str = field(default_factory=provenance.commit)
    hardware: dict[str, Any] = field(default_factory=provenance.hardware)
    format: int = FORMAT
    drafts: dict[str, Any] | None = None
    expert_layout: dict[str, Any] | None = None

    def instance_config(self) -> InstanceConfig:
        return configured(InstanceConfig, self.instance)

    def instance_policies(self) -> Policies:
        return policies_from(self.policies)

    def step_time_model(self) -> StepTime | None:
        return None if self.step_time is None else StepTime(tuple(self.step_time))

    def draft_time_model(self) -> DraftTime:
        return DraftTime({method: Weights(*weights) for method, weights in self.draft_time.items()})

    def copy_time_model(self) -> CopyTime:
        weights: dict[Any, CopyWeights] = {kind: CopyWeights(*given) for kind, given in self.copy_time.items()}
        return CopyTime(weights)


def describe(
    config: InstanceConfig,
    policies: Policies,
    step_time: StepTime | None,
    workload: Workload,
    *,
    draft_time: DraftTime | None = None,
    copy_time: CopyTime | None = None,
) -> dict[str, Any]:
    """The part of a manifest that both hosts fill in the same way."""
    by_method = {} if draft_time is None else draft_time.weights
    by_kind = {} if copy_time is None else copy_time.weights
    return {
        "instance": values_of(config),
        "policies": policies.as_dict(),
        "step_time": None if step_time is None else list(step_time.weights),
        "draft_time": {method: list(weights) for method, weights in by_method.items()},
        "copy_time": {str(kind): list(weights) for kind, weights in by_kind.items()},
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
        workload = own.read(self.path / "workload.jsonl")
        self.expect_all("workload.jsonl", len(workload.requests))
        return workload

    @cached_property
    def records(self) -> Records:
        requests = read_parquet(self.path / "requests.parquet", REQUEST_SCHEMA)
        self.expect_all("requests.parquet", requests.num_rows)
        copies = self.path / "copies.parquet"
        copied = read_parquet(copies, COPY_SCHEMA) if copies.exists() else None
        try:
            records = records_from(requests, read_parquet(self.path / "steps.parquet", STEP_SCHEMA), copied)
            records.decisions += self.decisions
            records.expert_loads += self.expert_loads
            return records
        except ValueError as error:
            raise RunError(f"{self.path / 'requests.parquet'}: {error}; accepted: {_FINISHED}") from None

    @cached_property
    def decisions(self) -> list[ExpertsRecord]:
        """On where experts lie; none where they are not divided, or the policy was never asked."""
        path = self.path / EXPERTS_FILE
        return decisions_from(read_parquet(path, EXPERTS_SCHEMA)) if path.exists() else []

    @cached_property
    def expert_loads(self) -> list[ExpertLoadRecord]:
        """What the slots of experts had to do; nothing where they are not divided."""
        path = self.path / EXPERT_LOADS_FILE
        return expert_loads_from(read_parquet(path, EXPERT_LOADS_SCHEMA)) if path.exists() else []

    @property
    def written_at_us(self) -> int:
        """When the manifest was written, Unix time; as its file says."""
        return (self.path / "manifest.json").stat().st_mtime_ns // 1000

    def expect_all(self, name: str, count: int) -> None:
        """RunError unless a file of the folder holds as many requests as the manifest says."""
        expected = self.manifest.workload["num_requests"]
        if count != expected:
            raise RunError(f"{self.path / name}: holds {count} requests, manifest.json says {expected}")


def write_run(path: Path, manifest: Manifest, workload: Workload, records: Records) -> Run:
    """Write a new run folder in one go. RunError if it exists or cannot be written."""
    with new_folder(path) as folder:
        fill_run(folder, manifest, workload, records)
    return Run(path, manifest)


def fill_run(folder: Path, manifest: Manifest, workload: Workload, records: Records) -> None:
    """As `write_run`, into a folder that `new_folder` opened before the run."""
    write_json(folder / "manifest.json", asdict(manifest))
    own.write(workload, folder / "workload.jsonl")
    # A run that was read, or made by hand, has steps and no spans.
    steps = step_table(records.spans) if records.spans else table_of_steps(records.steps)
    tables = {"requests": request_table(records.sort().requests), "steps": steps}
    if records.copies:
        tables["copies"] = copy_table(records.copies)
    if records.decisions:
        tables[EXPERTS_FILE.removesuffix(".parquet")] = experts_table(records.decisions)
    if records.expert_loads:
        tables[EXPERT_LOADS_FILE.removesuffix(".parquet")] = expert_loads_table(records.expert_loads)
    for name, table in tables.items():
        # With checksums a flipped bit is an error, not another result.
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd", write_page_checksum=True)


def read_run(path: Path) -> Run:
    """Open a run. RunError names what is missing or is not ours."""
    value = read_json(path / "manifest.json", "a run folder, as `replay` and `simulate` write it")
    try:
        manifest = Manifest(**value)
        _refuse_other_manifests(manifest)
        manifest.instance_config()
        manifest.step_time_model()
        manifest.draft_time_model()
        manifest.copy_time_model()
    except (TypeError, ConfigError) as error:
        raise RunError(f"{path / 'manifest.json'}: {error}; accepted: a manifest of format {FORMAT}") from None
    return Run(path, manifest)


def _refuse_other_manifests(manifest: Manifest) -> None:
    """TypeError unless what the readers of a run look up is there."""
    if manifest.format != FORMAT:
        raise TypeError(f"format is {manifest.format}")
    for part in ("instance", "policies", "timing", "hardware", "draft_time", "copy_time"):
        if not isinstance(getattr(manifest, part), dict):
            raise TypeError(f"{part} is no object")
    if "batch" not in manifest.policies:
        raise TypeError("policies has no batch")
    needed: list[tuple[str, Any, str, type]] = [
        *((f"policies.{decides}", value, "name", str) for decides, value in manifest.policies.items()),
        ("model", manifest.model, "vocab_size", int),
        ("workload", manifest.workload, "num_requests", int),
    ]
    if manifest.drafts is not None:
        needed.append(("drafts", manifest.drafts, "methods", list))
    if manifest.expert_layout is not None:
        needed.append(("expert_layout", manifest.expert_layout, "layers", list))
    for part, value, name, kind in needed:
        if not isinstance(value, dict) or not isinstance(value.get(name), kind):
            raise TypeError(f"{part} has no {name}")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends well; nothing is left when it does not.

    Long work goes into the block, so that a folder that cannot be made is refused before it, not after.
    """
    if os.path.lexists(path):
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
    if path.is_dir():
        raise RunError(f"{path}: is a folder; accepted: a file")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it may be why we are here
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, accepted: str) -> dict[str, Any]:
    """A JSON object from a file. RunError says what is accepted."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: is not there; accepted: {accepted}") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}; accepted: {accepted}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read: {error}; accepted: {accepted}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: holds no object; accepted: {accepted}")
    return value


def read_parquet(path: Path, schema: pa.Schema, accepted: str = _FINISHED) -> pa.Table:
    """A Parquet file of these columns. RunError says what is accepted."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise RunError(f"{path}: is not there; accepted: {accepted}") from None
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path}: cannot be read: {error}; accepted: {accepted}") from None
    if not table.schema.equals(schema):
        raise RunError(f"{path}: has other columns; accepted: {', '.join(schema.names)}")
    return table
