"""The lives of a run's requests as columns: when each arrived, waited, computed, lost its KV, and ended.

Read from the records batch by batch: what stays in memory is a few numbers per request and per preemption, never the
steps or the tokens.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from xllm_lab.columns import batches, instance_of, ints
from xllm_lab.errors import RunError
from xllm_lab.perfetto import Ints
from xllm_lab.records import REQUEST_SCHEMA, STEP_SCHEMA

WAITING, PREFILL, DECODE, PREEMPTED = range(4)
PHASES = ("waiting", "prefill", "decode", "preempted")
_NEVER = np.iinfo(np.int64).max


class Phases(NamedTuple):
    """What requests were doing, columns of shape [phases], in order of (request, time); none is empty.

    Attributes:
        of: index of the request.
        kind: index into `PHASES`.
    """

    of: Ints
    kind: Ints
    start_us: Ints
    end_us: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives:
    """Columns of shape [requests], in order of (instance, arrival, id).

    Attributes:
        instance: that served the request; 0 where the records know of one only.
        prefill_instance, handed_over_us: that served it first, and up to when; where it was not handed over, 0.
        reason: why the request ended.
    """

    id: Ints
    instance: Ints
    prefill_instance: Ints
    handed_over_us: Ints
    arrival_us: Ints
    end_us: Ints
    prompt_tokens: Ints
    cached_tokens: Ints
    output_tokens: Ints
    num_preemptions: Ints
    reason: npt.NDArray[np.str_]
    phases: Phases

    def instance_of_phases(self) -> Ints:
        """Where requests were meanwhile, shape [phases]."""
        of = self.phases.of
        was_before = self.phases.start_us < self.handed_over_us[of]
        return np.where(was_before, self.prefill_instance[of], self.instance[of])


def read_lives(folder: Path) -> Lives:
    """The lives in a run's folder. RunError names what is missing or cannot be."""
    columns: dict[str, list[npt.NDArray[Any]]] = defaultdict(list)
    token_times_us: dict[int, list[int]] = {}
    names = [n for n in REQUEST_SCHEMA.names if n not in ("instance", "output_token_ids")]
    path = folder / "requests.parquet"
    for batch in batches(path, REQUEST_SCHEMA, names):
        times = batch["token_times_us"]
        for name in ("id", "arrival_us", "prompt_tokens", "cached_tokens", "num_preemptions"):
            columns[name].append(ints(batch[name]))
        columns["instance"].append(instance_of(batch))
        for name in ("prefill_instance", "handed_over_us"):
            columns[name].append(ints(batch[name].fill_null(0)))
        columns["first_scheduled_us"].append(ints(batch["first_scheduled_us"].fill_null(_NEVER)))
        columns["first_token_us"].append(_first_of_each(times))
        columns["end_us"].append(ints(batch["finish_us"].fill_null(_NEVER)))
        columns["output_tokens"].append(ints(pc.list_value_length(times)))
        columns["reason"].append(np.asarray(batch["finish_reason"].fill_null("unfinished").to_pylist(), dtype=np.str_))
        for row in np.flatnonzero(columns["num_preemptions"][-1]).tolist():
            token_times_us[batch["id"][row].as_py()] = times[row].as_py()
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    if not table:
        raise RunError(f"{path}: holds no requests; accepted: a run of at least one")
    order = np.lexsort((table["id"], table["arrival_us"], table["instance"]))
    table = {name: column[order] for name, column in table.items()}
    _refuse_impossible(path, table)
    kv_lost = _kv_lost(folder / "steps.parquet", token_times_us)
    phases = _phases(table, kv_lost, token_times_us)
    del table["first_scheduled_us"], table["first_token_us"]
    return Lives(**table, phases=phases)


def lanes(start_us: Ints, end_us: Ints) -> Ints:
    """A lane for each interval, shape [intervals], so that no two on a lane overlap; as few lanes as can be.

    The intervals come in order of start. The lowest free lane is taken, so that quiet times use the first lanes.
    """
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    taken = np.empty(len(start_us), dtype=np.int64)
    for k, (start, end) in enumerate(zip(start_us.tolist(), end_us.tolist(), strict=True)):
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        taken[k] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end, int(taken[k])))
    return taken


def _first_of_each(lists: Any) -> Ints:
    """The first element of each list of a column; `_NEVER` of an empty one."""
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy()
    first = np.full(len(lists), _NEVER, dtype=np.int64)
    is_there = offsets[1:] > offsets[:-1]
    first[is_there] = values[offsets[:-1][is_there]]
    return first


def _refuse_impossible(path: Path, table: dict[str, npt.NDArray[Any]]) -> None:
    """Close what never ended, and refuse what ended before it came."""
    is_open = table["end_us"] == _NEVER
    known = [table[n][table[n] != _NEVER] for n in ("arrival_us", "first_scheduled_us", "first_token_us", "end_us")]
    table["end_us"] = np.where(is_open, max(int(k.max(initial=0)) for k in known), table["end_us"])
    for row in np.flatnonzero((table["end_us"] < table["arrival_us"]) | (table["arrival_us"] < 0)):
        told = (
            f"request {table['id'][row]} arrived at {table['arrival_us'][row]} us and ended at {table['end_us'][row]}"
        )
        raise RunError(f"{path}: {told}; accepted: an arrival at 0 or later, and an end after it")
    if len(np.unique(table["id"])) != len(table["id"]):
        raise RunError(f"{path}: ids of requests repeat; accepted: one record of each")


class _Change(NamedTuple):
    """A request lost its KV, or was admitted again."""

    at_us: int
    is_admission: bool


def _kv_lost(path: Path, preempted: Mapping[int, Any]) -> dict[int, list[_Change]]:
    """When each of the `preempted` requests lost its KV and was admitted, in order."""
    changes: dict[int, list[_Change]] = {request: [] for request in preempted}
    if not preempted:
        return changes
    ids = np.asarray(sorted(preempted), dtype=np.int64)
    for batch in batches(path, STEP_SCHEMA, ("start_us", "admitted", "preempted")):
        start_us = ints(batch["start_us"])
        found = []
        # Within a step requests lose their KV before others, or they themselves, are admitted.
        for is_admission, name in enumerate(("preempted", "admitted")):
            lists = batch[name]
            rows = np.repeat(np.arange(len(lists)), ints(pc.list_value_length(lists)))
            flat = ints(lists.flatten())
            ours = np.isin(flat, ids)
            found += [(row, is_admission, i) for row, i in zip(rows[ours].tolist(), flat[ours].tolist(), strict=True)]
        for row, is_admission, request in sorted(found):
            changes[request].append(_Change(int(start_us[row]), bool(is_admission)))
    # Steps of several instances may come one instance after the other.
    return {request: sorted(found) for request, found in changes.items()}


def _phases(
    table: dict[str, npt.NDArray[Any]], kv_lost: dict[int, list[_Change]], token_times_us: dict[int, list[int]]
) -> Phases:
    """Of every request, from its arrival to its end without gaps."""
    arrival, end = table["arrival_us"], table["end_us"]
    scheduled = np.clip(table["first_scheduled_us"], arrival, end)
    first_token = np.clip(table["first_token_us"], scheduled, end)
    index = np.arange(len(arrival))
    is_simple = ~np.isin(table["id"], np.asarray(sorted(kv_lost), dtype=np.int64))
    of, kind, start, stop = ([] for _ in range(4))
    for which, starts, stops in (
        (WAITING, arrival, scheduled),
        (PREFILL, scheduled, first_token),
        (DECODE, first_token, end),
    ):
        there = is_simple & (stops > starts)
        of.append(index[there])
        kind.append(np.full(len(of[-1]), which))
        start.append(starts[there])
        stop.append(stops[there])
    for k in np.flatnonzero(~is_simple).tolist():
        request = int(table["id"][k])
        pieces = _pieces(int(arrival[k]), int(end[k]), kv_lost[request], token_times_us[request])
        of.append(np.full(len(pieces), k))
        kind.append(np.asarray([p[0] for p in pieces], dtype=np.int64))
        start.append(np.asarray([p[1] for p in pieces], dtype=np.int64))
        stop.append(np.asarray([p[2] for p in pieces], dtype=np.int64))
    columns = [np.concatenate(c).astype(np.int64) for c in (of, kind, start, stop)]
    order = np.lexsort((columns[2], columns[0]))
    return Phases(*(c[order] for c in columns))


def _pieces(
    arrival_us: int, end_us: int, changes: Sequence[_Change], token_times_us: Sequence[int]
) -> list[tuple[int, int, int]]:
    """(kind, start, end) of one request's phases: what `changes` say, and prefill up to the next token."""
    pieces = []
    since, kind = arrival_us, WAITING
    for at_us, is_admission in (*changes, _Change(end_us, False)):
        until = min(max(at_us, since), end_us)
        if kind == PREFILL:
            later = bisect_right(token_times_us, since)
            drawn = min(token_times_us[later], until) if later < len(token_times_us) else until
            pieces += [(PREFILL, since, drawn), (DECODE, drawn, until)]
        else:
            pieces.append((kind, since, until))
        since, kind = until, PREFILL if is_admission else PREEMPTED
    return [p for p in pieces if p[2] > p[1]]
