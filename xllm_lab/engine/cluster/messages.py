"""What passes between router and engine processes, as plain data and back."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from xllm_lab.copies import CopyRecord
from xllm_lab.expert_records import ExpertLoadRecord, ExpertsRecord
from xllm_lab.formats import own
from xllm_lab.ledger import BlockKey
from xllm_lab.records import FinishReason, Recorder, RequestRecord, steps_of
from xllm_lab.request_state import new_record
from xllm_lab.router import Load
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import Event
from xllm_lab.step import Step
from xllm_lab.workload import Request, RequestId

# Of a request's record, what an engine changes beside its tokens.
_CHANGES = ("cached_tokens", "first_scheduled_us", "num_preemptions", "finish_us", "finish_reason")
_DRAFTS = ("num_drafted", "num_accepted")
# What it has when it is sent to an engine: after a failure, tokens already.
_KEPT = ("cached_tokens", "first_scheduled_us", "num_preemptions", "num_failovers")


def event_cells(event: Event) -> dict[str, Any]:
    """An event as the engine is told of it."""
    request, record = event.request, event.record
    if record is None:
        return {"leaves": request.id}
    kept = {name: getattr(record, name) for name in _KEPT}
    tokens = {"token_times_us": list(record.token_times_us), "output_token_ids": list(record.output_token_ids)}
    drafts = {name: list(getattr(record, name)) for name in _DRAFTS}
    told = {"arrives": own.request_cells(request), "kept": {**kept, **tokens, **drafts}}
    return {**told, "hands_over": True} if event.hands_over else told


def event_from(cells: Mapping[str, Any], known: Mapping[RequestId, Request]) -> Event:
    """Inverse of `event_cells`; `known` are the requests that arrived before."""
    if "leaves" in cells:
        return Event(False, known[RequestId(cells["leaves"])])
    request = own.request_from(cells["arrives"], "router")
    record = new_record(request)
    kept = cells["kept"]
    for name in _KEPT:
        setattr(record, name, kept[name])
    record.token_times_us = array("q", kept["token_times_us"])
    for name in ("output_token_ids", *_DRAFTS):
        setattr(record, name, array("i", kept[name]))
    return Event(True, request, record, hands_over="hands_over" in cells)


class Reporter(Recorder):
    """What an engine did since it said so last."""

    def __init__(self) -> None:
        self._span: Step | None = None
        self._ended: list[RequestRecord] = []
        # Copies that nobody was told of, and those whose ends nobody was told of.
        self._asked: list[CopyRecord] = []
        self._copying: dict[int, CopyRecord] = {}
        self._handed_over: list[tuple[RequestRecord, int]] = []
        # Of live requests: how many tokens were told, and what else.
        self._told: dict[RequestId, tuple[int, list[Any]]] = {}

    def span(self, span: Step) -> None:
        assert self._span is None, "two steps between two reports"
        self._span = span

    def request(self, record: RequestRecord) -> None:
        self._ended.append(record)

    def copy(self, record: CopyRecord) -> None:
        self._asked.append(record)

    def experts(self, record: ExpertsRecord) -> None:
        raise AssertionError("engines of a fleet are one process each, whose experts are not divided")

    def expert_load(self, record: ExpertLoadRecord) -> None:
        raise AssertionError("engines of a fleet are one process each, whose experts are not divided")

    def begins(self, record: RequestRecord) -> None:
        """A request arrived; its tokens so far are known."""
        self._told[record.id] = (len(record.output_token_ids), _changes_of(record))

    def hands_over(self, record: RequestRecord, now_us: int) -> None:
        """A request left with its first token."""
        self._handed_over.append((record, now_us))

    def take(self, scheduler: Scheduler) -> dict[str, Any]:
        """What there is to say; nothing, if nothing was done."""
        said: dict[str, Any] = {}
        touched: dict[RequestId, RequestRecord] = {}
        if self._span is not None:
            (step,) = steps_of(self._span)
            said["step"] = asdict(step)
            ids = (*step.ids, *step.preempted)
            touched = {i: state.record for i in map(RequestId, ids) if (state := scheduler.find(i)) is not None}
        left = [*self._ended, *(record for record, _ in self._handed_over)]
        touched |= {record.id: record for record in left}
        drawn, changed = {}, {}
        for request, record in touched.items():
            num_told, told = self._told[request]
            now = _changes_of(record)
            if len(record.output_token_ids) > num_told:
                drawn[request] = list(record.output_token_ids[num_told:])
            if now != told:
                changed[request] = now
            self._told[request] = (len(record.output_token_ids), now)
        for record in left:
            del self._told[record.id]
        # As pairs: JSON's names are texts.
        said |= {name: list(value.items()) for name, value in (("drawn", drawn), ("changed", changed)) if value}
        if self._ended:
            said["ended"] = [(record.id, record.finish_us) for record in self._ended]
        if self._handed_over:
            said["handed_over"] = [(record.id, us) for record, us in self._handed_over]
        self._span, self._ended, self._handed_over = None, [], []
        return said | self._copied()

    def _copied(self) -> dict[str, Any]:
        """Copies that were asked for, and those that are over."""
        said: dict[str, Any] = {}
        if self._asked:
            said["copies"] = [{**asdict(c), "end_us": None, "num_moved_tokens": None} for c in self._asked]
            self._copying |= {c.copy: c for c in self._asked}
            self._asked = []
        if over := [c for c in self._copying.values() if c.end_us is not None]:
            said["copied"] = [(c.copy, c.end_us, c.num_moved_tokens) for c in over]
            for c in over:
                del self._copying[c.copy]
        return said


def apply_changes(record: RequestRecord, changes: Sequence[Any]) -> None:
    """Have the router's record say what the engine's does."""
    for name, value in zip((*_CHANGES, *_DRAFTS), changes, strict=True):
        if name in _DRAFTS:
            setattr(record, name, array("i", value))
        elif name == "finish_reason":
            record.finish_reason = None if value is None else FinishReason(value)
        else:
            setattr(record, name, value)


class IndexTeller:
    """What an engine's prefix index stored and removed since it said so last."""

    def __init__(self) -> None:
        self._told: frozenset[BlockKey] = frozenset()
        self._version = -1

    def take(self, scheduler: Scheduler) -> dict[str, list[str]]:
        ledger = scheduler.ledger
        if self._version == ledger.version:
            return {}
        now = ledger.keys()
        stored, removed = now - self._told, self._told - now
        self._told, self._version = now, ledger.version
        said = {"stored": stored, "removed": removed}
        return {name: sorted(key.hex() for key in keys) for name, keys in said.items() if keys}


def apply_index(keys: set[BlockKey], said: Mapping[str, Any]) -> None:
    """Have the router's copy of an index say what the engine's does."""
    keys.difference_update(map(bytes.fromhex, said.get("removed", ())))
    keys.update(map(bytes.fromhex, said.get("stored", ())))


def load_cells(scheduler: Scheduler, as_of_us: int) -> list[int | float]:
    """An engine's load, but for its index."""
    return [
        as_of_us,
        scheduler.num_live - scheduler.num_waiting,
        scheduler.num_waiting,
        scheduler.num_outstanding_tokens_after(0),
        scheduler.num_used_blocks_after(0) / scheduler.config.num_kv_blocks,
    ]


def load_from(cells: Sequence[Any]) -> Load:
    """Inverse of `load_cells`; of an index it knows nothing."""
    as_of_us, num_running, num_waiting, num_outstanding_tokens, kv_used_frac = cells
    return Load(as_of_us, num_running, num_waiting, num_outstanding_tokens, kv_used_frac, None)


def _changes_of(record: RequestRecord) -> list[Any]:
    return [*(getattr(record, name) for name in _CHANGES), *(list(getattr(record, name)) for name in _DRAFTS)]
