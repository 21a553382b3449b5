"""A profile is found by what lies in its folder, and a new module is a new source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.profiles.folders import BATCH_HEADER, batch_row, torch_npu_folder, vllm_part, write_csv
from tests.profiles.refused import assert_refused
from xllm_lab.errors import ProfileError
from xllm_lab.profiles import read_profile, sources

ACCEPTED = "; ".join(f"{source.NAME}: {source.HOLDS}" for source in sources().values())


def test_every_source_of_the_package_is_found() -> None:
    assert set(sources()) >= {"hccl-test", "ms-service", "torch-npu"}


@pytest.mark.parametrize("where", [".", "npu01_4711_20260313101831169_ascend_pt"])
def test_a_folder_is_recognised_from_outside_and_from_inside(tmp_path: Path, where: str) -> None:
    inside = torch_npu_folder(tmp_path) / "ASCEND_PROFILER_OUTPUT"
    assert read_profile(str(tmp_path / where)).operators == read_profile(inside).operators


def test_what_is_no_profile_is_refused_with_what_would_be(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello\n")
    for path in (tmp_path, tmp_path / "notes.txt"):
        assert_refused(path, f"{path}: looks like none of the known profiles ({ACCEPTED}); name its source")
    absent = tmp_path / "absent"
    assert_refused(absent, f"{absent}: is not there; a profile is accepted ({ACCEPTED})")


def test_a_folder_of_two_profilers_needs_a_name(tmp_path: Path) -> None:
    torch_npu_folder(tmp_path)
    row = batch_row("modelExec", ms=20, parts=[vllm_part("a", 1, 1, 10, 10)])
    write_csv(tmp_path / "batch.csv", BATCH_HEADER, [row])
    both = "ms-service and torch-npu"
    assert_refused(tmp_path, f"{tmp_path}: looks like {both} of the known profiles ({ACCEPTED}); name its source")
    assert read_profile(tmp_path, source="ms-service").batches
    assert read_profile(tmp_path, source="torch-npu").operators.rows


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError) as refused:
        read_profile(tmp_path, source="nsys")
    assert str(refused.value) == f"{tmp_path}: source 'nsys' is unknown; one of {', '.join(sources())} is accepted"


def test_a_named_source_says_what_it_misses(tmp_path: Path) -> None:
    for name in ("ms-service", "torch-npu"):
        with pytest.raises(ProfileError, match=f"has n.*{sources()[name].HOLDS.split()[0]}"):
            read_profile(tmp_path, source=name)
