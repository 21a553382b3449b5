"""Columns of a run's Parquet files, a bounded number of rows at a time: for runs whose records do not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xllm_lab.errors import RunError
from xllm_lab.records import STEP_SCHEMA
from xllm_lab.step_time import feature_rows

BATCH_ROWS = 16_384


def batches(path: Path, schema: pa.Schema, names: Sequence[str], rows: int = BATCH_ROWS) -> Iterator[dict[str, Any]]:
    """Columns of a Parquet file, at most `rows` rows at a time, `instance` too if it is there.

    RunError names what is wrong with the file.
    """
    accepted = "a Parquet file of a finished run"
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            there = file.schema_arrow
            for name in names:
                if name not in there.names or there.field(name).type != schema.field(name).type:
                    raise RunError(f"{path}: has no column {name} of {schema.field(name).type}; accepted: {accepted}")
            also = [n for n in ("instance",) if n in there.names and n not in names]
            for batch in file.iter_batches(rows, columns=[*names, *also]):
                yield dict(zip(batch.schema.names, batch.columns, strict=True))
    except FileNotFoundError:
        raise RunError(f"{path}: is not there; accepted: {accepted}") from None
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path}: cannot be read: {error}; accepted: {accepted}") from None


def ints(column: Any) -> npt.NDArray[np.int64]:
    """A column of integers, none of them null."""
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.int64)


def instance_of(batch: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Of each row; 0 where the records know of one instance only."""
    return ints(batch["instance"]) if "instance" in batch else np.zeros(len(next(iter(batch.values()))), np.int64)


def step_feature_rows(path: Path) -> Iterator[npt.NDArray[np.float64]]:
    """The factors of `step_time.TERMS` of all steps in a run's `steps.parquet`: parts of shape [steps, terms]."""
    names = ("ids", "num_tokens", "num_computed_tokens", "num_logits", "graph_tokens")
    for batch in batches(path, STEP_SCHEMA, names):
        yield feature_rows(
            ints(pc.list_value_length(batch["ids"])),
            ints(batch["num_tokens"].flatten()),
            ints(batch["num_computed_tokens"].flatten()),
            ints(batch["num_logits"]),
            ints(pc.fill_null(batch["graph_tokens"], 0)),
        )
