"""A folder of msServiceProfiler: each executed batch once, whichever release wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles.folders import (
    BATCH_HEADER,
    EPOCH_MS,
    FORWARD_HEADER,
    KVCACHE_HEADER,
    OLD_BATCH_HEADER,
    OLD_KVCACHE_HEADER,
    OLD_REQUEST_HEADER,
    REQUEST_HEADER,
    batch_row,
    vllm_part,
    write_csv,
)
from tests.profiles.refused import assert_refused
from xllm_lab.profiles import Profile, read_profile
from xllm_lab.profiles.sources._ms_batches import _literal

SCHEDULED, EXECUTED = "batchFrameworkProcessing", "modelExec"
PARTS = [vllm_part("a", 3, 1, 4098, 4096), vllm_part("b", 0, 512, 1024, 4096)]


def batches(folder: Path, rows: list[list[object]]) -> Profile:
    write_csv(folder / "batch.csv", BATCH_HEADER, rows)
    return read_profile(folder)


def left_out(profile: Profile) -> dict[str, tuple[int, float]]:
    return {left.reason: (left.num_rows, left.total_us) for left in profile.left_out}


event = st.tuples(
    st.sampled_from([SCHEDULED, EXECUTED, EXECUTED, "specDecoding"]),
    st.sampled_from([PARTS, PARTS[:1], PARTS[1:], ""]),
    st.integers(0, 4000),
    st.integers(0, 50),
    st.sampled_from("12"),
)


@given(st.lists(event, min_size=1, max_size=30))
def test_every_row_is_a_batch_or_a_plan_or_left_out(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, object, int, int, str]]
) -> None:
    """And so is its time, to the nanosecond."""
    rows = [
        batch_row(name, ms=tenths / 10, parts=parts, at_ms=at_ms, device=device)
        for name, parts, tenths, at_ms, device in drawn
    ]
    profile = batches(tmp_path_factory.mktemp("p"), rows)
    unexecuted = "a scheduled batch that no execution names"
    kept = [left for left in profile.left_out if left.reason != unexecuted]
    ns = sum(round(b.step_us * 1000) for b in profile.batches) + sum(round(left.total_us * 1000) for left in kept)
    assert ns == sum(tenths * 100_000 for name, _, tenths, _, _ in drawn if name != SCHEDULED)
    assert len(profile.batches) + sum(left.num_rows for left in kept) == sum(row[0] != SCHEDULED for row in drawn)
    num_plans = sum(row[0] == SCHEDULED for row in drawn) - left_out(profile).get(unexecuted, (0, 0.0))[0]
    assert 0 <= num_plans <= len(profile.batches)


def test_an_executed_batch_knows_what_was_scheduled(tmp_path: Path) -> None:
    """Blocks and tokens stand in the scheduling row; its own time is not the step's."""
    plan = batch_row(SCHEDULED, ms=0.8, parts=PARTS, prefills=(1, 512), decodes=(1, 1), used_blocks=100)
    executed = batch_row(EXECUTED, ms=31.25, parts=[{"rid": "a", "iter": 3}, {"rid": "b", "iter": 0}], at_ms=1)
    profile = batches(tmp_path, [plan, executed])
    (batch,) = profile.batches
    assert profile.source == "msserviceprofiler"
    assert batch.step_us == 31_250
    assert (batch.num_prefills, batch.prefill_tokens, batch.num_decodes, batch.decode_tokens) == (1, 512, 1, 1)
    assert batch.used_blocks == 100
    assert [part.num_computed_tokens for part in batch.parts] == [4098, 1024]
    assert (profile.peak_used_blocks, profile.num_blocks) == (100, 2048)
    assert not profile.left_out


def test_a_batch_on_many_devices_lasts_as_long_as_the_slowest(tmp_path: Path) -> None:
    """Tensor parallel: a row per device."""
    rows = [batch_row(EXECUTED, ms=ms, parts=PARTS, device=str(k)) for k, ms in enumerate((19.0, 20.5, 19.5))]
    profile = batches(tmp_path, rows)
    assert [batch.step_us for batch in profile.batches] == [20_500]
    assert left_out(profile) == {"the same batch on another device; the slowest counts": (2, 38_500)}


def test_the_same_requests_twice_on_a_device_are_two_batches(tmp_path: Path) -> None:
    """A prompt in chunks keeps its iteration in some engines."""
    rows = [batch_row(EXECUTED, ms=20, parts=[{"rid": 7, "iter": 0}], at_ms=30 * k) for k in range(2)]
    assert len(batches(tmp_path, rows).batches) == 2


def test_batches_of_the_same_requests_keep_their_order(tmp_path: Path) -> None:
    """Two chunks of a prompt: the first execution is that of the first plan, wherever the rows stand."""
    rows = []
    for k in (1, 0):
        rows.append(batch_row(EXECUTED, ms=20 + k, parts=[{"rid": "a", "iter": 0}], at_ms=30 * k + 1))
        rows.append(batch_row(SCHEDULED, ms=0.5, parts=[vllm_part("a", 0, 512 + k, 512 * k, 4096)], at_ms=30 * k))
    profile = batches(tmp_path, rows)
    assert [(batch.step_us, batch.parts[0].num_tokens) for batch in profile.batches] == [(20_000, 512), (21_000, 513)]
    assert not profile.left_out


def test_rows_without_requests_are_counted_once_a_device(tmp_path: Path) -> None:
    rows = [batch_row(EXECUTED, ms=20 + k, decodes=(4, 4), device=str(k % 2), at_ms=30 * k) for k in range(4)]
    profile = batches(tmp_path, rows)
    assert [batch.step_us for batch in profile.batches] == [20_000, 22_000]
    assert left_out(profile) == {"no res_list, and another device of its rank has the same batches": (2, 44_000)}


def test_nothing_is_dropped_silently(tmp_path: Path) -> None:
    """Every row is a batch, the plan of one, or left out for a reason."""
    rows = [
        batch_row(SCHEDULED, ms=0.5, parts=PARTS),
        batch_row(SCHEDULED, ms=0.25, parts=PARTS[:1]),
        batch_row(EXECUTED, ms=20, parts=PARTS),
        batch_row(EXECUTED, ms=0, parts=PARTS[:1]),
        batch_row("specDecoding", ms=2, parts=PARTS),
    ]
    profile = batches(tmp_path, rows)
    assert len(profile.batches) == 1
    assert left_out(profile) == {
        "a scheduled batch that no execution names": (1, 250),
        "an execution that took no time": (1, 0),
        "specDecoding is no execution of the model": (1, 2000),
    }


def test_a_batch_of_decodes_alone_has_a_token_each(tmp_path: Path) -> None:
    """What older releases say is the type and the size of a batch."""
    start = EPOCH_MS * 1000
    rows: list[list[object]] = [
        ["modelExec", "[{'rid': 0, 'iter': 2}, {'rid': 1, 'iter': 1}]", start, start + 15_400, 2.0, "decode", 15_400.0],
        ["modelExec", "[{'rid': 2, 'iter': 0}]", start + 16_000, start + 80_000, 1.0, "prefill", 64_000.0],
    ]
    write_csv(tmp_path / "batch.csv", OLD_BATCH_HEADER, rows)
    decode, prefill = read_profile(tmp_path).batches
    assert (decode.step_us, decode.num_prefills, decode.num_decodes, decode.decode_tokens) == (15_400, 0, 2, 2)
    assert (prefill.step_us, prefill.num_prefills, prefill.num_decodes) == (64_000, None, None)
    assert [(part.request, part.iteration) for part in decode.parts] == [("0", 2), ("1", 1)]


def test_both_generations_of_requests(tmp_path: Path) -> None:
    """Milliseconds or microseconds, by the header; a request that did not end is left out."""
    new = tmp_path / "new"
    rows: list[list[object]] = [
        ["r1", "", 4096, 1536, 30_000.5, 2.5, 310, 0.75, EPOCH_MS],
        ["r2", "", "4096.0", "", "", "", "", "", EPOCH_MS],
    ]
    write_csv(new / "request.csv", REQUEST_HEADER, rows)
    profile = read_profile(new)
    (request,) = profile.requests
    assert (request.prompt_tokens, request.output_tokens) == (4096, 1536)
    assert (request.e2e_us, request.queue_us, request.ttft_us) == (30_000_500, 2_500, 310_000)
    assert left_out(profile) == {"a request that did not end within the recording": (1, 0)}
    old = tmp_path / "old"
    write_csv(old / "request.csv", OLD_REQUEST_HEADER, [["r1", EPOCH_MS * 1000, 4096, 1536, 30_000_500, 2_500]])
    (same,) = read_profile(old).requests
    assert (same.e2e_us, same.queue_us, same.ttft_us) == (request.e2e_us, request.queue_us, None)


def test_forward_passes_and_the_idle_time_between_them(tmp_path: Path) -> None:
    rows: list[list[object]] = [
        ["forward", 0, "", "", 19.4, "", 16, "Decode", 1, 0, 3, "npu01", EPOCH_MS, EPOCH_MS + 19],
        ["forward", 21, "", "", 19.5, 1.6, 16, "Decode", 2, 0, 3, "npu01", EPOCH_MS + 21, EPOCH_MS + 40],
    ]
    write_csv(tmp_path / "forward.csv", FORWARD_HEADER, rows)
    first, second = read_profile(tmp_path).forwards
    assert (first.step_us, first.idle_us, first.num_seqs, first.batch_type) == (19_400, None, 16, "Decode")
    assert (second.step_us, second.idle_us) == (19_500, 1_600)


@pytest.mark.parametrize(("ms", "is_told"), [(1.5, True), (20.0, False)])
def test_an_engine_that_did_not_wait_is_told(tmp_path: Path, ms: float, is_told: bool) -> None:
    """Scheduling ahead, an engine hands a batch over in a fraction of the time that the model takes."""
    row = ["forward", 0, "", "", 19.4, "", 16, "Decode", 1, 0, 3, "npu01", EPOCH_MS, EPOCH_MS + 19]
    write_csv(tmp_path / "forward.csv", FORWARD_HEADER, [row])
    notes = batches(tmp_path, [batch_row(EXECUTED, ms=ms, parts=PARTS)]).notes
    assert any("these are no step times" in note for note in notes) == is_told


def test_speculated_tokens_are_more_than_a_request_each(tmp_path: Path) -> None:
    """The executed batch's size is tokens there."""
    row = batch_row(EXECUTED, ms=20, parts=[{"rid": "a", "iter": 4}, {"rid": "b", "iter": 9}])
    row[BATCH_HEADER.index("batch_type")], row[BATCH_HEADER.index("batch_size")] = "Decode", 4.0
    (batch,) = batches(tmp_path, [row]).batches
    assert (batch.num_decodes, batch.decode_tokens) == (2, 4)


def test_kv_blocks_in_use(tmp_path: Path) -> None:
    rows: list[list[object]] = [["", "allocate", 1, 2048, used, 2048 - used, 1, 0, "", ""] for used in (10, 900, 500)]
    write_csv(tmp_path / "kvcache.csv", KVCACHE_HEADER, rows)
    profile = read_profile(tmp_path)
    assert (profile.peak_used_blocks, profile.num_blocks) == (900, 2048)
    old = tmp_path / "old"
    write_csv(old / "kvcache.csv", OLD_KVCACHE_HEADER, [["KVCache", 3, 1, 2, "allocate", 1000, 1]])
    assert read_profile(old).peak_used_blocks is None


def test_columns_of_ranks_are_told(tmp_path: Path) -> None:
    header = [*BATCH_HEADER, "dp0-rid", "dp0-size", "dp0-forward(ms)"]
    write_csv(tmp_path / "batch.csv", header, [[*batch_row(EXECUTED, ms=20, parts=PARTS), "a", 2, 18.5]])
    assert "batch.csv: columns not used: dp0-rid, dp0-size, dp0-forward(ms)" in read_profile(tmp_path).notes


def test_a_latency_without_a_unit_is_told(tmp_path: Path) -> None:
    """Some releases write the first token's latency in microseconds and do not say so."""
    header = [*OLD_REQUEST_HEADER, "first_token_latency"]
    write_csv(tmp_path / "request.csv", header, [["r1", EPOCH_MS * 1000, 4096, 1536, 30_000_500, 2_500, 310_000]])
    profile = read_profile(tmp_path)
    assert profile.requests[0].ttft_us is None
    assert "request.csv: columns not used: first_token_latency" in profile.notes


def test_a_batch_cut_off_by_the_end_of_the_recording(tmp_path: Path) -> None:
    row = batch_row(EXECUTED, ms=20, parts=PARTS)
    row[BATCH_HEADER.index("end_time(ms)")] = ""
    assert left_out(batches(tmp_path, [row])) == {"modelExec without a start, an end or a duration": (1, 0)}


def test_a_duration_that_its_ends_deny_is_refused(tmp_path: Path) -> None:
    """Microseconds under a header that says milliseconds."""
    row = batch_row(EXECUTED, ms=20, parts=PARTS)
    row[BATCH_HEADER.index("during_time(ms)")] = 20_000
    path = write_csv(tmp_path / "batch.csv", BATCH_HEADER, [row])
    accepted = "the 20 from its start to its end, or another unit in the header,"
    assert_refused(tmp_path, f"{path}:2: during_time(ms) is '20000'; {accepted} is accepted")


@pytest.mark.parametrize(
    ("column", "cell", "accepted"),
    [
        ("during_time(ms)", "-1", "a time from 0 to 3.6e+06 (or another unit in the header)"),
        ("during_time(ms)", "soon", "a time from 0 to 3.6e+06"),
        ("start_time(ms)", str(EPOCH_MS * 1000), "a time from 0 to 4.10244e+12 (or another unit in the header)"),
        ("end_time(ms)", str(EPOCH_MS - 5), "a time not before start_time(ms)"),
        ("decode_scheduled_tokens", "1.5", "a whole number of at least 0"),
        ("used_blocks", "-3", "a whole number of at least 0"),
        ("res_list", "[{'rid':", "a list of requests such as [{'rid': '7', 'iter': 3}]"),
        ("res_list", "{'rid': 1}", "a list of requests such as [{'rid': '7', 'iter': 3}]"),
        ("res_list", "[{'iter': 1}]", "a list of requests such as [{'rid': '7', 'iter': 3}]"),
        ("res_list", "[{'rid': 1, 'iter': -1}]", "a list of requests such as [{'rid': '7', 'iter': 3}]"),
    ],
)
def test_a_cell_that_cannot_be_right_is_refused(tmp_path: Path, column: str, cell: str, accepted: str) -> None:
    row = batch_row(EXECUTED, ms=20, parts=PARTS, decodes=(1, 1), used_blocks=3)
    row[BATCH_HEADER.index(column)] = cell
    path = write_csv(tmp_path / "batch.csv", BATCH_HEADER, [batch_row(EXECUTED, ms=20, parts=PARTS), row])
    assert_refused(tmp_path, f"{path}:3: {column} is {cell!r}; {accepted} is accepted")


@pytest.mark.parametrize(
    ("name", "header", "missing"),
    [
        ("batch.csv", BATCH_HEADER, "during_time"),
        ("batch.csv", BATCH_HEADER, "start_time"),
        ("request.csv", REQUEST_HEADER, "execution_time"),
        ("forward.csv", FORWARD_HEADER, "during_time"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, name: str, header: tuple[str, ...], missing: str) -> None:
    left = [column for column in header if not column.startswith(missing)]
    path = write_csv(tmp_path / name, left, [["0"] * len(left)])
    wanted = f"{missing}(us)"
    assert_refused(tmp_path, f"{path}:1: column {wanted} is missing (columns: {', '.join(left)}); {wanted} is accepted")


def test_empty_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch.csv"
    path.write_text("")
    assert_refused(tmp_path, f"{path}: is empty; a header and at least one row are accepted")
    write_csv(path, BATCH_HEADER, [])
    assert_refused(tmp_path, f"{path}: has a header and no rows; at least one row is accepted")


part = st.fixed_dictionaries({"rid": st.text(max_size=6) | st.integers(0, 99), "iter": st.none() | st.integers(0, 9)})


@given(st.lists(part, max_size=4))
def test_requests_are_read_as_python_wrote_them(drawn: list[dict[str, object]]) -> None:
    assert _literal(repr(drawn)) == drawn
