"""What a run leaves behind: one record per request, one per step. Engine and simulator write the same schema.

Times are integer microseconds since the run's start. A time that never came is `None`.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xllm_lab.copies import CopyRecord
from xllm_lab.expert_records import ExpertLoadRecord, ExpertsRecord
from xllm_lab.policies.api import RequestId
from xllm_lab.step import PageRun, Step, Work


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    LENGTH = "length"  # produced all the tokens it asked for
    STOP = "stop"  # produced a stop token
    CANCELLED = "cancelled"  # its client went away
    REJECTED = "rejected"  # could never run here
    FAILED = "failed"  # its instance failed, and it was given up


def _int64s() -> array[int]:
    return array("q")


def _int32s() -> array[int]:
    return array("i")


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
        instance: which instance of a fleet served it (last).
        num_failovers: how often the instance that served it failed.
        prefill_instance, handed_over_us: which instance drew its first token and handed it over, and when; None if
            nobody did.
        num_drafted, num_accepted: drafts by their position behind the last known token, and those that were kept.
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
    token_times_us: array[int] = field(default_factory=_int64s)
    output_token_ids: array[int] = field(default_factory=_int32s)
    num_preemptions: int = 0
    finish_us: int | None = None
    finish_reason: FinishReason | None = None
    instance: int = 0
    num_failovers: int = 0
    prefill_instance: int | None = None
    handed_over_us: int | None = None
    num_drafted: array[int] = field(default_factory=_int32s)
    num_accepted: array[int] = field(default_factory=_int32s)

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
        step: 0, 1, 2, ... of its instance, without gaps.
        start_us, end_us: [start_us, end_us); steps of an instance never overlap.
        ids, num_tokens, num_computed_tokens: per scheduled request, in packing order: its id, the tokens computed
            in this step, and those already in KV before it (prefix hits included).
        num_logits: rows the model's head was asked for, one per request that draws a token and one per draft.
        admitted: requests that got their first block in this step.
        preempted: requests that lost their KV at its start.
        num_waiting: requests left waiting.
        num_used_blocks, num_idle_blocks: KV blocks in use, and cached but unused, after allocation.
        reason: the policy's word for it.
        instance: which instance of a fleet took it.
        host_us, device_us, gap_us: `step.Work`, where it was measured.
        graph_tokens: size of the captured graph that it ran in, padding included; None: it ran eagerly.
        draft_ids, draft_methods, num_asked, num_drafted, num_accepted: per request that asked for drafts: its id, the
            method, how many it asked for, how many there were (`num_tokens` counts them), and how many were kept.
        draft_us: the host waited so long for drafts, where it was measured; `host_us` counts it.
        page_maps, page_maps_ahead, page_unmaps: of virtual KV, what was mapped before the step, and mapped and unmapped
            while it ran: each run of pages as four numbers, see `step.PageRun`.
        num_reused_pages: pages that it began to need and that were mapped already; None where KV is paged.
        mapped_tokens, table_tokens, kv_tokens: after its plan, tokens that all mapped pages could hold; that those of
            running requests could; and tokens that these have. None where KV is paged.
        map_us: the host waited so long for `page_maps`, where it was measured; `host_us` counts it.
        beside_us: mapping and unmapping beside the step took so long, where it was measured.
        num_copies: between tiers, asked for since the instance began until the step was planned.
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
    instance: int = 0
    host_us: int | None = None
    device_us: int | None = None
    gap_us: int | None = None
    graph_tokens: int | None = None
    draft_ids: list[int] = field(default_factory=list)
    draft_methods: list[str] = field(default_factory=list)
    num_asked: list[int] = field(default_factory=list)
    num_drafted: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    draft_us: int | None = None
    page_maps: list[int] = field(default_factory=list)
    page_maps_ahead: list[int] = field(default_factory=list)
    page_unmaps: list[int] = field(default_factory=list)
    num_reused_pages: int | None = None
    mapped_tokens: int | None = None
    table_tokens: int | None = None
    kv_tokens: int | None = None
    map_us: int | None = None
    beside_us: int | None = None
    num_copies: int = 0

    @property
    def step_us(self) -> int:
        return self.end_us - self.start_us


def steps_of(span: Step) -> Iterable[StepRecord]:
    """One record for a step that is over, and one for each of its repeats."""
    decodes, chunks = span.decodes, span.others
    ids = [*decodes.ids, *(c.id for c in chunks)]
    num_tokens = [1] * len(decodes.ids) + [c.num_tokens for c in chunks]
    start_us = span.start_us
    for k, end_us in enumerate(span.ends_us):
        yield StepRecord(
            step=span.index + k,
            start_us=start_us,
            end_us=end_us,
            ids=list(ids),
            num_tokens=list(num_tokens),
            num_computed_tokens=[
                *(offset + decodes.clock + k for offset in decodes.offsets),
                *(c.num_computed_tokens + c.num_tokens * k for c in chunks),
            ],
            num_logits=span.num_logits,
            admitted=list(span.admitted) if k == 0 else [],
            preempted=list(span.preempted) if k == 0 else [],
            num_waiting=span.num_waiting,
            num_used_blocks=span.used_blocks[k],
            num_idle_blocks=span.idle_blocks[k],
            reason=span.reason,
            instance=span.instance,
            graph_tokens=span.shape.num_tokens,
            draft_ids=[d.id for d in span.drafts],
            draft_methods=[d.method for d in span.drafts],
            num_asked=[d.num_asked for d in span.drafts],
            num_drafted=[len(d.token_ids) for d in span.drafts],
            num_accepted=list(span.num_accepted),
            draft_us=span.draft_us,
            **_pages(span, k),
            num_copies=span.num_copies,
            **({} if span.work is None else span.work._asdict()),
        )
        start_us = end_us


def _pages(span: Step, num_repeats: int) -> dict[str, Any]:
    """The fields of virtual KV, of a step or a repeat of it: that maps nothing, and has as much more in its pages."""
    pages = span.pages
    if pages is None:
        return {}
    is_first = num_repeats == 0
    return {
        "page_maps": flat(pages.maps) if is_first else [],
        "page_maps_ahead": flat(pages.ahead) if is_first else [],
        "page_unmaps": flat(pages.unmaps) if is_first else [],
        "num_reused_pages": pages.num_reused if is_first else 0,
        "mapped_tokens": pages.mapped_tokens,
        "table_tokens": pages.table_tokens,
        "kv_tokens": pages.kv_tokens + num_repeats * span.num_new_tokens,
        "map_us": span.map_us if is_first else None,
        "beside_us": span.beside_us if is_first else None,
    }


def flat(runs: Iterable[PageRun]) -> list[int]:
    """Runs of pages as a record has them."""
    return [*chain.from_iterable(runs)]


def page_runs(numbers: Sequence[int]) -> tuple[PageRun, ...]:
    """Inverse of `flat`."""
    return tuple(PageRun(*numbers[k : k + 4]) for k in range(0, len(numbers), 4))


class Recorder(Protocol):
    """Where a host's records go."""

    def span(self, span: Step) -> None:
        """A step is over, or several alike."""
        ...

    def request(self, record: RequestRecord) -> None: ...
    def copy(self, record: CopyRecord) -> None:
        """A copy between tiers is asked for; its end is filled in when it comes."""
        ...

    def experts(self, record: ExpertsRecord) -> None:
        """Where experts are to lie was decided; what comes of it is filled in when it comes."""
        ...

    def expert_load(self, record: ExpertLoadRecord) -> None:
        """What the slots of experts had to do in some steps."""
        ...


class Records:
    """Records in memory: requests by id once sorted, steps by end, then instance, and the others as they come."""

    __slots__ = ("_num_expanded", "_steps", "copies", "decisions", "expert_loads", "requests", "spans")

    def __init__(
        self,
        requests: list[RequestRecord] | None = None,
        steps: list[StepRecord] | None = None,
        copies: list[CopyRecord] | None = None,
    ) -> None:
        self.decisions: list[ExpertsRecord] = []
        self.expert_loads: list[ExpertLoadRecord] = []
        self.copies: list[CopyRecord] = [] if copies is None else copies
        self.requests: list[RequestRecord] = [] if requests is None else requests
        self._steps: list[StepRecord] = [] if steps is None else steps
        self.spans: list[Step] = []
        self._num_expanded = 0

    @property
    def steps(self) -> list[StepRecord]:
        """Spans become steps when somebody looks."""
        if self._num_expanded < len(self.spans):
            for span in self.spans[self._num_expanded :]:
                self._steps.extend(steps_of(span))
            self._num_expanded = len(self.spans)
            self._steps.sort(key=lambda s: (s.end_us, s.instance))
        return self._steps

    def span(self, span: Step) -> None:
        self.spans.append(span)

    def request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def copy(self, record: CopyRecord) -> None:
        self.copies.append(record)

    def experts(self, record: ExpertsRecord) -> None:
        self.decisions.append(record)

    def expert_load(self, record: ExpertLoadRecord) -> None:
        self.expert_loads.append(record)

    def sort(self) -> Records:
        """Put requests, which end in any order, in order of id."""
        self.requests.sort(key=lambda r: r.id)
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Records):
            return NotImplemented
        mine, others = ((r.requests, r.steps, r.copies, r.decisions) for r in (self, other))
        return mine == others

    __hash__ = None  # type: ignore[assignment]


# Columns of virtual KV.
PAGE_LISTS = ("page_maps", "page_maps_ahead", "page_unmaps")
PAGE_COUNTS = ("num_reused_pages", "mapped_tokens", "table_tokens", "kv_tokens", "map_us", "beside_us")

_INT32S = pa.list_(pa.int32())
_INT64S = pa.list_(pa.int64())

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
        pa.field("token_times_us", _INT64S, nullable=False),
        pa.field("output_token_ids", _INT32S, nullable=False),
        pa.field("num_preemptions", pa.int32(), nullable=False),
        pa.field("finish_us", pa.int64()),
        pa.field("finish_reason", pa.string()),
        pa.field("instance", pa.int32(), nullable=False),
        pa.field("num_failovers", pa.int32(), nullable=False),
        pa.field("prefill_instance", pa.int32()),
        pa.field("handed_over_us", pa.int64()),
        pa.field("num_drafted", _INT32S, nullable=False),
        pa.field("num_accepted", _INT32S, nullable=False),
    ]
)

STEP_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("start_us", pa.int64(), nullable=False),
        pa.field("end_us", pa.int64(), nullable=False),
        pa.field("ids", _INT64S, nullable=False),
        pa.field("num_tokens", _INT32S, nullable=False),
        pa.field("num_computed_tokens", _INT32S, nullable=False),
        pa.field("num_logits", pa.int32(), nullable=False),
        pa.field("admitted", _INT64S, nullable=False),
        pa.field("preempted", _INT64S, nullable=False),
        pa.field("num_waiting", pa.int32(), nullable=False),
        pa.field("num_used_blocks", pa.int32(), nullable=False),
        pa.field("num_idle_blocks", pa.int32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("instance", pa.int32(), nullable=False),
        *(pa.field(name, pa.int64()) for name in (*Work._fields, "graph_tokens")),
        pa.field("draft_ids", _INT64S, nullable=False),
        pa.field("draft_methods", pa.list_(pa.string()), nullable=False),
        *(pa.field(name, _INT32S, nullable=False) for name in ("num_asked", "num_drafted", "num_accepted")),
        pa.field("draft_us", pa.int64()),
        *(pa.field(name, _INT64S, nullable=False) for name in PAGE_LISTS),
        *(pa.field(name, pa.int64()) for name in PAGE_COUNTS),
        pa.field("num_copies", pa.int64(), nullable=False),
    ]
)


COPY_SCHEMA = pa.schema(
    [
        pa.field("copy", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("request", pa.int64()),
        *(pa.field(name, _INT32S, nullable=False) for name in ("blocks", "slots")),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("num_moved_tokens", pa.int64()),
        pa.field("num_held_blocks", pa.int64(), nullable=False),
        pa.field("evicted", _INT32S, nullable=False),
        pa.field("asked_us", pa.int64(), nullable=False),
        pa.field("end_us", pa.int64()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("instance", pa.int32(), nullable=False),
    ]
)

TRANSFER_SCHEMA = pa.schema(
    [
        pa.field("link", pa.string(), nullable=False),
        *(pa.field(n, pa.int64(), nullable=False) for n in ("request", "num_bytes", "queued_us", "start_us", "end_us")),
    ]
)


ROLE_SCHEMA = pa.schema(
    [
        pa.field("us", pa.int64(), nullable=False),
        pa.field("instance", pa.int32(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


class RoleChange(NamedTuple):
    """From when on an instance had a role, until it got the next; before its first it was "mixed"."""

    us: int
    instance: int
    role: str
    reason: str


def role_table(changes: Sequence[RoleChange]) -> pa.Table:
    """In the order given."""
    return pa.Table.from_pylist([c._asdict() for c in changes], schema=ROLE_SCHEMA)


class SentPrompt(Protocol):
    """What went over the link to an instance, [start_us, end_us)."""

    @property
    def link(self) -> int: ...
    @property
    def request(self) -> RequestId: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def queued_us(self) -> int: ...
    @property
    def start_us(self) -> int: ...
    @property
    def end_us(self) -> int: ...


def transfer_table(sent: Sequence[SentPrompt]) -> pa.Table:
    """In the order given."""
    columns: dict[str, Any] = {name: [getattr(t, name) for t in sent] for name in TRANSFER_SCHEMA.names}
    columns["link"] = [f"to instance {t.link}" for t in sent]
    return pa.table(columns, schema=TRANSFER_SCHEMA)


def copy_table(copies: Sequence[CopyRecord]) -> pa.Table:
    """In the order given."""
    assert {f.name for f in fields(CopyRecord)} == set(COPY_SCHEMA.names), "schema and class differ"
    return pa.table({name: [getattr(c, name) for c in copies] for name in COPY_SCHEMA.names}, schema=COPY_SCHEMA)


# Of a request's record, by their type.
_ARRAYS = {"token_times_us": "q", "output_token_ids": "i", "num_drafted": "i", "num_accepted": "i"}


def request_table(requests: Sequence[RequestRecord]) -> pa.Table:
    """Requests in the order given."""
    assert {f.name for f in fields(RequestRecord)} == set(REQUEST_SCHEMA.names), "schema and class differ"
    columns: dict[str, Any] = {
        name: [getattr(row, name) for row in requests] for name in REQUEST_SCHEMA.names if name not in _ARRAYS
    }
    for name, code in _ARRAYS.items():
        columns[name] = _lists([getattr(r, name) for r in requests], np.dtype(np.int64 if code == "q" else np.int32))
    return pa.table({name: columns[name] for name in REQUEST_SCHEMA.names}, schema=REQUEST_SCHEMA)


def step_table(spans: Sequence[Step]) -> pa.Table:
    """One row per step of the spans, in their order."""
    repeats = np.asarray([len(s.ends_us) for s in spans], dtype=np.int64)
    of_span = np.repeat(np.arange(len(spans)), repeats)  # row -> span
    ahead = np.arange(len(of_span)) - np.repeat(np.cumsum(repeats) - repeats, repeats)  # row -> steps before it
    is_first = ahead == 0
    ends = np.asarray([*chain.from_iterable(s.ends_us for s in spans)], dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    starts[is_first] = [s.start_us for s in spans]
    entries = _entries(spans, of_span, ahead)

    def each(name: str) -> npt.NDArray[Any]:
        return np.asarray([getattr(s, name) for s in spans])[of_span]

    columns = {
        "step": each("index") + ahead,
        "start_us": starts,
        "end_us": ends,
        **entries,
        "num_logits": each("num_logits"),
        "admitted": _first_only([s.admitted for s in spans], is_first),
        "preempted": _first_only([s.preempted for s in spans], is_first),
        "num_waiting": each("num_waiting"),
        "num_used_blocks": [*chain.from_iterable(s.used_blocks for s in spans)],
        "num_idle_blocks": [*chain.from_iterable(s.idle_blocks for s in spans)],
        "reason": pa.DictionaryArray.from_arrays(of_span, [s.reason for s in spans]).cast(pa.string()),
        "instance": each("instance"),
        **{name: _nullable(_measured(spans, name), of_span) for name in Work._fields},
        "graph_tokens": _nullable([s.shape.num_tokens for s in spans], of_span),
        "draft_us": _nullable([s.draft_us for s in spans], of_span),
        **_draft_columns(spans, of_span),
        **_page_columns(spans, of_span, ahead, is_first),
        "num_copies": each("num_copies"),
    }
    return pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in STEP_SCHEMA}, schema=STEP_SCHEMA)


def table_of_steps(steps: Sequence[StepRecord]) -> pa.Table:
    """One row per step in the order given, for steps that come from a table and not from spans."""
    assert {f.name for f in fields(StepRecord)} == set(STEP_SCHEMA.names), "schema and class differ"
    columns = {name: [getattr(step, name) for step in steps] for name in STEP_SCHEMA.names}
    return pa.table(columns, schema=STEP_SCHEMA)


def records_from(requests: pa.Table, steps: pa.Table, copies: pa.Table | None = None) -> Records:
    """The records in tables of our schemas, requests in order of id, steps in order of end, copies as asked for."""
    rows = [_request_from(row) for row in requests.to_pylist()]
    ordered = sorted((StepRecord(**row) for row in steps.to_pylist()), key=lambda s: (s.end_us, s.instance))
    copied = [] if copies is None else [CopyRecord(**row) for row in copies.to_pylist()]
    return Records(rows, ordered, copied).sort()


def _request_from(row: dict[str, Any]) -> RequestRecord:
    reason = row["finish_reason"] and FinishReason(row["finish_reason"])
    arrays = {name: array(code, row[name]) for name, code in _ARRAYS.items()}
    return RequestRecord(**{**row, "finish_reason": reason, **arrays})


def _entries(
    spans: Sequence[Step], of_span: npt.NDArray[np.int64], ahead: npt.NDArray[np.int64]
) -> dict[str, pa.ListArray]:
    """The per-request columns: those of each span's first step, repeated, growing by their tokens per step."""
    num_decodes = np.asarray([len(s.decodes.ids) for s in spans], dtype=np.int64)
    num_chunks = np.asarray([len(s.others) for s in spans], dtype=np.int64)
    sizes = num_decodes + num_chunks
    first = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    is_decode = np.zeros(total, dtype=np.bool_)
    is_decode[_ranges(first, num_decodes)] = True
    ids, tokens, computed = (np.ones(total, dtype=np.int64) for _ in range(3))
    ids[is_decode] = [*chain.from_iterable(s.decodes.ids for s in spans)]
    offsets = np.asarray([*chain.from_iterable(s.decodes.offsets for s in spans)], dtype=np.int64)
    computed[is_decode] = offsets + np.repeat([s.decodes.clock for s in spans], num_decodes)
    chunks = np.asarray([c for s in spans for c in s.others], dtype=np.int64).reshape(-1, 4)
    ids[~is_decode], tokens[~is_decode], computed[~is_decode] = chunks[:, 0], chunks[:, 1], chunks[:, 2]
    per_row = sizes[of_span]
    source = _ranges(first[of_span], per_row)
    grown = computed[source] + np.repeat(ahead, per_row) * tokens[source]
    bounds = np.concatenate([[0], np.cumsum(per_row)]).astype(np.int32)
    return {
        "ids": pa.ListArray.from_arrays(bounds, pa.array(ids[source])),
        "num_tokens": pa.ListArray.from_arrays(bounds, pa.array(tokens[source], type=pa.int32())),
        "num_computed_tokens": pa.ListArray.from_arrays(bounds, pa.array(grown, type=pa.int32())),
    }


def _draft_columns(spans: Sequence[Step], of_span: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    """Of each step its drafts; a step with any is not repeated."""
    columns = {
        "draft_ids": (_INT64S, [[d.id for d in s.drafts] for s in spans]),
        "draft_methods": (pa.list_(pa.string()), [[d.method for d in s.drafts] for s in spans]),
        "num_asked": (_INT32S, [[d.num_asked for d in s.drafts] for s in spans]),
        "num_drafted": (_INT32S, [[len(d.token_ids) for d in s.drafts] for s in spans]),
        "num_accepted": (_INT32S, [s.num_accepted for s in spans]),
    }
    rows = pa.array(of_span)
    return {name: pa.array(lists, type=kind).take(rows) for name, (kind, lists) in columns.items()}


def _page_columns(
    spans: Sequence[Step], of_span: npt.NDArray[np.int64], ahead: npt.NDArray[np.int64], is_first: npt.NDArray[np.bool_]
) -> dict[str, pa.Array]:
    if all(s.pages is None for s in spans):
        nobody: list[list[int]] = [[]] * len(spans)
        columns = {name: _first_only(nobody, is_first) for name in PAGE_LISTS}
        return columns | {name: pa.nulls(len(of_span), pa.int64()) for name in PAGE_COUNTS}
    rows = [_pages(spans[s], k) for s, k in zip(of_span.tolist(), ahead.tolist(), strict=True)]
    made = {name: pa.array([row.get(name, []) for row in rows], type=_INT64S) for name in PAGE_LISTS}
    return made | {name: pa.array([row.get(name) for row in rows], type=pa.int64()) for name in PAGE_COUNTS}


def _measured(spans: Sequence[Step], name: str) -> list[int | None]:
    return [None if s.work is None else getattr(s.work, name) for s in spans]


def _nullable(values: list[int | None], of_span: npt.NDArray[np.int64]) -> pa.Array:
    return pa.array(values, type=pa.int64()).take(pa.array(of_span))


def _ranges(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[starts[0], starts[0] + lengths[0]), then the next range, and so on, in one array."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _first_only(values: Sequence[Sequence[int]], is_first: npt.NDArray[np.bool_]) -> pa.ListArray:
    lengths = np.zeros(len(is_first), dtype=np.int64)
    lengths[is_first] = [len(v) for v in values]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(bounds, pa.array([*chain.from_iterable(values)], type=pa.int64()))


def _lists(values: Sequence[array[int]], dtype: np.dtype[Any]) -> pa.ListArray:
    bounds = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int32)
    flat = np.concatenate([np.asarray(v, dtype=dtype) for v in values]) if values else np.empty(0, dtype=dtype)
    return pa.ListArray.from_arrays(bounds, pa.array(flat))
