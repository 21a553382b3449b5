"""Collectives by size: hccl_test's tables, and the link that they tell of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles.refused import assert_refused
from xllm_lab.errors import ConfigError
from xllm_lab.profiles import read_profile
from xllm_lab.profiles.profile import CollectiveRow
from xllm_lab.profiles.sources._collectives import collective_of, message_bytes
from xllm_lab.profiles.transfer_time import fit_collective

REDUCE = "all_reduce over unknown ranks"
CELLS = "bytes | microseconds | GB/s | success, failed or NULL is accepted"
HEADER = "data_size(Bytes): | aveg_time(us): | alg_bandwidth(GB/s): | check_result:\n"
COMMAND = "mpirun -np 16 ./bin/all_gather_test -b 1K -e 64M -f 2 -d bfp16 -p 16\n"


def log(folder: Path, *lines: str, head: str = COMMAND) -> Path:
    path = folder / "hccl.log"
    path.write_text(head + HEADER + "".join(f"{line}\n" for line in lines))
    return path


def test_a_table(tmp_path: Path) -> None:
    """All-gather over 16 dies of an A3, two points of the published table; a wrong result counts for nothing."""
    path = log(
        tmp_path,
        "1363149           | 176.70         | 7.71448              | success",
        "41943040          | 3080.00        | 13.61787             | NULL",
        "64                | 1000.00        | 0.00006              | failed",
        "",
        "done | bye",
    )
    profile = read_profile(path)
    assert profile.source == "hccl-test"
    assert [(c.collective, c.num_ranks, c.message_bytes, c.mean_us) for c in profile.collectives] == [
        ("all_gather", 16, 1363149, 176.7),
        ("all_gather", 16, 41943040, 3080),
    ]
    (wrong,) = profile.left_out
    assert (wrong.reason, wrong.num_rows, wrong.total_us) == ("the result was checked and wrong", 1, 1000)


def test_the_file_s_name_tells_the_collective(tmp_path: Path) -> None:
    path = tmp_path / "reduce_scatter.txt"
    path.write_text(HEADER.replace("aveg", "avg") + "1000 | 10 | 0.1 | success\n")
    profile = read_profile(path)
    assert profile.collectives[0].collective == "reduce_scatter"
    assert profile.notes == ("the number of ranks is not recorded",)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1000 | 10 | 100 | success", "alg_bandwidth(GB/s) is 100; 0.10000, the bytes by the time, is accepted"),
        ("1K | 10 | 0.1 | success", f"row is '1K | 10 | 0.1 | success'; {CELLS}"),
        ("1 | 0 | 0.1 | success", "row is '1 | 0 | 0.1 | success'; at least 1 byte in more than 0 us is accepted"),
        ("1000 | 10", f"row is '1000 | 10'; {CELLS}"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused(tmp_path: Path, line: str, said: str) -> None:
    path = log(tmp_path, line)
    assert_refused(path, f"{path}:3: {said}")


def test_a_table_of_nothing_known_is_refused(tmp_path: Path) -> None:
    path = log(tmp_path, "1000 | 10 | 0.1 | success", head="")
    accepted = "the command, such as all_reduce_test, above the table or in the file's name"
    assert_refused(path, f"{path}:1: which collective was measured is not told; {accepted} is accepted")
    assert_refused(log(tmp_path), f"{path}: holds no measured size; the text that hccl_test prints is accepted")


@pytest.mark.parametrize(
    ("name", "type", "found"),
    [
        ("hcom_allReduce__503_96_4", "hcom_allReduce_", ("all_reduce", "503", True)),
        ("hcom_allGather_AicpuKernel_015_0_1", "hcom_allGather_AicpuKernel", ("all_gather", "015", True)),
        ("HcclAlltoAllv", "N/A", ("all_to_all_v", "", True)),
        ("AivKernel", "hcom_allReduce_", ("all_reduce", "", False)),
        ("AivKernel", "N/A", ("", "", False)),
        ("allreduceAicpuKernel", "allreduceAicpuKernel", ("all_reduce", "", False)),
        ("reduce_scatterAicpuKernel", "", ("reduce_scatter", "", False)),
        ("aclnnMatmul_MatMulV2", "MatMulV2", None),
        ("hcomAicpuInit", "hcomAicpuInit", None),
    ],
)
def test_which_kernels_are_collectives(name: str, type: str, found: tuple[str, str, bool] | None) -> None:
    assert collective_of(name, type) == found


def test_bytes_need_shapes_and_types() -> None:
    assert message_bytes(((16, 5120), (2,)), "DT_BF16;INT64") == 16 * 5120 * 2 + 16
    assert message_bytes(((),), "FLOAT") == 4
    assert message_bytes(None, "FLOAT") is None
    assert message_bytes(((16,),), "INT4") is None
    assert message_bytes(((16,), (16,)), "FLOAT") is None


def row(message_bytes: int | None, us: float, calls: int = 1, collective: str = "all_reduce") -> CollectiveRow:
    total = us * calls
    return CollectiveRow(
        collective=collective, message_bytes=message_bytes, num_calls=calls, total_us=total, min_us=us, max_us=us
    )


@given(
    st.floats(0, 200),
    st.floats(1e8, 1e12),
    st.lists(st.tuples(st.integers(1, 2**30), st.integers(1, 50)), min_size=2, max_size=12, unique_by=lambda p: p[0]),
)
def test_a_link_is_found_again(latency_us: float, bytes_per_s: float, points: list[tuple[int, int]]) -> None:
    """From times that are exactly latency and size over bandwidth."""
    fitted = fit_collective([row(size, latency_us + size / bytes_per_s * 1e6, calls) for size, calls in points])
    for size, _ in points:
        assert fitted.us(size) == pytest.approx(latency_us + size / bytes_per_s * 1e6, rel=1e-3)


def test_a_link_among_noise() -> None:
    """2 % up and down in turn, sizes of 1 KiB to 64 MiB."""
    sizes = [2**k for k in range(10, 27)]
    rows = [row(size, (20 + size / 150e9 * 1e6) * (1.02 if k % 2 else 0.98)) for k, size in enumerate(sizes)]
    fitted = fit_collective(rows)
    assert fitted.latency_us == pytest.approx(20, rel=0.03)
    assert fitted.bytes_per_s == pytest.approx(150e9, rel=0.03)


def test_a_latency_is_never_negative() -> None:
    """Times that grow faster than the size."""
    fitted = fit_collective([row(1000, 1), row(2000, 4)])
    assert fitted.latency_us == 0
    assert fitted.bytes_per_s > 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "0 kinds of collectives (); rows of one kind are accepted"),
        (
            [row(1, 1), row(2, 2, collective="broadcast")],
            f"2 kinds of collectives ({REDUCE}, broadcast over unknown ranks); rows of one kind are accepted",
        ),
        ([row(8, 1), row(8, 2)], f"{REDUCE}: 1 known sizes in 2 rows; two or more are accepted"),
        ([row(8, 1), row(9, 2), row(None, 2)], f"{REDUCE}: 2 known sizes in 3 rows; two or more are accepted"),
        ([row(8, 10), row(800, 1)], f"{REDUCE}: times do not grow with the size; a bandwidth cannot be told"),
    ],
)
def test_what_tells_of_no_link_is_refused(rows: list[CollectiveRow], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        fit_collective(rows)
    assert str(refused.value) == said
