"""batch.csv of msServiceProfiler: rows about batches scheduled and executed, and what they say about each other.

The row of a scheduled batch has its tokens and the KV blocks in use; its duration is the scheduler's. The row of an
executed batch, `modelExec`, has the time that the step took, once for each device. Both list their requests, and no
other batch has the same requests in the same iterations.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xllm_lab.profiles.profile import BatchRow, SequencePart
from xllm_lab.profiles.sources._csv import LATEST_CLOCK_NS, LONGEST_STEP_NS, Column, CsvFile, Row, TimeColumn
from xllm_lab.profiles.sources._tally import Unused

_SCHEDULED = ("batchFrameworkProcessing", "BatchSchedule", "Schedule")
_EXECUTED = "modelExec"
# Time stamps are cut to whole milliseconds, so a duration and its ends differ by up to two; a wrong unit by a factor
# of 1000.
_STAMP_NS = 2_000_000
_WRONG_UNIT = 100

_NONE = re.compile(r"(?<=: )None(?=[,}])")


@dataclass(frozen=True, slots=True)
class Event:
    """A row of batch.csv, of a batch scheduled or executed."""

    row: BatchRow
    is_executed: bool
    domain: str  # data-parallel rank
    device: str
    start_ns: int
    ns: int
    num_blocks: int | None

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


def events(file: CsvFile, unused: Unused) -> Iterator[Event]:
    columns = _BatchColumns.of(file)
    for row in file.rows():
        name = row.text(columns.name)
        if not all(row.text(column) for column in (columns.start, columns.end, columns.duration)):
            unused.add(file.path.name, f"{name} without a start, an end or a duration")
            continue
        ns = row.ns(columns.duration, most=LONGEST_STEP_NS)
        start_ns = row.ns(columns.start, most=LATEST_CLOCK_NS)
        _check_ends(row, columns, start_ns, ns)
        if name not in (*_SCHEDULED, _EXECUTED):
            unused.add(file.path.name, f"{name} is no execution of the model", ns)
        elif name == _EXECUTED and ns == 0:
            unused.add(file.path.name, "an execution that took no time")
        else:
            yield Event(
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
        counts = _counts_by_type(row, columns, len(parts))
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


def _counts_by_type(row: Row, columns: _BatchColumns, num_parts: int) -> list[int | None]:
    """A batch of decodes alone has a token a request; of others the type and the size do not say the tokens.

    MindIE's size is requests, vLLM's executed batch says tokens, which are more where tokens are speculated.
    """
    size = row.maybe_count(columns.size)
    if size and row.text(columns.type).lower() == "decode":
        num_seqs = num_parts or size
        return [0, 0, num_seqs, max(size, num_seqs)]
    return [None] * 4


def _parts(row: Row, column: Column | None) -> Iterator[SequencePart]:
    if column is None or not row.text(column):
        return
    accepted = "a list of requests such as [{'rid': '7', 'iter': 3}]"
    try:
        listed = _literal(row.text(column))
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


def _literal(text: str) -> object:
    """The Python literal in `text`; ten times as fast where it is JSON but for its quotes and its None."""
    if '"' not in text and "\\" not in text:
        try:
            return json.loads(_NONE.sub("null", text.replace("'", '"')))
        except ValueError:
            pass
    return ast.literal_eval(text)


_PART_NUMBERS = {
    "iteration": "iter",
    "num_tokens": "num_scheduled_tokens",
    "num_computed_tokens": "num_computed_tokens",
    "prompt_tokens": "num_prompt_tokens",
}


def _part(request: str, numbers: dict[str, Any], type: object) -> SequencePart:
    return SequencePart(request=request, is_prefill=type == 0 if type in (0, 1) else None, **numbers)


def executed(events: Sequence[Event], file: CsvFile, unused: Unused) -> Iterator[BatchRow]:
    """Each executed batch once, with what its scheduling said about it."""
    plans: dict[Any, list[Event]] = {}
    for event in sorted((e for e in events if not e.is_executed), key=_when):
        plans.setdefault((event.domain, event.requests or event.row.line), []).append(event)
    for runs in _same_batch(events, file, unused):
        slowest = max(runs, key=lambda event: event.ns)
        for event in runs:
            if event is not slowest:
                unused.add(file.path.name, "the same batch on another device; the slowest counts", event.ns)
        # A scheduler outside the data-parallel ranks has no rank.
        waiting = plans.get((slowest.domain, slowest.requests)) or plans.get(("", slowest.requests))
        yield _completed(slowest.row, waiting.pop(0) if waiting else None)
    for left in plans.values():
        for event in left:
            unused.add(file.path.name, "a scheduled batch that no execution names", event.ns)


def _when(event: Event) -> tuple[int, int]:
    return event.start_ns, event.row.line


def _same_batch(events: Sequence[Event], file: CsvFile, unused: Unused) -> Iterator[list[Event]]:
    """Executions of one batch on all its devices, batches in order of time."""
    runs = sorted((e for e in events if e.is_executed), key=_when)
    first_device: dict[str, str] = {}
    for event in runs:
        first_device[event.domain] = min(event.device, first_device.get(event.domain, event.device))
    batches: dict[Any, list[Event]] = {}
    seen: Counter[Any] = Counter()
    for event in runs:
        if event.row.parts:
            # A prompt in several chunks may keep its iteration: twice on one device are two batches.
            own = (event.domain, event.device, event.requests)
            batches.setdefault((event.domain, event.requests, seen[own]), []).append(event)
            seen[own] += 1
        elif event.device == first_device[event.domain]:
            batches[event.row.line] = [event]
        else:
            # Without its requests nothing says which rows of two devices are one batch.
            unused.add(file.path.name, "no res_list, and another device of its rank has the same batches", event.ns)
    yield from batches.values()


def _completed(row: BatchRow, scheduled: Event | None) -> BatchRow:
    if scheduled is None:
        return row
    said = scheduled.row
    if said.num_decodes is not None or said.num_prefills is not None:
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
