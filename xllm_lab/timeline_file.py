"""A timeline of a run, engine or simulated, for https://ui.perfetto.dev: requests, steps, KV use and links as tracks.

instance 0          steps       a slice per step: its policy's reason, batch and tokens
                    KV blocks used, KV blocks idle, waiting, running        counters
                    requests    a slice per request, in it what it was doing, packed into lanes
links               a slice per transfer, in it its time in the queue and on the wire
roles               of each instance, a slice as long as it had a role
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from xllm_lab.columns import BATCH_ROWS, batches, instance_of, ints
from xllm_lab.errors import RunError
from xllm_lab.lives import DECODE, PHASES, PREFILL, Lives, lanes, read_lives
from xllm_lab.perfetto import Ints, Label, Sink, Slices, TraceWriter, Word
from xllm_lab.records import ROLE_SCHEMA, STEP_SCHEMA, TRANSFER_SCHEMA
from xllm_lab.run_writer import ROLES_FILE
from xllm_lab.runs import Run, new_file, read_parquet

COUNTERS = ("KV blocks used", "KV blocks idle", "waiting", "running")
_GZIP_LEVEL = 6


def write_timeline(run: Run, out: Path) -> Path:
    """Write the timeline of a run, gzipped as Perfetto reads it; a file that exists is replaced. Returns its path.

    The steps pass through in batches: memory grows with the requests only.

    Raises:
        RunError: the run's files are not whole or not possible, or the file cannot be written.
    """
    lives = read_lives(run.path)
    expected = run.manifest.workload["num_requests"]
    if len(lives.id) != expected:
        found = f"holds {len(lives.id)} requests, manifest.json says {expected}"
        raise RunError(f"{run.path / 'requests.parquet'}: {found}")
    with (
        new_file(out) as partial,
        partial.open("wb") as raw,
        # Without name and time in its header, the same run gives the same bytes.
        gzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=raw, mtime=0) as file,
    ):
        _write(file, run.path, lives)
    return out


def _write(file: Sink, folder: Path, lives: Lives) -> None:
    writer = TraceWriter(file)
    instances: dict[int, _Instance] = {}
    for batch in _step_batches(folder / "steps.parquet"):
        for instance in np.unique(batch.instance).tolist():
            if instance not in instances:
                instances[instance] = _Instance(writer, instance, lives)
            instances[instance].write(batch.of(batch.instance == instance), folder / "steps.parquet")
    for instance in np.unique(lives.instance).tolist():
        tracks = instances.get(instance) or _Instance(writer, instance, lives)
        _write_requests(writer, tracks.process, lives, np.flatnonzero(lives.instance == instance))
    last = max((*instances, *lives.instance.tolist()))
    if (folder / "transfers.parquet").exists():
        _write_links(writer, folder / "transfers.parquet", pid=2 + last)
    if (folder / ROLES_FILE).exists():
        _write_roles(writer, folder / ROLES_FILE, int(lives.end_us.max()), pid=3 + last)


class _Steps(NamedTuple):
    """Columns of some steps, shape [steps], and their chunks as one line, shape [chunks]."""

    instance: Ints
    step: Ints
    start_us: Ints
    end_us: Ints
    num_seqs: Ints
    num_tokens: Ints
    decode_tokens: Ints
    num_logits: Ints
    num_admitted: Ints
    num_preempted: Ints
    num_waiting: Ints
    num_used_blocks: Ints
    num_idle_blocks: Ints
    drafted_tokens: Ints
    accepted_tokens: Ints
    draft_us: Ints
    reason: Any

    def of(self, rows: Any) -> _Steps:
        return _Steps(*(column[rows] for column in self))


def _step_batches(path: Path) -> Iterator[_Steps]:
    for batch in batches(path, STEP_SCHEMA, [n for n in STEP_SCHEMA.names if n != "instance"]):
        num_seqs = ints(pc.list_value_length(batch["ids"]))
        of_step = np.repeat(np.arange(len(num_seqs)), num_seqs)
        new = ints(batch["num_tokens"].flatten())
        if len(new) != len(of_step):
            raise RunError(f"{path}: ids and num_tokens have different lengths; accepted: a number for each id")
        tokens = np.bincount(of_step, new, len(num_seqs)).astype(np.int64)
        drafted, of_draft = _listed(batch["num_drafted"])
        # Who verifies drafts decodes one token beside them.
        verifies = np.bincount(of_draft, drafted > 0, len(num_seqs)).astype(np.int64)
        decodes = np.bincount(of_step, new == 1, len(num_seqs)).astype(np.int64) + verifies
        yield _Steps(
            instance=instance_of(batch),
            num_seqs=num_seqs,
            num_tokens=tokens,
            decode_tokens=decodes,
            num_admitted=ints(pc.list_value_length(batch["admitted"])),
            num_preempted=ints(pc.list_value_length(batch["preempted"])),
            drafted_tokens=np.bincount(of_draft, drafted, len(num_seqs)).astype(np.int64),
            accepted_tokens=_sums(batch["num_accepted"]),
            draft_us=ints(pc.fill_null(batch["draft_us"], 0)),
            reason=np.asarray(batch["reason"].to_pylist(), dtype=np.str_),
            **{
                name: ints(batch[name])
                for name in (
                    *("step", "start_us", "end_us", "num_logits"),
                    *("num_waiting", "num_used_blocks", "num_idle_blocks"),
                )
            },
        )


def _listed(column: Any) -> tuple[Ints, Ints]:
    """Numbers of a column of lists in one line, and the row of each."""
    lengths = ints(pc.list_value_length(column))
    return ints(column.flatten()), np.repeat(np.arange(len(lengths)), lengths)


def _sums(column: Any) -> Ints:
    values, of_row = _listed(column)
    return np.bincount(of_row, values, len(column)).astype(np.int64)


class _Instance:
    """The tracks of one instance's steps and counters, and where they stand."""

    def __init__(self, writer: TraceWriter, instance: int, lives: Lives) -> None:
        self._writer = writer
        self.process = writer.process(f"instance {instance}", pid=1 + instance)
        self._steps = writer.track("steps", self.process, 0)
        self._counters = [writer.track(name, self.process, 1 + k, is_counter=True) for k, name in enumerate(COUNTERS)]
        self._last = [-1] * len(COUNTERS)
        self._end_us = 0
        phases = lives.phases
        holds = (lives.instance_of_phases() == instance) & ((phases.kind == PREFILL) | (phases.kind == DECODE))
        self._got_kv_us = np.sort(phases.start_us[holds])
        self._lost_kv_us = np.sort(phases.end_us[holds])

    def write(self, steps: _Steps, path: Path) -> None:
        """Slices and counters of the next steps of the instance."""
        before = np.concatenate(([self._end_us], steps.end_us[:-1]))
        for row in np.flatnonzero((steps.start_us < before) | (steps.end_us <= steps.start_us)):
            told = f"step {steps.step[row]} is from {steps.start_us[row]} to {steps.end_us[row]} us"
            raise RunError(f"{path}: {told}, the one before it ended at {before[row]}; accepted: one after the other")
        self._end_us = int(steps.end_us[-1])
        arguments = {
            "step": steps.step,
            "sequences": steps.num_seqs,
            "prefill_tokens": steps.num_tokens - steps.decode_tokens - steps.drafted_tokens,
            "decode_tokens": steps.decode_tokens,
            "num_logits": steps.num_logits,
            "admitted": steps.num_admitted,
            "preempted": steps.num_preempted,
        }
        if steps.drafted_tokens.any() or steps.draft_us.any():
            names_of_drafts = ("drafted_tokens", "accepted_tokens", "draft_us")
            arguments |= {name: getattr(steps, name) for name in names_of_drafts}
        names, which = np.unique(steps.reason, return_inverse=True)
        iids = np.asarray([self._writer.name(name or "step") for name in names.tolist()], dtype=np.int64)
        self._writer.flat_slices(self._steps, steps.start_us, steps.end_us, iids[which], arguments)
        self._count(steps)

    def _count(self, steps: _Steps) -> None:
        """Counters hold from the start of a step; what empties by its end is 0 from there."""
        both = np.column_stack((steps.start_us, steps.end_us)).ravel()
        running = self._running(both)
        used = np.column_stack((steps.num_used_blocks, np.where(running[1::2] == 0, 0, steps.num_used_blocks))).ravel()
        samples = (
            (both, used),
            (steps.start_us, steps.num_idle_blocks),
            (steps.start_us, steps.num_waiting),
            (both, running),
        )
        for k, (at_us, value) in enumerate(samples):
            is_news = np.diff(value, prepend=self._last[k]) != 0
            self._last[k] = int(value[-1])
            self._writer.counter(self._counters[k], at_us[is_news], value[is_news])

    def _running(self, at_us: Ints) -> Ints:
        """Requests that hold KV at these times."""
        got = np.searchsorted(self._got_kv_us, at_us, side="right")
        return (got - np.searchsorted(self._lost_kv_us, at_us, side="right")).astype(np.int64)


def _write_requests(writer: TraceWriter, process: int, lives: Lives, rows: Ints) -> None:
    """The requests of one instance, `rows` of `lives`, in order of arrival."""
    heading = writer.track("requests", process, 1 + len(COUNTERS))
    lane = lanes(lives.arrival_us[rows], lives.end_us[rows])
    tracks = np.asarray([writer.track(f"requests {k}", heading, k) for k in range(int(lane.max()) + 1)], np.int64)
    phase_names = np.asarray([writer.name(phase) for phase in PHASES], dtype=np.int64)
    reasons, reason = np.unique(lives.reason[rows], return_inverse=True)
    words = np.asarray([writer.word(word) for word in reasons.tolist()], dtype=np.int64)
    num_digits = len(str(int(lives.id.max())))
    for first in range(0, len(rows), BATCH_ROWS):
        some = rows[first : first + BATCH_ROWS]
        low, high = np.searchsorted(lives.phases.of, [some[0], some[-1] + 1])
        phases = lives.phases
        writer.slices(
            Slices(
                track=tracks[lane[first : first + BATCH_ROWS]],
                start_us=lives.arrival_us[some],
                end_us=lives.end_us[some],
                name=Label("request ", lives.id[some], num_digits),
                arguments={
                    "request": lives.id[some],
                    "prompt_tokens": lives.prompt_tokens[some],
                    "cached_tokens": lives.cached_tokens[some],
                    "output_tokens": lives.output_tokens[some],
                    "num_preemptions": lives.num_preemptions[some],
                    "finish_reason": Word(words[reason[first : first + BATCH_ROWS]]),
                },
                part_of=phases.of[low:high] - some[0],
                part_name=phase_names[phases.kind[low:high]],
                part_start_us=phases.start_us[low:high],
                part_end_us=phases.end_us[low:high],
            )
        )


def _write_roles(writer: TraceWriter, path: Path, end_us: int, *, pid: int) -> None:
    """A role lasts until the next one, or to the end of the run."""
    columns = read_parquet(path, ROLE_SCHEMA).to_pydict()
    at_us, instance = (np.asarray(columns[name], dtype=np.int64) for name in ("us", "instance"))
    names = np.asarray([writer.name(role) for role in columns["role"]], dtype=np.int64)
    process = writer.process("roles", pid)
    for rank, one in enumerate(np.unique(instance).tolist()):
        track = writer.track(f"role of instance {one}", process, rank)
        own = instance == one
        ends = np.append(at_us[own][1:], max(end_us, int(at_us[own][-1])))
        writer.flat_slices(track, at_us[own], ends, names[own], {"instance": instance[own]})


def _write_links(writer: TraceWriter, path: Path, *, pid: int) -> None:
    """A lane and more for each link: transfers that share or wait for it overlap."""
    read = list(batches(path, TRANSFER_SCHEMA, TRANSFER_SCHEMA.names))
    if not read:
        return
    names = np.concatenate([np.asarray(b["link"].to_pylist(), dtype=np.str_) for b in read])
    request, num_bytes, queued, start, end = (
        np.concatenate([ints(b[name]) for b in read]) for name in TRANSFER_SCHEMA.names[1:]
    )
    for row in np.flatnonzero((queued < 0) | (start < queued) | (end < start) | (num_bytes < 0) | (request < 0)):
        told = f"row {row} is queued at {queued[row]}, starts at {start[row]} and ends at {end[row]} us"
        raise RunError(f"{path}: {told}; accepted: these in order, and no number below 0")
    process = writer.process("links", pid)
    phases = np.asarray([writer.name("queued"), writer.name("transfer")], dtype=np.int64)
    num_digits = len(str(int(request.max())))
    for rank, link in enumerate(np.unique(names).tolist()):
        rows = np.flatnonzero(names == link)
        rows = rows[np.lexsort((end[rows], queued[rows]))]
        heading = writer.track(link, process, rank)
        lane = lanes(queued[rows], end[rows])
        tracks = np.asarray([writer.track(f"{link} {k}", heading, k) for k in range(int(lane.max()) + 1)], np.int64)
        part_of = np.repeat(np.arange(len(rows)), 2)
        part_start = np.column_stack((queued[rows], start[rows])).ravel()
        part_end = np.column_stack((start[rows], end[rows])).ravel()
        there = part_end > part_start
        writer.slices(
            Slices(
                track=tracks[lane],
                start_us=queued[rows],
                end_us=end[rows],
                name=Label("request ", request[rows], num_digits),
                arguments={"request": request[rows], "num_bytes": num_bytes[rows]},
                part_of=part_of[there],
                part_name=np.tile(phases, len(rows))[there],
                part_start_us=part_start[there],
                part_end_us=part_end[there],
            )
        )
