"""A timeline: valid by the format's rules, and all of the run and nothing else is in it."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.perfetto_trace import PerfettoTrace, Slice, message
from tests.small_runs import (
    STEP_TIME,
    WildDrafts,
    batch_policies,
    busy_workloads,
    instance_config,
    request,
    run,
    run_audited,
    tight_configs,
)
from tests.tiny_loop import said, tiny_loop
from xllm_lab.columns import BATCH_ROWS
from xllm_lab.errors import RunError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.lives import lanes
from xllm_lab.perfetto import Fields, Label, TraceWriter, encode
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import (
    REQUEST_SCHEMA,
    STEP_SCHEMA,
    TRANSFER_SCHEMA,
    FinishReason,
    Records,
    request_table,
    table_of_steps,
)
from xllm_lab.runs import Manifest, Run, describe, read_run, write_run
from xllm_lab.timeline_file import write_timeline
from xllm_lab.workload import Workload

US = 1000


def ran(folder: Path, workload: Workload, config: InstanceConfig, policy: BatchPolicy) -> Run:
    """A run folder of the workload, served in simulated time."""
    records = run(workload, config, policy)
    told = describe(config, Policies(policy), STEP_TIME, workload)
    manifest = Manifest(host="simulator", timing={}, model={"vocab_size": 1000}, **told)
    return write_run(folder / "run", manifest, workload, records)


def crowded() -> Workload:
    """Preemptions, a client that leaves while it waits, one that leaves while it runs, and a request too large."""
    return Workload(
        requests=(
            *(request(k, 3 * k, prompt=11, output=12) for k in range(5)),
            request(70, 16, prompt=9, output=30, cancel_us=40),
            request(71, 0, prompt=11, output=30, cancel_us=55),
            request(72, 20, prompt=9000),
            request(100, 5000, prompt=4, output=1),
        )
    )


@pytest.fixture
def crowded_run(tmp_path: Path) -> Run:
    return ran(tmp_path, crowded(), instance_config(num_kv_blocks=12), DecodeFirst())


def timeline(presented: Run) -> PerfettoTrace:
    return PerfettoTrace(write_timeline(presented, presented.path.parent / "timeline"))


def request_slices(trace: PerfettoTrace, instance: int = 0) -> dict[int, Slice]:
    """Every request's slice by its id."""
    heading = trace.named("requests", trace.named(f"instance {instance}"))
    found = [s for lane in trace.children(heading) for s in lane.slices]
    by_id = {int(s.arguments["request"]): s for s in found}
    assert len(by_id) == len(found), "a request is shown twice"
    return by_id


def value_at(samples: list[tuple[int, int]], at_ns: int) -> int:
    return [value for ns, value in samples if ns <= at_ns][-1]


def tells_of(trace: PerfettoTrace, records: Records) -> None:
    """AssertionError unless the timeline of one instance is its records."""
    process = trace.named("instance 0")
    steps = trace.named("steps", process).slices if records.steps else []
    assert [(s.start_ns, s.end_ns, s.arguments["step"]) for s in steps] == [
        (r.start_us * US, r.end_us * US, r.step) for r in records.steps
    ]
    for shown, step in zip(steps, records.steps, strict=True):
        told = shown.arguments
        assert (shown.name, told["sequences"], told["num_logits"]) == (step.reason, len(step.ids), step.num_logits)
        drafts = [d for d in step.num_drafted if d]
        computed = int(told["prefill_tokens"]) + int(told["decode_tokens"])
        assert computed + sum(drafts) == sum(step.num_tokens)
        assert told["decode_tokens"] == step.num_tokens.count(1) + len(drafts)
        shown_drafts = tuple(told.get(name, 0) for name in ("drafted_tokens", "accepted_tokens", "draft_us"))
        assert shown_drafts == (sum(drafts), sum(step.num_accepted), step.draft_us or 0)
        assert (told["admitted"], told["preempted"]) == (len(step.admitted), len(step.preempted))
        counted = (("KV blocks used", step.num_used_blocks), ("KV blocks idle", step.num_idle_blocks))
        for name, value in (*counted, ("waiting", step.num_waiting)):
            assert value_at(trace.named(name, process).samples, step.start_us * US) == value, f"{name} at {step}"
    shown_requests = request_slices(trace)
    assert set(shown_requests) == {r.id for r in records.requests}
    for record in records.requests:
        tells_of_request(shown_requests[record.id], record.id, records)
    running_is_who_holds_kv(trace, records)


def tells_of_request(shown: Slice, request_id: int, records: Records) -> None:
    """Its phases tile its life, and each starts and ends where the records say."""
    record = next(r for r in records.requests if r.id == request_id)
    assert record.finish_us is not None
    assert (shown.start_ns, shown.end_ns) == (record.arrival_us * US, record.finish_us * US)
    assert shown.name == f"request {record.id:0{len(str(max(r.id for r in records.requests)))}d}"
    told = shown.arguments
    assert (told["prompt_tokens"], told["output_tokens"]) == (record.prompt_tokens, record.output_tokens)
    assert (told["cached_tokens"], told["num_preemptions"]) == (record.cached_tokens, record.num_preemptions)
    assert told["finish_reason"] == record.finish_reason
    at_ns = shown.start_ns
    for phase in shown.inside:
        assert phase.start_ns == at_ns < phase.end_ns, f"{phase} leaves a gap, or is none"
        assert not phase.inside
        at_ns = phase.end_ns
    assert at_ns == shown.end_ns
    lost = [s.start_us * US for s in records.steps for i in s.preempted if i == request_id]
    admitted = [s.start_us * US for s in records.steps for i in s.admitted if i == request_id]
    names = Counter(phase.name for phase in shown.inside)
    assert names["waiting"] == (shown.start_ns < min([*admitted, shown.end_ns]))
    for phase in shown.inside:
        if phase.name == "preempted":
            assert phase.start_ns in lost
            assert phase.end_ns in (*admitted, shown.end_ns)
        elif phase.name == "prefill":
            assert phase.start_ns in admitted
            assert phase.end_ns in (*(t * US for t in record.token_times_us), *lost, shown.end_ns)
        elif phase.name == "decode":
            assert phase.start_ns in [t * US for t in record.token_times_us]
            assert phase.end_ns in (*lost, shown.end_ns)
    drawn_in = [p for p in shown.inside if p.name in ("prefill", "decode")]
    for t in record.token_times_us:
        assert any(p.start_ns < t * US <= p.end_ns for p in drawn_in), f"a token at {t} outside {drawn_in}"


def running_is_who_holds_kv(trace: PerfettoTrace, records: Records) -> None:
    """Counted by hand, step by step."""
    samples = trace.named("running", trace.named("instance 0")).samples if records.steps else []
    finish_us = {int(r.id): r.finish_us for r in records.requests}
    holding: set[int] = set()
    for step in records.steps:
        holding = {i for i in holding - set(step.preempted) if (finish_us[i] or 0) > step.start_us} | set(step.admitted)
        assert value_at(samples, step.start_us * US) == len(holding), f"step {step.step}"


def test_steps_with_drafts_tell_them(tmp_path: Path) -> None:
    """How many there were, how many were kept, and what drafting took; rows of drafts are no prompts."""
    workload = replace(crowded(), requests=tuple(r for r in crowded().requests if r.cancel_us is None))
    where = instance_config(num_kv_blocks=12)
    records = run_audited(workload, where, DecodeFirst(), draft=WildDrafts())
    for span in records.spans:
        span.draft_us = 7 + span.index if span.drafts else None
    told = describe(where, Policies(DecodeFirst()), STEP_TIME, workload)
    manifest = Manifest(host="engine", timing={}, model={"vocab_size": 1000}, **told)
    tells_of(timeline(write_run(tmp_path / "run", manifest, workload, records)), records)
    assert any(sum(s.num_accepted) for s in records.steps)


def test_a_run_with_preemption_and_cancellation_is_all_there(crowded_run: Run) -> None:
    """And each kind of phase, or the test would prove little."""
    records = crowded_run.records
    reasons = {r.finish_reason for r in records.requests}
    assert reasons == {FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.REJECTED}
    assert any(r.num_preemptions for r in records.requests)
    trace = timeline(crowded_run)
    tells_of(trace, records)
    phases = {phase.name for s in request_slices(trace).values() for phase in s.inside}
    assert phases == {"waiting", "prefill", "decode", "preempted"}


def test_the_time_in_steps_is_the_busy_time(crowded_run: Run) -> None:
    """Conservation, over a run with an idle gap; in the gap nothing runs and no KV is used."""
    trace = timeline(crowded_run)
    steps = trace.named("steps").slices
    busy_us = sum(s.step_us for s in crowded_run.records.steps)
    assert sum(s.end_ns - s.start_ns for s in steps) == busy_us * US
    gap_ns = 4000 * US
    assert not any(s.start_ns <= gap_ns < s.end_ns for s in steps)
    assert value_at(trace.named("running").samples, gap_ns) == 0
    assert value_at(trace.named("KV blocks used").samples, gap_ns) == 0


@settings(max_examples=60, deadline=None)
@given(busy_workloads(), tight_configs(), batch_policies())
def test_any_run_is_all_there(workload: Workload, config: InstanceConfig, policy: BatchPolicy) -> None:
    with tempfile.TemporaryDirectory() as folder:
        presented = ran(Path(folder), workload, config, policy)
        tells_of(timeline(presented), presented.records)


def test_the_same_run_gives_the_same_bytes(crowded_run: Run) -> None:
    """Whatever the file is called."""
    one, two = (write_timeline(crowded_run, crowded_run.path.parent / name) for name in ("one", "two.pftrace.gz"))
    assert one.read_bytes() == two.read_bytes()


def test_instances_and_links_have_their_own_tracks(crowded_run: Run) -> None:
    """Records of a fleet: a column says which instance, a table tells of the transfers."""
    folder, records = crowded_run.path, crowded_run.records
    later = 7
    requests, steps = request_table(records.requests), table_of_steps(records.steps)
    for name, table in (("requests", requests), ("steps", steps)):
        shifted = table.set_column(
            0, table.field(0), pa.array(np.asarray(table.column(0)) + (name == "requests") * 1000)
        )
        if name == "requests":
            both = pa.concat_tables([table, shifted])
        else:
            ids = [[[i + 1000 for i in row] for row in table[c].to_pylist()] for c in ("ids", "admitted", "preempted")]
            for c, value in zip(("ids", "admitted", "preempted"), ids, strict=True):
                at = table.schema.get_field_index(c)
                shifted = shifted.set_column(at, table.field(at), pa.array(value, table.field(at).type))
            both = pa.concat_tables([table, shifted])
        column = pa.array([0] * len(table) + [later] * len(table), pa.int32())
        pq.write_table(both.append_column("instance", column), folder / f"{name}.parquet")
    transfers = {
        "link": ["0 to 7", "0 to 7", "7 to 0"],
        "request": [0, 1, 1000],
        "num_bytes": [4096, 1, 2**40],
        "queued_us": [10, 12, 0],
        "start_us": [10, 30, 0],
        "end_us": [30, 31, 0],
    }
    pq.write_table(pa.table(transfers, schema=TRANSFER_SCHEMA), folder / "transfers.parquet")
    manifest = replace(crowded_run.manifest, workload={"num_requests": 2 * len(records.requests)})
    trace = timeline(Run(folder, manifest))
    assert set(request_slices(trace)) == {r.id for r in records.requests}
    assert set(request_slices(trace, later)) == {r.id + 1000 for r in records.requests}
    for instance in (0, later):
        process = trace.named(f"instance {instance}")
        assert len(trace.named("steps", process).slices) == len(records.steps)
        one, same = (trace.named("running", p).samples for p in (process, trace.named("instance 0")))
        assert one == same
    links = trace.named("links")
    assert [t.name for t in trace.children(links)] == ["0 to 7", "7 to 0"]
    shown = [s for lane in trace.children(trace.named("0 to 7", links)) for s in lane.slices]
    assert [(s.arguments["request"], s.arguments["num_bytes"]) for s in shown] == [(0, 4096), (1, 1)]
    spans = [[(p.name, p.start_ns // US, p.end_ns // US) for p in s.inside] for s in shown]
    assert spans == [[("transfer", 10, 30)], [("queued", 12, 30), ("transfer", 30, 31)]]


intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=60).map(sorted)


@given(intervals)
def test_lanes_are_few_and_hold_one_at_a_time(drawn: list[tuple[int, int]]) -> None:
    """As few as there are intervals at once, at the fullest moment: no packing does with less."""
    start = np.asarray([s for s, _ in drawn])
    end = np.asarray([s + length for s, length in drawn])
    lane = lanes(start, end)
    for k in range(len(drawn)):
        earlier = [j for j in range(k) if lane[j] == lane[k]]
        assert all(end[j] <= start[k] for j in earlier)
    at_once = [int(((start <= s) & (end > s)).sum()) for s in start]
    assert lane.max() + 1 <= max(1, *at_once) + (end == start).any()


numbers = st.lists(st.integers(0, 2**62), min_size=1, max_size=5)


@given(numbers, st.text(max_size=9), st.integers(0, 2**62))
def test_what_is_encoded_is_decoded(values: list[int], text: str, constant: int) -> None:
    """By a reader that knows nothing of columns."""
    inner: Fields = [(1, np.asarray(values)), (2, text), (3, Label("n", np.asarray(values), 19))]
    rows = encode([(9, constant), (15, inner), (16, [])], len(values))
    for value, row in zip(values, rows, strict=True):
        whole = message(row.tobytes())
        assert (whole[9], whole[16]) == ([constant], [b""])
        assert message(whole[15][0]) == {1: [value], 2: [text.encode()], 3: [f"n{value:019d}".encode()]}


def long_run(folder: Path, num_steps: int) -> Run:
    """One request, decoded for `num_steps` steps, written a part at a time."""
    folder.mkdir()
    presented = ran(folder, Workload(requests=(request(0),)), instance_config(), DecodeFirst())
    (step,) = presented.records.steps[-1:]
    with pq.ParquetWriter(presented.path / "steps.parquet", STEP_SCHEMA) as writer:
        for first in range(0, num_steps, BATCH_ROWS):
            some = range(first, min(first + BATCH_ROWS, num_steps))
            rows = [
                replace(step, step=k, start_us=20 * k, end_us=20 * k + 19, num_used_blocks=k % 7, num_waiting=k % 3)
                for k in some
            ]
            writer.write_table(table_of_steps(rows))
    (record,) = presented.records.requests
    record.finish_us = 20 * num_steps
    pq.write_table(request_table([record]), presented.path / "requests.parquet")
    return read_run(presented.path)


PEAK = """
import sys, tracemalloc
from pathlib import Path
from xllm_lab.runs import read_run
from xllm_lab.timeline_file import write_timeline
presented = read_run(Path(sys.argv[1]))
tracemalloc.start()
write_timeline(presented, Path(sys.argv[2]))
print(tracemalloc.get_traced_memory()[1])
"""


def test_steps_pass_through(tmp_path: Path) -> None:
    """Ten times as many steps need no more memory, once there is more than a batch of them."""
    peaks = []
    for num_steps in (2 * BATCH_ROWS, 20 * BATCH_ROWS):
        presented = long_run(tmp_path / str(num_steps), num_steps)
        words = [sys.executable, "-c", PEAK, str(presented.path), str(tmp_path / "out")]
        peaks.append(int(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_batches_make_no_seam(tmp_path: Path) -> None:
    """Slices and counters go on from one batch of steps to the next."""
    num_steps = BATCH_ROWS + 5
    trace = timeline(long_run(tmp_path / "long", num_steps))
    assert len(trace.named("steps").slices) == num_steps
    used = trace.named("KV blocks used").samples
    assert all(value_at(used[k - 2 : k + 3], 20 * k * US) == k % 7 for k in range(BATCH_ROWS - 3, num_steps - 3))


def test_the_command_writes_beside_the_run(crowded_run: Run) -> None:
    """Or where it is told to; the run stays as it was."""
    before = sorted(crowded_run.path.iterdir())
    told = said("timeline", crowded_run.path)
    assert (told.status, told.out) == (0, f"{crowded_run.path}.pftrace.gz\n")
    tells_of(PerfettoTrace(crowded_run.path.with_name("run.pftrace.gz")), crowded_run.records)
    assert said("timeline", crowded_run.path, "--out", crowded_run.path.with_name("t.gz")).status == 0
    assert sorted(crowded_run.path.iterdir()) == before


def test_an_engine_run_is_all_there(tmp_path: Path) -> None:
    """On the tiny model, with its prefix hits."""
    presented = read_run(tiny_loop() / "full")
    tells_of(PerfettoTrace(write_timeline(presented, tmp_path / "timeline")), presented.records)
    assert any(r.cached_tokens for r in presented.records.requests)


def spoilt() -> Iterator[tuple[str, str, dict[str, list[object]], tuple[str, ...]]]:
    """(file, what is wrong, columns that differ, words of the refusal)"""
    yield "steps", "overlap", {"start_us": [0, 5], "end_us": [10, 15]}, ("step 1 is from 5 to 15", "ended at 10")
    yield "steps", "backwards", {"start_us": [0, 10], "end_us": [10, 10]}, ("step 1 is from 10 to 10",)
    yield "steps", "ragged", {"num_tokens": [[1], [1, 1]]}, ("ids and num_tokens have different lengths",)
    yield "requests", "ends first", {"finish_us": [-1]}, ("request 0 arrived at 0 us and ended at -1",)
    yield "requests", "too few", {}, ("holds 1 requests, manifest.json says 9",)


@pytest.mark.parametrize("case", list(spoilt()), ids=lambda case: case[1])
def test_records_that_cannot_be_are_refused(
    case: tuple[str, str, dict[str, list[object]], tuple[str, ...]], tmp_path: Path
) -> None:
    """One line that names the file and the row; and no timeline."""
    name, what, columns, words = case
    presented = ran(tmp_path, Workload(requests=(request(0),)), instance_config(), DecodeFirst())
    if what == "too few":
        presented.manifest.workload["num_requests"] = 9
    schema = {"steps": STEP_SCHEMA, "requests": REQUEST_SCHEMA}[name]
    table = pq.read_table(presented.path / f"{name}.parquet")
    for column, values in columns.items():
        at = schema.get_field_index(column)
        table = table.set_column(at, schema.field(at), pa.array(values, schema.field(at).type))
    pq.write_table(table, presented.path / f"{name}.parquet")
    with pytest.raises(RunError) as refusal:
        write_timeline(presented, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    for word in (f"{name}.parquet", *words):
        assert word in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["steps", "requests"])
@pytest.mark.parametrize("spoil", ["missing", "cut", "other columns"])
def test_files_that_are_not_whole_are_refused(name: str, spoil: str, crowded_run: Run, tmp_path: Path) -> None:
    """By name, in one line of the command."""
    path = crowded_run.path / f"{name}.parquet"
    if spoil == "missing":
        path.unlink()
    elif spoil == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        pq.write_table(pq.read_table(path).drop_columns(["num_waiting" if name == "steps" else "finish_us"]), path)
    told = said("timeline", crowded_run.path, "--out", tmp_path / "out")
    assert (told.status, told.out, told.err.count("\n")) == (2, "", 1)
    assert str(path) in told.err
    assert not (tmp_path / "out").exists()


def test_transfers_out_of_order_are_refused(crowded_run: Run) -> None:
    row = {"link": ["a"], "request": [0], "num_bytes": [1], "queued_us": [5], "start_us": [4], "end_us": [9]}
    pq.write_table(pa.table(row, schema=TRANSFER_SCHEMA), crowded_run.path / "transfers.parquet")
    with pytest.raises(RunError, match="row 0 is queued at 5, starts at 4 and ends at 9 us"):
        timeline(crowded_run)


def test_names_are_written_once(tmp_path: Path) -> None:
    """However often they are used, and whatever letters they have."""
    with gzip.open(tmp_path / "t", "wb") as file:
        writer = TraceWriter(file)
        track = writer.track("größer → kleiner", writer.process("", 1), 0)
        for k in range(3):
            at = np.asarray([k])
            writer.flat_slices(track, at, at + 1, np.asarray([writer.name("再")]), {"n": at})
    trace = PerfettoTrace(tmp_path / "t")
    assert [s.name for s in trace.named("größer → kleiner").slices] == ["再"] * 3
    assert asdict(trace.named("größer → kleiner").slices[2])["arguments"] == {"n": 2}
