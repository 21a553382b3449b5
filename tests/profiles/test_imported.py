"""Imported folders: old and new releases make the same records, nothing is lost on the way, and flaws are named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles.folders import ascend_folder
from tests.profiles.golden_files import GOLDEN, NAMES, copy_of, releases, spoil
from xllm_lab import verbs
from xllm_lab.cli import run
from xllm_lab.errors import ConfigError, ProfileError, RunError
from xllm_lab.formats import own, read_trace
from xllm_lab.operator_table import read_operator_table
from xllm_lab.profiles import read_profile, sources
from xllm_lab.profiles.imported import (
    COLLECTIVES,
    MANIFEST,
    OPERATORS,
    STEPS,
    WORKLOAD,
    Imported,
    read_import,
    read_steps,
    write_import,
)
from xllm_lab.profiles.profile import BatchRow, Profile, RequestRow, SequencePart
from xllm_lab.profiles.steps import steps
from xllm_lab.profiles.trace import trace


def imported_records(path: Path, source: str, out: Path) -> dict[str, object]:
    """What stands in the folder, but for its manifest and for where the trace says it is from."""
    verbs.import_profile(source, path, out=out)
    found: dict[str, object] = {
        file.name: file.read_bytes() for file in out.iterdir() if file.name not in (MANIFEST, WORKLOAD)
    }
    if (out / WORKLOAD).exists():
        found[WORKLOAD] = read_trace(out / WORKLOAD).requests
    return found


def test_every_source_has_samples_of_two_releases() -> None:
    assert set(NAMES) == set(sources())
    assert all(len(releases(source)) == 2 for source in sources())


@pytest.mark.parametrize("source", NAMES)
def test_releases_import_to_the_same_records(tmp_path: Path, source: str) -> None:
    """Whatever columns are called and whatever units they have; and all of what the source can give is there."""
    one, other = (imported_records(path, source, tmp_path / str(k)) for k, path in enumerate(releases(source)))
    assert one == other
    assert (
        set(one)
        == {
            "ascend-profiler": {OPERATORS, COLLECTIVES},
            "hccl-test": {COLLECTIVES},
            "msserviceprofiler": {STEPS, WORKLOAD},
            "xllm-log": {STEPS, WORKLOAD},
            "xllm-profile": {STEPS},
        }[source]
    )


@pytest.mark.parametrize("source", NAMES)
def test_importing_again_gives_the_same_bytes(tmp_path: Path, source: str) -> None:
    path = releases(source)[0]
    for k in range(2):
        verbs.import_profile(source, path, out=tmp_path / str(k))
    files = [{file.name: file.read_bytes() for file in (tmp_path / str(k)).iterdir()} for k in range(2)]
    assert files[0] == files[1]


def test_units_are_told_as_they_were_found(tmp_path: Path) -> None:
    units = {
        release: read_import_of(tmp_path, "msserviceprofiler", release).units for release in ("current", "cann-8.1")
    }
    assert units["current"]["batch.csv: during_time"] == "ms"
    assert units["cann-8.1"]["batch.csv: during_time"] == "microsecond"
    kernels = read_import_of(tmp_path, "ascend-profiler", "2.13").units
    assert kernels["ASCEND_PROFILER_OUTPUT/kernel_details.csv: Duration"] == "us"


def read_import_of(tmp_path: Path, source: str, release: str) -> Imported:
    out = tmp_path / f"{source}-{release}"
    written = verbs.import_profile(source, GOLDEN / source / release / NAMES[source], out=out)
    assert read_import(out) == written
    return written


# A table of a sample, a column, and another unit in its header, with the numbers left as they are.
UNITS = [
    ("ascend-profiler/2.13/kernel_details.csv", "Duration(us)", "Duration(ticks)"),
    ("ascend-profiler/older/op_statistic.csv", "Total Time(us)", "Total Time(cycles)"),
    ("ascend-profiler/2.13/operator_details.csv", "Host Self Duration(us)", "Host Self Duration(h)"),
    ("msserviceprofiler/current/batch.csv", "during_time(ms)", "during_time(min)"),
    ("msserviceprofiler/current/forward.csv", "during_time(ms)", "during_time(min)"),
    ("msserviceprofiler/current/request.csv", "execution_time(ms)", "execution_time(min)"),
    ("msserviceprofiler/cann-8.1/batch.csv", "end_time(microsecond)", "end_time(musec)"),
]


@pytest.mark.parametrize(("table", "column", "instead"), UNITS)
def test_a_unit_that_nobody_knows_is_refused(tmp_path: Path, table: str, column: str, instead: str) -> None:
    path, file = sample_of(table, tmp_path)
    spoil(file, column, instead)
    name, unit = instead.rstrip(")").split("(")
    said = f"{file}:1: unit of {name} is {unit!r}; ns, us, microsecond, ms, millisecond, s or second is accepted"
    assert refused(path, table) == said


WRONG = [
    ("ascend-profiler/2.13/op_statistic.csv", "Total Time(us)", "Total Time(ms)", "Count times the mean"),
    (
        "msserviceprofiler/current/batch.csv",
        "during_time(ms)",
        "during_time(s)",
        "from its start to its end, or another",
    ),
    (
        "msserviceprofiler/cann-8.1/batch.csv",
        "during_time(microsecond)",
        "during_time(ms)",
        "or another unit in the header",
    ),
]


@pytest.mark.parametrize(("table", "column", "instead", "told"), WRONG)
def test_a_unit_that_other_columns_deny_is_refused(
    tmp_path: Path, table: str, column: str, instead: str, told: str
) -> None:
    path, file = sample_of(table, tmp_path)
    spoil(file, column, instead)
    said = refused(path, table)
    assert said.startswith(f"{file}:2: {instead} is ") or said.startswith(f"{file}:3: {instead} is ")
    assert told in said


MISSING = [
    ("ascend-profiler/2.13/kernel_details.csv", "Duration(us)"),
    ("ascend-profiler/older/kernel_details.csv", "Type"),
    ("ascend-profiler/2.13/op_statistic.csv", "Count"),
    ("ascend-profiler/2.13/step_trace_time.csv", "Free"),
    ("ascend-profiler/2.13/operator_details.csv", "Host Self Duration(us)"),
    ("msserviceprofiler/current/batch.csv", "start_time(ms)"),
    ("msserviceprofiler/cann-8.1/batch.csv", "name"),
    ("msserviceprofiler/cann-8.1/request.csv", "recv_token_size"),
    ("msserviceprofiler/current/forward.csv", "during_time(ms)"),
]


@pytest.mark.parametrize(("table", "column"), MISSING)
def test_a_missing_column_is_named(tmp_path: Path, table: str, column: str) -> None:
    path, file = sample_of(table, tmp_path)
    header, rows = file.read_text().split("\n", 1)
    others = ["other" if told == column else told for told in header.split(",")]
    file.write_text(f"{','.join(others)}\n{rows}")
    wanted = column.split("(", maxsplit=1)[0]
    said = refused(path, table)
    assert re.fullmatch(
        rf"{re.escape(str(file))}:1: column {wanted}\S* is missing \(.*\); {wanted}\S* is accepted", said
    )


def sample_of(table: str, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the sample that has this table, and where the table lies in it."""
    source, release, name = table.split("/")
    path = copy_of(source, release, tmp_path / "p")
    (file,) = path.rglob(name)
    return path, file


def refused(path: Path, table: str) -> str:
    """What the reader of a sample says against it, in one line."""
    with pytest.raises(ProfileError) as said:
        read_profile(path, source=table.split("/", maxsplit=1)[0])
    assert "\n" not in str(said.value)
    return str(said.value)


TABLES = sorted(file.relative_to(GOLDEN).as_posix() for file in GOLDEN.rglob("*.csv"))


@pytest.mark.parametrize("table", TABLES)
def test_a_table_whose_last_line_has_no_end_is_refused(tmp_path: Path, table: str) -> None:
    """Its cells are all there, and the last one may have been longer."""
    source, release, *_, name = table.split("/")
    path, file = sample_of(f"{source}/{release}/{name}", tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    last = content.count(b"\n")
    said = f"{file}:{last}: row has no end of line, so the file was cut off; a whole file is accepted"
    assert refused(path, source) == said


@given(st.sampled_from(TABLES), st.data())
def test_a_table_cut_off_within_a_line_is_refused(
    tmp_path_factory: pytest.TempPathFactory, table: str, data: st.DataObject
) -> None:
    """Wherever it was cut: half a number is a number, so the line's end is what tells."""
    source, release, *inside = Path(table).parts
    path = copy_of(source, release, tmp_path_factory.mktemp("p") / "p")
    file = path.joinpath(*inside)
    content = file.read_bytes()
    cuts = [k for k in range(1, len(content)) if content[k - 1 : k] not in (b"\n", b"\r")]
    file.write_bytes(content[: data.draw(st.sampled_from(cuts))])
    with pytest.raises(ProfileError) as refused:
        read_profile(path, source=source)
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


@given(st.data())
def test_other_files_cut_off_anywhere_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Within hccl_test's table, or anywhere in an instance's JSON; a log may end anywhere, see `test_xllm_log`."""
    source, release = data.draw(
        st.sampled_from([("hccl-test", "current"), ("hccl-test", "corrected-spelling"), ("xllm-profile", "value")])
    )
    path = copy_of(source, release, tmp_path_factory.mktemp("p") / "p")
    content = path.read_bytes()
    if source == "hccl-test":
        start = content.rindex(b"\n", 0, len(content) - 1) + 1
        cut = data.draw(st.integers(start + 1, len(content) - 3))
        if b"|" not in content[start:cut]:
            return  # a line without cells is text between tables
    else:
        cut = data.draw(st.integers(0, len(content) - 3))
    path.write_bytes(content[:cut])
    with pytest.raises(ProfileError) as refused:
        read_profile(path, source=source)
    assert str(refused.value).startswith(f"{path}:")
    assert "\n" not in str(refused.value)


lengths = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 9000)), max_size=4)
batch = st.builds(
    lambda chunks, us: BatchRow(
        line=1,
        step_us=us,
        parts=tuple(
            SequencePart(request=str(k), num_tokens=new, num_computed_tokens=computed)
            for k, (new, computed) in enumerate(chunks)
        ),
    ),
    lengths,
    st.floats(0.001, 1e9),
)
request = st.builds(
    lambda arrival_us, prompt, output: RequestRow(
        request="r",
        prompt_tokens=prompt,
        output_tokens=output,
        arrival_us=arrival_us,
        e2e_us=1.5,
        queue_us=None,
        ttft_us=None,
    ),
    st.none() | st.integers(0, 2**49),
    st.integers(0, 9000),
    st.integers(0, 9),
)


@given(st.lists(batch, max_size=6), st.lists(request, max_size=6))
def test_what_is_not_in_the_folder_is_counted(
    tmp_path_factory: pytest.TempPathFactory, batches: list[BatchRow], requests: list[RequestRow]
) -> None:
    """Each batch is a sample or left out, each request in the trace or left out; samples come back as they were."""
    path = tmp_path_factory.mktemp("p")
    profile = Profile(source="test", path=path, batches=tuple(batches), requests=tuple(requests))
    found = steps(profile)
    served = trace(profile).workload
    if not found.samples and served is None:
        with pytest.raises(ConfigError, match="has no steps, operators, collectives or requests"):
            write_import(profile, path / "out")
        assert not (path / "out").exists()
        return
    imported = write_import(profile, path / "out")
    assert sum(imported.parts.values()) + sum(left.num_rows for left in imported.left_out) == len(batches) + len(
        requests
    )
    assert sum(imported.num_by_basis.values()) == imported.parts.get(STEPS, 0)
    assert set(imported.parts) == {STEPS, OPERATORS, COLLECTIVES, WORKLOAD} - set(imported.missing)
    if found.samples:
        assert tuple(read_steps(path / "out")) == found.samples
    if served is not None:
        known = [r for r in requests if r.arrival_us is not None and r.prompt_tokens and r.output_tokens]
        ordered = sorted(known, key=lambda r: r.arrival_us or 0)
        start_us = ordered[0].arrival_us or 0
        assert [(r.arrival_us, r.prompt.num_tokens, r.output_tokens) for r in served.requests] == [
            ((r.arrival_us or 0) - start_us, r.prompt_tokens, r.output_tokens) for r in ordered
        ]
        assert own.read(path / "out" / WORKLOAD).requests == served.requests


def test_a_clock_that_was_set_while_requests_came_is_refused(tmp_path: Path) -> None:
    """Requests of 1970 and of today: no trace is that long."""
    rows = [
        RequestRow(request="r", prompt_tokens=1, output_tokens=1, arrival_us=us, e2e_us=1, queue_us=None, ttft_us=None)
        for us in (0, 10**15 + 1)
    ]
    with pytest.raises(ProfileError, match=r"requests arrive over 1e\+09 s; at most 1e\+09 s are accepted"):
        trace(Profile(source="test", path=tmp_path, requests=tuple(rows)))


def test_kernels_are_kept_and_what_a_bundle_needs_is_told(tmp_path: Path) -> None:
    folder, out = ascend_folder(tmp_path / "npu"), tmp_path / "out"
    imported = verbs.import_profile("ascend-profiler", folder, out=out)
    assert read_operator_table(out / OPERATORS) == read_profile(folder).operators
    rows = (out / COLLECTIVES).read_text().splitlines()
    assert rows[0] == "collective,device,group,num_ranks,message_bytes,num_calls,total_us,min_us,max_us"
    assert rows[1:] == ["all_reduce,0,503,,,6,118.8,19.8,19.8"]
    hidden = "KV lengths of 6 calls of attention, whose shapes are the whole pool's"
    assert imported.missing == {
        STEPS: "no executed batches",
        WORKLOAD: "no requests",
        "bundle of `simulate --profile`": f"not recorded: which layer of the model a kernel serves; {hidden}",
    }
    shown = {left.reason: left.num_rows for left in imported.left_out}
    assert shown["a step's split of its time, which `profile` shows"] == 2
    assert shown["an operator's time on the host, which `profile` shows"] == 2


def test_a_story_at_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = releases("xllm-log")[0], tmp_path / "out"
    assert run(["import", "xllm-log", str(log), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: from xllm.INFO, xllm-log\n")
    assert "3 steps: lengths as recorded\n" in said
    assert "xllm.INFO: a request's line that is cut off or damaged" in said
    assert "no operators.csv: no kernels\n" in said
    assert run(["import", "xllm-log", str(log), "--out", str(tmp_path / "again"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["parts"] == {STEPS: 3, WORKLOAD: 3}
    assert value["source"] == "xllm-log"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nsys", "."], "source 'nsys' is unknown; one of ascend-profiler, hccl-test, msserviceprofiler, xllm-log,"),
        (["xllm-log", "absent.log"], "absent.log: is not there; a profile is accepted"),
        (["xllm-log", str(GOLDEN / "README.md")], "no request and no batch can be read (4 lines: neither"),
        (["ascend-profiler", str(GOLDEN)], "has no ASCEND_PROFILER_OUTPUT with kernel_details.csv"),
        (["xllm-profile", str(GOLDEN / "README.md")], "README.md:1: is no JSON (Expecting value at column 1)"),
        (
            ["msserviceprofiler", str(releases("msserviceprofiler")[0]), "--kv-block-tokens", "0"],
            "kv_block_tokens is 0",
        ),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert run(["import", *words, "--out", str(tmp_path / "out")]) == 2
    heard = capsys.readouterr()
    assert said in heard.err
    assert heard.err.count("\n") == 1
    assert not heard.out
    assert not (tmp_path / "out").exists()


def test_a_folder_is_never_written_over(tmp_path: Path) -> None:
    log = releases("xllm-log")[0]
    verbs.import_profile("xllm-log", log, out=tmp_path / "out")
    with pytest.raises(RunError, match="exists already"):
        verbs.import_profile("xllm-log", log, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "spoiled"),
    [
        (MANIFEST, "{}"),
        (MANIFEST, '{"format": 0}'),
        (MANIFEST, '{"format": 1, "left_out": [{}], "notes": []}'),
        (MANIFEST, "["),
        (STEPS, "PAR1"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str, spoiled: str) -> None:
    verbs.import_profile("xllm-log", releases("xllm-log")[0], out=tmp_path / "out")
    (tmp_path / "out" / name).write_text(spoiled)
    with pytest.raises(RunError, match=rf"{name}: .*accepted: a folder, as `import` writes it"):
        read_steps(tmp_path / "out")


def test_steps_that_the_manifest_does_not_count_are_refused(tmp_path: Path) -> None:
    """Files of two imports that were mixed up."""
    one, other = tmp_path / "one", tmp_path / "other"
    verbs.import_profile("xllm-log", releases("xllm-log")[0], out=one)
    verbs.import_profile("xllm-profile", releases("xllm-profile")[0], out=other)
    (other / STEPS).rename(one / STEPS)
    with pytest.raises(RunError, match=r"steps.parquet: holds 6 steps, import.json says 3"):
        read_steps(one)


def test_the_manifest_is_a_dataclass_of_json(tmp_path: Path) -> None:
    """Every field of what was written is there, under its name."""
    out = tmp_path / "out"
    written = verbs.import_profile("xllm-log", releases("xllm-log")[0], out=out)
    assert set(json.loads((out / MANIFEST).read_text())) == {field.name for field in dataclasses.fields(written)}
