"""A folder of torch_npu.profiler: no time is lost or counted twice, whatever release wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles.folders import (
    COLLECTIVE_US,
    HOST_HEADER,
    KERNEL_HEADER,
    LAYER,
    OLD_KERNEL_HEADER,
    OPERATORS_US,
    SHADOW_US,
    STATISTIC_HEADER,
    STEP_HEADER,
    Cells,
    ascend_folder,
    kernel_rows,
    old_kernel_rows,
    output_folder,
    write_csv,
)
from tests.profiles.refused import assert_refused
from xllm_lab.profiles import Profile, read_profile

SECOND = "the kernel of a collective that an hcom row counts already"


def kernels(root: Path, rows: list[list[object]], header: Cells = KERNEL_HEADER) -> Profile:
    return read_profile(write_csv(output_folder(root) / "kernel_details.csv", header, rows).parent)


def accounted_us(profile: Profile) -> float:
    left_out = sum(left.total_us for left in profile.left_out)
    return profile.operators.total_us + sum(c.total_us for c in profile.collectives) + left_out


kernel = st.tuples(
    st.sampled_from(
        [(name, type, core) for name, type, core, *_ in LAYER] + [("allgatherAicpuKernel",) * 2 + ("AI_CPU",)]
    ),
    st.integers(0, 10**7),
    st.integers(0, 2),
    st.sampled_from(["16,5120;5120,640", "N/A", "", "1;;8,128"]),
)


@given(st.lists(kernel, min_size=1, max_size=40))
def test_every_microsecond_is_an_operator_a_collective_or_left_out(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[tuple[str, str, str], int, int, str]]
) -> None:
    """Exactly: durations have three decimals and are added as whole nanoseconds."""
    rows = []
    clock = 10**15
    for (name, type, core), ns, device, shapes in drawn:
        duration = f"{ns // 1000}.{ns % 1000:03}"
        rows.append(["", device, name, type, core, clock, duration, 0, 1, 0, shapes, "N/A", *["N/A"] * 4])
        clock += ns // 1000 + 1
    profile = kernels(tmp_path_factory.mktemp("p"), rows)
    total_ns = sum(ns for _, ns, _, _ in drawn)
    assert round(accounted_us(profile) * 1000) == total_ns
    calls = sum(c.num_calls for c in profile.collectives) + sum(left.num_rows for left in profile.left_out)
    assert profile.operators.num_calls + calls == len(drawn)


def test_a_decode_step(tmp_path: Path) -> None:
    """Two steps of three layers: operators by type and shape, each collective once."""
    profile = read_profile(ascend_folder(tmp_path))
    calls = 2 * 3
    assert profile.source == "ascend-profiler"
    assert profile.num_steps == 2
    assert profile.operators.total_us == pytest.approx(calls * OPERATORS_US, rel=1e-12)
    (reduce,) = profile.collectives
    assert (reduce.collective, reduce.group, reduce.device, reduce.num_calls) == ("all_reduce", "503", "0", calls)
    assert reduce.mean_us == pytest.approx(COLLECTIVE_US)
    assert reduce.message_bytes is None
    (second,) = profile.left_out
    assert (second.file, second.reason, second.num_rows) == ("kernel_details.csv", SECOND, calls)
    assert second.total_us == pytest.approx(calls * SHADOW_US)


def test_the_same_operator_on_two_shapes_is_two_rows(tmp_path: Path) -> None:
    rows = [r for r in read_profile(ascend_folder(tmp_path)).operators.rows if r.operator == "MatMulV2"]
    assert [r.shapes for r in rows] == [((16, 5120), (5120, 640)), ((16, 512), (512, 5120))]
    assert [(r.num_calls, r.total_us) for r in rows] == [(6, 113.4), (6, 73.5)]
    assert {(r.core, r.device, r.dtypes) for r in rows} == {("AI_CORE", "0", "DT_BF16;DT_BF16")}


def test_the_pool_is_not_taken_for_the_lengths(tmp_path: Path) -> None:
    """Paged attention shows the whole KV pool as K and V; a prefill that brings its own K and V does not."""
    profile = read_profile(ascend_folder(tmp_path))
    (attention,) = [r for r in profile.operators.rows if r.operator == "FusedInferAttentionScore"]
    assert attention.hides_lengths
    assert any(note.startswith("FusedInferAttentionScore: 6 calls read paged KV") for note in profile.notes)
    row = kernel_rows(1, 1)[3]
    row[10] = "3731,4,128;3731,1,128;3731,1,128"
    (prefill,) = kernels(tmp_path / "prefill", [row]).operators.rows
    assert not prefill.hides_lengths


def test_older_releases_say_the_same(tmp_path: Path) -> None:
    """Block Dim, Mix Block Dim and more columns; no marked steps."""
    new = kernels(tmp_path / "new", kernel_rows())
    old = kernels(tmp_path / "old", old_kernel_rows(), OLD_KERNEL_HEADER)
    assert old.operators == new.operators
    assert old.collectives == new.collectives
    assert (old.num_steps, new.num_steps) == (0, 2)


def test_the_header_says_the_unit(tmp_path: Path) -> None:
    in_ms = [str(name).replace("Duration(us)", "Duration(ms)") for name in KERNEL_HEADER]
    rows = kernel_rows()
    for row in rows:
        row[6] = f"{float(str(row[6])) / 1000:.6f}"
    assert kernels(tmp_path / "ms", rows, in_ms).operators == kernels(tmp_path / "us", kernel_rows()).operators


@pytest.mark.parametrize(
    ("name", "type", "collective"),
    [
        ("allgatherAicpuKernel", "allgatherAicpuKernel", "all_gather"),
        ("AivKernel", "hcom_reduceScatter_", "reduce_scatter"),
        ("reduce_scatterAicpuKernel", "reduce_scatterAicpuKernel", "reduce_scatter"),
    ],
)
def test_a_kernel_without_an_hcom_row_is_the_collective(tmp_path: Path, name: str, type: str, collective: str) -> None:
    """The other collective's row on the same device does not make it a second one."""
    rows = [*kernel_rows(1, 1), ["", 0, name, type, "AI_CPU", 1_774_670_741_777_000, 30, 0, 1, 0, *["N/A"] * 6]]
    profile = kernels(tmp_path, rows)
    assert {c.collective for c in profile.collectives} == {"all_reduce", collective}
    assert profile.left_out[0].num_rows == 1
    assert f"kernel_details.csv: {collective} on device 0 has kernels and no hcom row" in profile.notes


def test_an_unnamed_kernel_belongs_to_the_hcom_rows_of_its_device(tmp_path: Path) -> None:
    rows = kernel_rows(1, 1)
    rows[6][3] = "N/A"
    assert kernels(tmp_path, rows).left_out[0].num_rows == 1
    alone = kernels(tmp_path / "alone", rows[6:7])
    assert [c.collective for c in alone.collectives] == ["unknown"]


def test_a_collective_of_known_shape_has_a_size(tmp_path: Path) -> None:
    """16 x 5120 numbers of 2 bytes are the 160 KB of the published table."""
    rows = kernel_rows(1, 1)
    rows[5][10:12] = ["16,5120", "BFP16"]
    assert kernels(tmp_path, rows).collectives[0].message_bytes == 160 * 1024


def test_where_the_time_of_a_step_went(tmp_path: Path) -> None:
    """Computing, communication that nothing hid, and free time are the step."""
    splits = read_profile(ascend_folder(tmp_path)).splits
    assert [split.step_us for split in splits] == [15_700, 19_400]
    assert [split.step for split in splits] == ["1", "2"]
    assert splits[0].communication_us == splits[0].not_overlapped_us + splits[0].overlapped_us


def test_unmarked_steps_are_told(tmp_path: Path) -> None:
    write_csv(
        output_folder(tmp_path) / "step_trace_time.csv", STEP_HEADER, [[0, "", 12000, 0, 0, 0, 3000, 15000, 0, 0, 50]]
    )
    profile = read_profile(tmp_path)
    assert profile.num_steps == 0
    assert "step_trace_time.csv: steps were not marked, a row without a step is the whole recording" in profile.notes
    assert "kernel_details.csv is not there" in profile.notes


def test_the_host_s_time_by_operator(tmp_path: Path) -> None:
    mm, swiglu = read_profile(ascend_folder(tmp_path)).host_operators
    assert (mm.operator, mm.num_calls, mm.host_us, mm.device_us) == ("aten::mm", 2, 80, 31.15)
    assert swiglu.operator == "npu::npu_swiglu"


def test_sums_by_type_stand_in_for_missing_kernels(tmp_path: Path) -> None:
    output = ascend_folder(tmp_path) / "ASCEND_PROFILER_OUTPUT"
    by_kernels = read_profile(tmp_path).operators.by_operator()
    (output / "kernel_details.csv").unlink()
    by_type = read_profile(tmp_path).operators
    (matmul,) = [r for r in by_type.rows if r.operator == "MatMulV2"]
    (expected,) = [r for r in by_kernels.rows if r.operator == "MatMulV2"]
    assert (matmul.num_calls, matmul.min_us, matmul.max_us) == (expected.num_calls, expected.min_us, expected.max_us)
    assert matmul.total_us == pytest.approx(expected.total_us)


def test_files_that_disagree_are_told(tmp_path: Path) -> None:
    output = ascend_folder(tmp_path) / "ASCEND_PROFILER_OUTPUT"
    write_csv(output / "op_statistic.csv", STATISTIC_HEADER, [[0, "SwiGlu", "AI_VECTOR_CORE", 6, 60, 10, 10, 10, 6]])
    profile = read_profile(output)
    assert "op_statistic.csv: other times than kernel_details.csv for SwiGlu; the kernels count" in profile.notes


def test_ranks_are_read_as_one(tmp_path: Path) -> None:
    one = kernels(tmp_path / "one", kernel_rows())
    for rank in range(2):
        folder = tmp_path / "two" / f"rank{rank}_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
        write_csv(folder / "kernel_details.csv", KERNEL_HEADER, kernel_rows(device=rank))
    two = read_profile(tmp_path / "two")
    assert two.operators.total_us == pytest.approx(2 * one.operators.total_us, rel=1e-12)
    assert {row.device for row in two.operators.rows} == {"0", "1"}
    assert two.num_steps == 2
    assert two.operators.by_operator().rows[0].num_calls == 2 * one.operators.by_operator().rows[0].num_calls


@pytest.mark.parametrize(
    ("column", "cell", "accepted"),
    [
        ("Duration(us)", "fast", "a time from 0 to 3.6e+09"),
        ("Duration(us)", "", "a time from 0 to 3.6e+09"),
        ("Duration(us)", "nan", "a time from 0 to 3.6e+09"),
        ("Duration(us)", "-1.5", "a time from 0 to 3.6e+09 (or another unit in the header)"),
        ("Duration(us)", "4e9", "a time from 0 to 3.6e+09 (or another unit in the header)"),
        ("Start Time(us)", "1774670741777000000", "a time from 0 to 4.10244e+15 (or another unit in the header)"),
        ("Input Shapes", "16 x 5120", "shapes such as 8,5120;5120,3200, or N/A,"),
    ],
)
def test_a_cell_that_cannot_be_right_is_refused(tmp_path: Path, column: str, cell: str, accepted: str) -> None:
    rows = kernel_rows(1, 1)
    rows[2][KERNEL_HEADER.index(column)] = cell
    path = write_csv(output_folder(tmp_path) / "kernel_details.csv", KERNEL_HEADER, rows)
    assert_refused(tmp_path, f"{path}:4: {column} is {cell!r}; {accepted} is accepted")


def test_a_device_has_so_many_streams(tmp_path: Path) -> None:
    """Nanoseconds under a header that says microseconds: a hundred kernels at a time."""
    rows = [row for row in kernel_rows(20, 8) if row[3] == "SwiGlu"]
    for k, row in enumerate(rows):
        row[5], row[6] = 1000 + 6 * k, 5_600
    path = write_csv(output_folder(tmp_path) / "kernel_details.csv", KERNEL_HEADER, rows)
    said = (
        f"{path}: the kernels of device 0 last 896000 us in a span of 6554 us, so a unit is not what the header says; "
        f"at most 64 kernels at a time are accepted"
    )
    assert_refused(tmp_path, said)


@pytest.mark.parametrize("missing", ["Name", "Type", "Duration(us)"])
def test_a_missing_column_is_named(tmp_path: Path, missing: str) -> None:
    k = KERNEL_HEADER.index(missing)
    header = [name for name in KERNEL_HEADER if name != missing]
    rows = [row[:k] + row[k + 1 :] for row in kernel_rows(1, 1)]
    path = write_csv(output_folder(tmp_path) / "kernel_details.csv", header, rows)
    said = f"{path}:1: column {missing} is missing (columns: {', '.join(header)}); {missing} is accepted"
    assert_refused(tmp_path, said)


def test_an_unknown_unit_is_refused(tmp_path: Path) -> None:
    header = [name.replace("Duration(us)", "Duration(ticks)") for name in KERNEL_HEADER]
    path = write_csv(output_folder(tmp_path) / "kernel_details.csv", header, kernel_rows(1, 1))
    accepted = "ns, us, microsecond, ms, millisecond, s or second"
    assert_refused(tmp_path, f"{path}:1: unit of Duration is 'ticks'; {accepted} is accepted")


@pytest.mark.parametrize(
    "name", ["kernel_details.csv", "op_statistic.csv", "step_trace_time.csv", "operator_details.csv"]
)
def test_empty_files_are_refused(tmp_path: Path, name: str) -> None:
    path = output_folder(tmp_path) / name
    path.parent.mkdir(parents=True)
    path.write_text("\n")
    assert_refused(tmp_path, f"{path}: is empty; a header and at least one row are accepted")
    headers = dict(
        zip(("k", "op_", "s", "operator"), (KERNEL_HEADER, STATISTIC_HEADER, STEP_HEADER, HOST_HEADER), strict=True)
    )
    (header,) = [h for start, h in headers.items() if name.startswith(start)]
    write_csv(path, header, [])
    assert_refused(tmp_path, f"{path}: has a header and no rows; at least one row is accepted")


def test_a_row_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_csv(output_folder(tmp_path) / "kernel_details.csv", KERNEL_HEADER, [[0, 1, "MatMul"]])
    assert_refused(tmp_path, f"{path}:2: row has 3 cells; 16, as the header has, is accepted")


def test_sums_that_are_none_are_refused(tmp_path: Path) -> None:
    """A total in milliseconds beside means in microseconds."""
    row = [0, "SwiGlu", "AI_VECTOR_CORE", 6, 0.0336, 5.6, 5.6, 5.6, 6]
    path = write_csv(output_folder(tmp_path) / "op_statistic.csv", STATISTIC_HEADER, [row])
    accepted = "Count times the mean, Count being at least 1 and Min at most Max,"
    assert_refused(tmp_path, f"{path}:2: Total Time(us) is '0.0336'; {accepted} is accepted")
