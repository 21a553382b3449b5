"""What a profile bundle refuses: the file, the row, and what is expected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.sim.cost.profile_bundles import write_bundle
from xllm_lab.errors import ProfileError
from xllm_lab.sim.cost.profile_bundle import read_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "profile", skew=True)


def edit(folder: Path, name: str, pattern: str, replacement: str) -> None:
    path = folder / name
    text, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1, f"{pattern!r} is not in {name}"
    path.write_text(text)


def test_a_bundle_is_read(folder: Path) -> None:
    bundle = read_bundle(folder)
    assert bundle.model == "meta-llama/Llama-3.1-8B"
    assert bundle.dense["embedding"][1] == pytest.approx(3.0, rel=0.01)
    assert bundle.attention[16, 0, 0, 0] > 8
    assert bundle.moe == {}
    assert [s.excess_frac for s in bundle.skew if s.num_decodes == 2] == pytest.approx([0.1] * 15)


def test_a_bundle_says_itself_whether_its_skew_sweep_is_to_be_used(folder: Path) -> None:
    edit(folder, "meta.yaml", "enabled: true", "enabled: false")
    assert read_bundle(folder).skew == ()


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "told"),
    [
        (
            "tp1/per_sequence.csv",
            r"^lm_head,1,.*$",
            "lm_head,1,1000000000",
            r"per_sequence.csv, line 2: .*1000000000.*micro",
        ),
        ("tp1/dense.csv", r"^act_fn,1,.*$", "act_fn,1,0.0026", "another unit or no time"),
        ("tp1/dense.csv", r"^act_fn,2,.*$", "act_fn,2,0", "another unit or no time"),
        ("tp1/dense.csv", r"^act_fn,2,.*$", "act_fn,2,-3", "another unit or no time"),
        ("tp1/dense.csv", r"^act_fn,2,.*$", "act_fn,2,fast", r"line \d+: time_us is 'fast', a number is expected"),
        ("tp1/dense.csv", r"^act_fn,2,.*$", "act_fn,2,nan", "a number is expected"),
        ("tp1/dense.csv", r"^act_fn,2,.*$", "act_fn,2", "time_us is None, a number is expected"),
        ("tp1/dense.csv", r"^act_fn,2,", "act_fn,2.5,", "an integer of at least 1 is expected"),
        ("tp1/dense.csv", r"^act_fn,2,", "act_fn,1,", "is there twice"),
        ("tp1/dense.csv", r"^act_fn,64,.*\n", "", "act_fn has no row for 64 tokens"),
        ("tp1/dense.csv", "time_us", "time_ms", "line 1: no column time_us"),
        ("tp1/attention.csv", r"^0,0,4,64,.*\n", "", r"hole.*\(0, 0, 4, 64\)"),
        ("tp1/attention.csv", r"^64,16,2,16,.*\n", "", r"hole.*\(64, 16, 2, 16\)"),
        ("tp1/attention.csv", r"^16,0,0,0,", "0,0,0,0,", "measured nothing"),
        ("tp1/attention.csv", r"^0,0,2,16,", "0,0,1,16,", "is there twice"),
        ("tp1/skew.csv", r"^pure,2,1,4.0,0,0,16,64,", "pure,2,1,4.0,0,0,16,6,", "kv_mean is 40, at most kv_big"),
        ("meta.yaml", "^model:.*$", "", "no field 'model'"),
        ("meta.yaml", "^model:.*$", "model: [", "cannot be read as YAML"),
    ],
)
def test_what_cannot_be_right_is_refused(folder: Path, name: str, pattern: str, replacement: str, told: str) -> None:
    edit(folder, name, pattern, replacement)
    with pytest.raises(ProfileError, match=told) as refused:
        read_bundle(folder)
    assert str(folder / name) in str(refused.value)


@pytest.mark.parametrize(
    "name", ["meta.yaml", "tp1/dense.csv", "tp1/per_sequence.csv", "tp1/attention.csv", "tp1/skew.csv"]
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ProfileError, match=re.escape(str(folder / name))):
        read_bundle(folder)


def test_a_file_without_rows_is_refused(folder: Path) -> None:
    (folder / "tp1" / "dense.csv").write_text("layer,tokens,time_us\n")
    with pytest.raises(ProfileError, match="holds no rows"):
        read_bundle(folder)


def test_a_degree_that_was_not_profiled_is_refused(folder: Path) -> None:
    with pytest.raises(ProfileError, match="tp4: no such folder; the bundle has tp1"):
        read_bundle(folder, 4)


def test_longest_contexts_of_large_batches_may_be_missing(folder: Path) -> None:
    attention = read_bundle(folder).attention
    assert (0, 0, 16, 1024) in attention
    assert (0, 0, 32, 1024) not in attention
