"""A profile is found by what lies in its folder, and a new module is a new source."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles.folders import (
    BATCH_HEADER,
    EPOCH_MS,
    FORWARD_HEADER,
    KVCACHE_HEADER,
    REQUEST_HEADER,
    ascend_folder,
    batch_row,
    vllm_part,
    write_csv,
)
from tests.profiles.refused import assert_refused
from xllm_lab.errors import ProfileError
from xllm_lab.profiles import read_profile, sources
from xllm_lab.profiles.steps import steps

ACCEPTED = "; ".join(f"{source.NAME}: {source.HOLDS}" for source in sources().values())


def test_every_source_of_the_package_is_found() -> None:
    assert set(sources()) >= {"ascend-profiler", "hccl-test", "msserviceprofiler", "xllm-log", "xllm-profile"}


@pytest.mark.parametrize("where", [".", "npu01_4711_20260313101831169_ascend_pt"])
def test_a_folder_is_recognised_from_outside_and_from_inside(tmp_path: Path, where: str) -> None:
    inside = ascend_folder(tmp_path) / "ASCEND_PROFILER_OUTPUT"
    assert read_profile(str(tmp_path / where)).operators == read_profile(inside).operators


def test_what_is_no_profile_is_refused_with_what_would_be(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello\n")
    for path in (tmp_path, tmp_path / "notes.txt"):
        assert_refused(path, f"{path}: looks like none of the known profiles ({ACCEPTED}); name its source")
    absent = tmp_path / "absent"
    assert_refused(absent, f"{absent}: is not there; a profile is accepted ({ACCEPTED})")


def test_a_folder_of_two_profilers_needs_a_name(tmp_path: Path) -> None:
    ascend_folder(tmp_path)
    row = batch_row("modelExec", ms=20, parts=[vllm_part("a", 1, 1, 10, 10)])
    write_csv(tmp_path / "batch.csv", BATCH_HEADER, [row])
    both = "ascend-profiler and msserviceprofiler"
    assert_refused(tmp_path, f"{tmp_path}: looks like {both} of the known profiles ({ACCEPTED}); name its source")
    assert read_profile(tmp_path, source="msserviceprofiler").batches
    assert read_profile(tmp_path, source="ascend-profiler").operators.rows


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError) as refused:
        read_profile(tmp_path, source="nsys")
    assert str(refused.value) == f"{tmp_path}: source 'nsys' is unknown; one of {', '.join(sources())} is accepted"


def test_a_named_source_says_what_it_misses(tmp_path: Path) -> None:
    for name in ("msserviceprofiler", "ascend-profiler"):
        with pytest.raises(ProfileError, match=f"has n.*{sources()[name].HOLDS.split()[0]}"):
            read_profile(tmp_path, source=name)


NUMBERS = ("", "N/A", "nan", "inf", "-1", "1e308", "1e999", "9" * 400, "0x10", "1,2", "1_0")
LISTS = ("[[[[", "{}", "[None]", "[{}]", "[{'rid': []}]", "[{'rid': 'a', 'type': []}]", "[{'rid': 1, 'iter': True}]")
NASTY = st.sampled_from((*NUMBERS, *LISTS, '"', "\t", "a\nb", ";", "\x00", "é")) | st.text(max_size=8)


@given(st.data())
def test_a_cell_of_anything_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """In any file, header included: never another error than the one for users, and never more than one line."""
    folder = tmp_path_factory.mktemp("p")
    ascend_folder(folder / "npu")
    parts = [vllm_part("a", 1, 1, 10, 10)]
    write_csv(
        folder / "svc" / "batch.csv", BATCH_HEADER, [batch_row("modelExec", ms=20, parts=parts, used_blocks=3)] * 2
    )
    write_csv(folder / "svc" / "request.csv", REQUEST_HEADER, [["a", "", 10, 5, 30.5, 2.5, 310, 0.75, EPOCH_MS]])
    forward = ["forward", 0, "", "", 19.4, "", 16, "Decode", 1, 0, 3, "npu01", EPOCH_MS, EPOCH_MS + 19]
    write_csv(folder / "svc" / "forward.csv", FORWARD_HEADER, [forward])
    write_csv(folder / "svc" / "kvcache.csv", KVCACHE_HEADER, [["", "allocate", 1, 2048, 9, 2039, 1, 0, "", ""]])
    path = data.draw(st.sampled_from(sorted(folder.rglob("*.csv"))))
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.integers(0, len(row) - 1))] = data.draw(NASTY)
    try:
        write_csv(path, rows[0], rows[1:])
    except (csv.Error, UnicodeEncodeError):
        return  # no file of this kind can hold it
    said = refused(path.parent)
    assert said is None or (said.startswith(str(path)) and "\n" not in said)


def refused(folder: Path) -> str | None:
    """What a reader says against a folder, if anything."""
    try:
        steps(read_profile(folder), kv_block_tokens=16)
    except ProfileError as error:
        return str(error)
    return None
