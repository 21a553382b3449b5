"""Folders of CSV files that msServiceProfiler writes about a serving engine, MindIE or vLLM.

batch.csv      every scheduled and every executed batch; what `StepSample`s are made of
forward.csv    every forward pass, and the idle time before it
request.csv    every request: lengths and latencies; the lengths of prompts for batches that only name their requests
kvcache.csv    KV blocks in use over time

Two generations of names and units are read, told apart by the header: CANN 8.1 and 8.2 write microseconds and
`BatchSchedule`, later releases milliseconds and `batchFrameworkProcessing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from xllm_lab.errors import ProfileError
from xllm_lab.profiles.profile import BatchRow, ForwardRow, Profile, RequestRow
from xllm_lab.profiles.sources._csv import LATEST_CLOCK_NS, LONGEST_REQUEST_NS, LONGEST_STEP_NS, CsvFile
from xllm_lab.profiles.sources._ms_batches import events, executed
from xllm_lab.profiles.sources._tally import Unused

NAME = "msserviceprofiler"
HOLDS = "a folder of msServiceProfiler with batch.csv, forward.csv, request.csv or kvcache.csv"

_BATCH, _FORWARD, _REQUEST, _KVCACHE = "batch.csv", "forward.csv", "request.csv", "kvcache.csv"
_FILES = (_BATCH, _FORWARD, _REQUEST, _KVCACHE)
# An execution contains its forward pass; one that is this much shorter cannot.
_SHORT_FRAC = 0.8


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
        rows = list(events(there[_BATCH], unused))
        batches = tuple(executed(rows, there[_BATCH], unused))
        blocks += [_Blocks(e.row.used_blocks, e.num_blocks) for e in rows]
    if _KVCACHE in there:
        blocks += _kvcache(there[_KVCACHE])
    forwards = tuple(_forwards(there[_FORWARD])) if _FORWARD in there else ()
    requests = tuple(_requests(there[_REQUEST], unused)) if _REQUEST in there else ()
    notes += _unawaited(batches, forwards)
    return Profile(
        source=NAME,
        path=path,
        num_steps=len(batches),
        batches=batches,
        forwards=forwards,
        requests=requests,
        peak_used_blocks=max((b.used for b in blocks if b.used is not None), default=None),
        num_blocks=max((b.total for b in blocks if b.total is not None), default=None),
        units={f"{name}: {column}": unit for name, file in there.items() for column, unit in file.units.items()},
        left_out=unused.rows(),
        notes=tuple(notes),
    )


def _unread_columns(file: CsvFile) -> list[str]:
    """Columns of data-parallel ranks (`dp0-rid`, `dp0-size`, `dp0-forward(ms)`), and latencies without a unit."""
    names = [n for n in file.header if (n.startswith("dp") and "-" in n) or n == "first_token_latency"]
    return [f"{file.path.name}: columns not used: {', '.join(names)}"] if names else []


def _unawaited(batches: tuple[BatchRow, ...], forwards: tuple[ForwardRow, ...]) -> list[str]:
    """An engine that schedules ahead hands a batch over and goes on: its executions end before the model does."""
    if not batches or not forwards:
        return []
    executed_us = sum(batch.step_us for batch in batches) / len(batches)
    forward_us = sum(forward.step_us for forward in forwards) / len(forwards)
    if executed_us >= _SHORT_FRAC * forward_us:
        return []
    means = f"{executed_us:.0f} us in the mean, a forward pass {forward_us:.0f} us"
    return [f"{_BATCH}: an executed batch lasts {means}; the engine did not wait for it, so these are no step times"]


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
    first, start = file.maybe_time("first_token_latency"), file.maybe_time("start_time", "start_time_httpReq")
    for row in file.rows():
        prompt_tokens, output_tokens = row.maybe_count(prompt), row.maybe_count(output)
        total_ns = row.maybe_ns(total, most=LONGEST_REQUEST_NS)
        if prompt_tokens is None or output_tokens is None or total_ns is None:
            unused.add(_REQUEST, "a request that did not end within the recording", total_ns or 0)
            continue
        queue_ns, first_ns = (row.maybe_ns(column, most=LONGEST_REQUEST_NS) for column in (queue, first))
        start_ns = row.maybe_ns(start, most=LATEST_CLOCK_NS)
        yield RequestRow(
            request=row.text(request),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            arrival_us=None if start_ns is None else start_ns // 1000,
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
