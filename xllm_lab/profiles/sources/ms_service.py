"""Folders of CSV files that msServiceProfiler writes about a serving engine, MindIE or vLLM.

batch.csv      every scheduled and every executed batch; what `StepSample`s are made of
forward.csv    every forward pass, and the idle time before it
request.csv    every request: lengths and latencies; the lengths of prompts for batches that only name their requests
kvcache.csv    KV blocks in use over time

Two generations of names and units are read, told apart by the header: CANN 8.1 and 8.2 write microseconds and
`BatchSchedule`, later releases milliseconds and `batchFrameworkProcessing`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from xllm_lab.errors import ProfileError
from xllm_lab.profiles.profile import BatchRow, ForwardRow, Profile, RequestRow, SequencePart
from xllm_lab.profiles.sources._csv import (
    LATEST_CLOCK_NS,
    LONGEST_REQUEST_NS,
    LONGEST_STEP_NS,
    Column,
    CsvFile,
    Row,
    TimeColumn,
)
from xllm_lab.profiles.sources._tally import Unused

NAME = "ms-service"
HOLDS = "a folder of msServiceProfiler with batch.csv, forward.csv, request.csv or kvcache.csv"

_BATCH, _FORWARD, _REQUEST, _KVCACHE = "batch.csv", "forward.csv", "request.csv", "kvcache.csv"
_FILES = (_BATCH, _FORWARD, _REQUEST, _KVCACHE)
_SCHEDULED = ("batchFrameworkProcessing", "BatchSchedule", "Schedule")
_EXECUTED = "modelExec"
# Time stamps are cut to whole milliseconds, so a duration and its ends differ by up to two; a wrong unit by a factor
# of 1000.
_STAMP_NS = 2_000_000
_WRONG_UNIT = 100


def recognises(path: Path) -> bool:
    """Whether one of the files is here."""
    return any((path / name).is_file() for name in _FILES)


def read(path: Path) -> Profile:
    """The profile in a folder; ProfileError names file and line of what cannot be read."""
    there = {name: CsvFile(path / name) for name in _FILES if (path / name).is_file()}
    if not there:
        raise ProfileError(f"{path}: has none of {', '.join(_FILES)}; {HOLDS} is accepted")
    unused = Unused()
    notes = [f"{name} is not there" for name in _FILES if name not in there]
    notes += [note for name in (_BATCH, _REQUEST) if name in there for note in _unread_columns(there[name])]
    batches: tuple[BatchRow, ...] = ()
    blocks: list[_Blocks] = []
    if _BATCH in there:
        events = list(_events(there[_BATCH], unused))
        batches = tuple(_executed(events, unused))
        blocks += [_Blocks(e.used_blocks, e.num_blocks) for e in events]
    if _KVCACHE in there:
        blocks += _kvcache(there[_KVCACHE])
    return Profile(
        source=NAME,
        path=path,
        num_steps=len(batches),
        batches=batches,
        forwards=tuple(_forwards(there[_FORWARD])) if _FORWARD in there else (),
        requests=tuple(_requests(there[_REQUEST], unused)) if _REQUEST in there else (),
        peak_used_blocks=max((b.used for b in blocks if b.used is not None), default=None),
        num_blocks=max((b.total for b in blocks if b.total is not None), default=None),
        left_out=unused.rows(),
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _Event:
    """A row of batch.csv, of a batch scheduled or executed."""

    row: BatchRow
    is_executed: bool
    domain: str  # data-parallel rank
    device: str
    start_ns: int
    ns: int
    num_blocks: int | None

    @property
    def used_blocks(self) -> int | None:
        return self.row.used_blocks

    @property
    def requests(self) -> frozenset[tuple[str, int | None]]:
        """What rows about one batch have in common: no other has these requests in these iterations."""
        return frozenset((part.request, part.iteration) for part in self.row.parts)


@dataclass(frozen=True, slots=True)
class _BatchColumns:
    """The columns of batch.csv, whichever release wrote it."""

    name: Column
    start: TimeColumn
    end: TimeColumn
    duration: TimeColumn
    parts: Column | None
    type: Column | None
    size: Column | None
    prefills: Column | None
    decodes: Column | None
    prefill_tokens: Column | None
    decode_tokens: Column | None
    used: Column | None
    total: Column | None
    domain: Column | None
    device: Column | None

    @classmethod
    def of(cls, file: CsvFile) -> _BatchColumns:
        return cls(
            name=file.column("name"),
            start=file.time("start_time"),
            end=file.time("end_time"),
            duration=file.time("during_time"),
            parts=file.maybe("res_list"),
            type=file.maybe("batch_type"),
            size=file.maybe("batch_size"),
            prefills=file.maybe("prefill_batch_size", "Prefill_batch_size"),
            decodes=file.maybe("decode_batch_size", "Decode_batch_size"),
            prefill_tokens=file.maybe("prefill_scheduled_tokens", "Prefill_scheduled_tokens"),
            decode_tokens=file.maybe("decode_scheduled_tokens", "Decode_scheduled_tokens"),
            used=file.maybe("used_blocks"),
            total=file.maybe("total_blocks"),
            domain=file.maybe("dp_rank"),
            device=file.maybe("prof_id"),
        )


def _events(file: CsvFile, unused: Unused) -> Iterator[_Event]:
    columns = _BatchColumns.of(file)
    for row in file.rows():
        name = row.text(columns.name)
        if not all(row.text(column) for column in (columns.start, columns.end, columns.duration)):
            unused.add(_BATCH, f"{name} without a start, an end or a duration")
            continue
        ns = row.ns(columns.duration, most=LONGEST_STEP_NS)
        start_ns = row.ns(columns.start, most=LATEST_CLOCK_NS)
        _check_ends(row, columns, start_ns, ns)
        if name not in (*_SCHEDULED, _EXECUTED):
            unused.add(_BATCH, f"{name} is no execution of the model", ns)
        elif name == _EXECUTED and ns == 0:
            unused.add(_BATCH, "an execution that took no time")
        else:
            yield _Event(
                row=_batch_row(row, columns, ns),
                is_executed=name == _EXECUTED,
                domain=row.text(columns.domain),
                device=row.text(columns.device),
                start_ns=start_ns,
                ns=ns,
                num_blocks=row.maybe_count(columns.total),
            )


def _check_ends(row: Row, columns: _BatchColumns, start_ns: int, ns: int) -> None:
    end_ns = row.ns(columns.end, most=LATEST_CLOCK_NS)
    if end_ns < start_ns:
        raise row.refusal(columns.end, f"a time not before {columns.start.name}")
    short, long = sorted((ns, end_ns - start_ns))
    if long > _WRONG_UNIT * (short + _STAMP_NS):
        accepted = f"the {(end_ns - start_ns) / columns.duration.unit_ns:g} from its start to its end"
        raise row.refusal(columns.duration, f"{accepted}, or another unit in the header,")


def _batch_row(row: Row, columns: _BatchColumns, ns: int) -> BatchRow:
    parts = tuple(_parts(row, columns.parts))
    counts = [
        row.maybe_count(column)
        for column in (columns.prefills, columns.prefill_tokens, columns.decodes, columns.decode_tokens)
    ]
    if not any(counts):
        # Zeros stand in rows whose requests were not told apart as well.
        counts = _counts_by_type(row, columns)
    return BatchRow(
        line=row.line,
        step_us=ns / 1e3,
        parts=parts,
        num_prefills=counts[0],
        prefill_tokens=counts[1],
        num_decodes=counts[2],
        decode_tokens=counts[3],
        used_blocks=row.maybe_count(columns.used),
    )


def _counts_by_type(row: Row, columns: _BatchColumns) -> list[int | None]:
    """A batch of decodes alone has a token a request; of others the type and the size do not say the tokens."""
    size = row.maybe_count(columns.size)
    if size and row.text(columns.type).lower() == "decode":
        return [0, 0, size, size]
    return [None] * 4


def _parts(row: Row, column: Column | None) -> Iterator[SequencePart]:
    if column is None or not row.text(column):
        return
    accepted = "a list of requests such as [{'rid': '7', 'iter': 3}]"
    try:
        listed = ast.literal_eval(row.text(column))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise row.refusal(column, accepted) from None
    if not isinstance(listed, list):
        raise row.refusal(column, accepted)
    for item in listed:
        entry = item if isinstance(item, dict) else {"rid": item}
        if "rid" not in entry:
            raise row.refusal(column, accepted)
        numbers = {name: entry.get(key) for name, key in _PART_NUMBERS.items()}
        if not all(n is None or (type(n) is int and n >= 0) for n in numbers.values()):
            raise row.refusal(column, accepted)
        yield _part(str(entry["rid"]), numbers, entry.get("type"))


_PART_NUMBERS = {
    "iteration": "iter",
    "num_tokens": "num_scheduled_tokens",
    "num_computed_tokens": "num_computed_tokens",
    "prompt_tokens": "num_prompt_tokens",
}


def _part(request: str, numbers: dict[str, Any], type: object) -> SequencePart:
    return SequencePart(request=request, is_prefill=type == 0 if type in (0, 1) else None, **numbers)


def _executed(events: list[_Event], unused: Unused) -> Iterator[BatchRow]:
    """Each executed batch once, with what its scheduling said about it."""
    scheduled = {(e.domain, e.requests): e for e in events if not e.is_executed and e.row.parts}
    named: set[int] = set()  # lines of scheduled batches that were executed
    for runs in _same_batch(events, unused):
        slowest = max(runs, key=lambda event: event.ns)
        for event in runs:
            if event is not slowest:
                unused.add(_BATCH, "the same batch on another device; the slowest counts", event.ns)
        # A scheduler outside the data-parallel ranks has no rank.
        plan = scheduled.get((slowest.domain, slowest.requests)) or scheduled.get(("", slowest.requests))
        if plan is not None:
            named.add(plan.row.line)
        yield _completed(slowest.row, plan)
    for event in events:
        if not event.is_executed and event.row.line not in named:
            unused.add(_BATCH, "a scheduled batch that no execution names", event.ns)


def _same_batch(events: Iterable[_Event], unused: Unused) -> Iterator[list[_Event]]:
    """Executions of one batch on all its devices, batches in order of the file."""
    executed = [event for event in events if event.is_executed]
    first_device: dict[str, str] = {}
    for event in executed:
        first_device[event.domain] = min(event.device, first_device.get(event.domain, event.device))
    batches: dict[Any, list[_Event]] = {}
    seen: Counter[Any] = Counter()
    for event in executed:
        if event.row.parts:
            # A prompt in several chunks may keep its iteration: twice on one device are two batches.
            own = (event.domain, event.device, event.requests)
            batches.setdefault((event.domain, event.requests, seen[own]), []).append(event)
            seen[own] += 1
        elif event.device == first_device[event.domain]:
            batches[event.row.line] = [event]
        else:
            # Without its requests nothing says which rows of two devices are one batch.
            unused.add(_BATCH, "no res_list, and another device of its rank has the same batches", event.ns)
    yield from batches.values()


def _completed(row: BatchRow, scheduled: _Event | None) -> BatchRow:
    if scheduled is None:
        return row
    said = scheduled.row
    if row.num_decodes is None and row.num_prefills is None:
        row = replace(
            row,
            num_prefills=said.num_prefills,
            prefill_tokens=said.prefill_tokens,
            num_decodes=said.num_decodes,
            decode_tokens=said.decode_tokens,
        )
    if any(part.num_tokens is None for part in row.parts):
        row = replace(row, parts=said.parts)
    return row if row.used_blocks is not None else replace(row, used_blocks=said.used_blocks)


def _unread_columns(file: CsvFile) -> list[str]:
    """Columns of data-parallel ranks (`dp0-rid`, `dp0-size`, `dp0-forward(ms)`), and latencies without a unit."""
    names = [n for n in file.header if (n.startswith("dp") and "-" in n) or n == "first_token_latency"]
    return [f"{file.path.name}: columns not used: {', '.join(names)}"] if names else []


def _forwards(file: CsvFile) -> Iterator[ForwardRow]:
    duration, idle = file.time("during_time"), file.maybe_time("bubble_time")
    type, size = file.maybe("batch_type"), file.maybe("batch_size")
    for row in file.rows():
        idle_ns = row.maybe_ns(idle, most=LONGEST_REQUEST_NS)
        yield ForwardRow(
            step_us=row.ns(duration, most=LONGEST_STEP_NS) / 1e3,
            idle_us=None if idle_ns is None else idle_ns / 1e3,
            batch_type=row.text(type),
            num_seqs=row.maybe_count(size),
        )


def _requests(file: CsvFile, unused: Unused) -> Iterator[RequestRow]:
    request, prompt, output = file.column("http_rid"), file.column("recv_token_size"), file.column("reply_token_size")
    total, queue = file.time("execution_time"), file.maybe_time("queue_wait_time")
    first = file.maybe_time("first_token_latency")
    for row in file.rows():
        prompt_tokens, output_tokens = row.maybe_count(prompt), row.maybe_count(output)
        total_ns = row.maybe_ns(total, most=LONGEST_REQUEST_NS)
        if prompt_tokens is None or output_tokens is None or total_ns is None:
            unused.add(_REQUEST, "a request that did not end within the recording", total_ns or 0)
            continue
        queue_ns, first_ns = (row.maybe_ns(column, most=LONGEST_REQUEST_NS) for column in (queue, first))
        yield RequestRow(
            request=row.text(request),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            e2e_us=total_ns / 1e3,
            queue_us=None if queue_ns is None else queue_ns / 1e3,
            ttft_us=None if first_ns is None else first_ns / 1e3,
        )


class _Blocks(NamedTuple):
    """KV blocks at one time."""

    used: int | None
    total: int | None


def _kvcache(file: CsvFile) -> list[_Blocks]:
    """MindIE writes only what is left, from which nothing follows about what is used."""
    used, total, left = file.maybe("used_blocks"), file.maybe("total_blocks"), file.maybe("device_kvcache_left")
    if used is None and left is None:
        file.column("used_blocks", "device_kvcache_left")
    return [_Blocks(row.maybe_count(used), row.maybe_count(total)) for row in file.rows()]
