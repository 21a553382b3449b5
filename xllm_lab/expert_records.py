"""What a run with divided experts leaves behind: its decisions on where experts lie, and what each slot had to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

EXPERTS_FILE, EXPERT_LOADS_FILE = "experts.parquet", "expert_loads.parquet"

Counts = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class ExpertsRecord:
    """One decision of an experts policy, and what became of it; times are None while they have not come.

    Attributes:
        decision: 0, 1, 2, ... of its instance.
        decided_us: when the policy was asked; copying begins then, if anything changes.
        layers: that change; none if experts stay where they are.
        slots: of each of those layers, one after another, the expert in each slot.
        num_moved_slots: that get other weights, `copied_bytes` of them.
        ready_us: from when on every device had its weights.
        active_step, active_us: the first step that ran so, and its start.
        dropped_us: when the change was given up: some device was not ready in time.
    """

    decision: int
    decided_us: int
    reason: str
    layers: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    num_moved_slots: int = 0
    copied_bytes: int = 0
    ready_us: int | None = None
    active_step: int | None = None
    active_us: int | None = None
    dropped_us: int | None = None
    instance: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertLoadRecord:
    """What the slots had to do in some steps, all of which ran with the experts in the same places.

    Attributes:
        end_us: of the last of these steps.
        placement: how often the experts had been put elsewhere before.
        slot_tokens_LP: of each layer with experts, and of each slot of all devices.
    """

    end_us: int
    num_steps: int
    placement: int
    slot_tokens_LP: Counts  # noqa: N815
    instance: int = 0


_INT64S = pa.list_(pa.int64())

EXPERTS_SCHEMA = pa.schema(
    [
        pa.field("decision", pa.int64(), nullable=False),
        pa.field("decided_us", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("layers", _INT64S, nullable=False),
        pa.field("slots", _INT64S, nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("num_moved_slots", "copied_bytes")),
        *(pa.field(name, pa.int64()) for name in ("ready_us", "active_step", "active_us", "dropped_us")),
        pa.field("instance", pa.int32(), nullable=False),
    ]
)
# How many slots each layer has, and which layers there are, the manifest says.
EXPERT_LOADS_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.int64(), nullable=False) for name in ("end_us", "num_steps", "placement")),
        pa.field("num_layers", pa.int32(), nullable=False),
        pa.field("slot_tokens", _INT64S, nullable=False),
        pa.field("instance", pa.int32(), nullable=False),
    ]
)


def experts_table(decisions: Sequence[ExpertsRecord]) -> pa.Table:
    """In the order given."""
    assert {f.name for f in fields(ExpertsRecord)} == set(EXPERTS_SCHEMA.names), "schema and class differ"
    columns = {name: [getattr(d, name) for d in decisions] for name in EXPERTS_SCHEMA.names}
    return pa.table(columns, schema=EXPERTS_SCHEMA)


def expert_loads_table(loads: Sequence[ExpertLoadRecord]) -> pa.Table:
    """In the order given."""
    rows = [
        {
            "end_us": load.end_us,
            "num_steps": load.num_steps,
            "placement": load.placement,
            "num_layers": len(load.slot_tokens_LP),
            "slot_tokens": load.slot_tokens_LP.ravel().tolist(),
            "instance": load.instance,
        }
        for load in loads
    ]
    return pa.Table.from_pylist(rows, schema=EXPERT_LOADS_SCHEMA)


def decisions_from(table: pa.Table) -> list[ExpertsRecord]:
    """Inverse of `experts_table`."""
    return [ExpertsRecord(**row) for row in table.to_pylist()]


def expert_loads_from(table: pa.Table) -> list[ExpertLoadRecord]:
    """Inverse of `expert_loads_table`."""
    return [_load_from(row) for row in table.to_pylist()]


def _load_from(row: dict[str, Any]) -> ExpertLoadRecord:
    tokens_LP = np.asarray(row.pop("slot_tokens"), np.int64).reshape(row.pop("num_layers"), -1)
    return ExpertLoadRecord(**row, slot_tokens_LP=tokens_LP)
