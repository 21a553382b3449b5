"""What a run leaves behind: one record per request, one per step. Engine and simulator write the same schema.

Times are integer microseconds since the run's start. A time that never came is `None`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import pyarrow as pa

from xllm_lab.policies.api import RequestId


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    LENGTH = "length"  # produced all the tokens it asked for
    STOP = "stop"  # produced a stop token
    CANCELLED = "cancelled"  # its client went away
    REJECTED = "rejected"  # could never run here


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """The life of one request.

    Attributes:
        prompt_tokens: length of the prompt.
        cached_tokens: prompt tokens that the prefix cache supplied when it was first admitted.
        first_scheduled_us: start of the first step that computed one of its tokens.
        token_times_us: when each output token was there; the end of the step that drew it.
        output_token_ids: the tokens; in a simulated run placeholders, which no two requests share.
        num_preemptions: how often it lost its KV.
        finish_us: when it ended, for whatever reason.
    """

    id: RequestId
    arrival_us: int
    prompt_tokens: int
    priority: int
    ttft_slo_us: int | None
    tpot_slo_us: int | None
    e2e_slo_us: int | None
    cached_tokens: int = 0
    first_scheduled_us: int | None = None
    token_times_us: list[int] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    finish_us: int | None = None
    finish_reason: FinishReason | None = None

    @property
    def output_tokens(self) -> int:
        return len(self.token_times_us)

    @property
    def first_token_us(self) -> int | None:
        return self.token_times_us[0] if self.token_times_us else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step: what was decided, and how long it took.

    Attributes:
        step: 0, 1, 2, ... without gaps.
        start_us, end_us: [start_us, end_us); steps never overlap.
        ids, num_tokens, num_computed_tokens: per scheduled request, in packing order: its id, the tokens computed
            in this step, and those already in KV before it (prefix hits included).
        num_logits: rows the model's head was asked for, one per request that draws a token.
        admitted: requests that got their first block in this step.
        preempted: requests that lost their KV at its start.
        num_waiting: requests left waiting.
        num_used_blocks, num_idle_blocks: KV blocks in use, and cached but unused, after allocation.
        reason: the policy's word for it.
    """

    step: int
    start_us: int
    end_us: int
    ids: list[int]
    num_tokens: list[int]
    num_computed_tokens: list[int]
    num_logits: int
    admitted: list[int]
    preempted: list[int]
    num_waiting: int
    num_used_blocks: int
    num_idle_blocks: int
    reason: str

    @property
    def step_us(self) -> int:
        return self.end_us - self.start_us


class Recorder(Protocol):
    """Where a host's records go."""

    def step(self, record: StepRecord) -> None: ...
    def request(self, record: RequestRecord) -> None: ...


@dataclass(slots=True)
class Records:
    """Records in memory: requests in order of id once sorted, steps in order."""

    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def sort(self) -> Records:
        """Put requests, which end in any order, in order of id."""
        self.requests.sort(key=lambda r: r.id)
        return self


_IDS = pa.list_(pa.int32())

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("arrival_us", pa.int64(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("priority", pa.int8(), nullable=False),
        pa.field("ttft_slo_us", pa.int64()),
        pa.field("tpot_slo_us", pa.int64()),
        pa.field("e2e_slo_us", pa.int64()),
        pa.field("cached_tokens", pa.int32(), nullable=False),
        pa.field("first_scheduled_us", pa.int64()),
        pa.field("token_times_us", pa.list_(pa.int64()), nullable=False),
        pa.field("output_token_ids", _IDS, nullable=False),
        pa.field("num_preemptions", pa.int32(), nullable=False),
        pa.field("finish_us", pa.int64()),
        pa.field("finish_reason", pa.string()),
    ]
)

STEP_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("start_us", pa.int64(), nullable=False),
        pa.field("end_us", pa.int64(), nullable=False),
        pa.field("ids", pa.list_(pa.int64()), nullable=False),
        pa.field("num_tokens", _IDS, nullable=False),
        pa.field("num_computed_tokens", _IDS, nullable=False),
        pa.field("num_logits", pa.int32(), nullable=False),
        pa.field("admitted", pa.list_(pa.int64()), nullable=False),
        pa.field("preempted", pa.list_(pa.int64()), nullable=False),
        pa.field("num_waiting", pa.int32(), nullable=False),
        pa.field("num_used_blocks", pa.int32(), nullable=False),
        pa.field("num_idle_blocks", pa.int32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


def request_table(records: Records) -> pa.Table:
    return _table(records.requests, RequestRecord, REQUEST_SCHEMA)


def step_table(records: Records) -> pa.Table:
    return _table(records.steps, StepRecord, STEP_SCHEMA)


def records_from(requests: pa.Table, steps: pa.Table) -> Records:
    """The records in two tables of our schemas."""
    rows = [
        RequestRecord(**{**row, "finish_reason": row["finish_reason"] and FinishReason(row["finish_reason"])})
        for row in requests.to_pylist()
    ]
    return Records(rows, [StepRecord(**row) for row in steps.to_pylist()])


def _table(rows: list[Any], cls: type[Any], schema: pa.Schema) -> pa.Table:
    assert {f.name for f in fields(cls)} == set(schema.names), "schema and class differ"
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    return pa.table(columns, schema=schema)
