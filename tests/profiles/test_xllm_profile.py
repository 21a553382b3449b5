"""What an instance of xLLM registers: prompts alone, decodes of a known sum, and tables that cannot be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles.golden_files import releases
from tests.profiles.refused import assert_refused, refusal_of
from xllm_lab.errors import ProfileError
from xllm_lab.profiles import read_profile
from xllm_lab.profiles.sources.xllm_profile import AVERAGE_LENGTHS, HOLDS
from xllm_lab.profiles.steps import EXACT, steps
from xllm_lab.step_time import Chunk


def instance(prompts: object, decodes: object, **fields: object) -> dict[str, object]:
    return {"name": "10.0.0.1:9000", **fields, "ttft_profiling_data": prompts, "tpot_profiling_data": decodes}


def written(folder: Path, *instances: dict[str, object], keys: bool = False) -> Path:
    path = folder / "instance.json"
    key = "XLLM:MIX:name\n" if keys else ""
    path.write_text("".join(f"{key}{json.dumps(told)}\n" for told in instances))
    return path


def test_rows_are_steps(tmp_path: Path) -> None:
    """A prompt from nothing; decodes of the average, whose last token is the step's."""
    found = steps(read_profile(written(tmp_path, instance([[4096, 412.5]], [[1024, 3, 20]]))))
    prompt, decodes = found.samples
    assert (prompt.chunks, prompt.num_logits, prompt.step_us) == ((Chunk(4096, 0),), 1, 412_500)
    assert (decodes.chunks, decodes.num_logits, decodes.step_us) == ((Chunk(1, 1023),) * 3, 3, 20_000)
    assert found.num_by_basis == {EXACT: 1, AVERAGE_LENGTHS: 1}


def test_the_sum_of_lengths_is_that_of_the_batch(tmp_path: Path) -> None:
    """All that a model linear in lengths can see of lengths that were drawn around their average."""
    drawn = [64, 900, 2108]
    (sample,) = steps(read_profile(written(tmp_path, instance([], [[sum(drawn) // 3, 3, 20]])))).samples
    assert sum(chunk.num_computed_tokens + 1 for chunk in sample.chunks) == sum(drawn)


def test_instances_of_several_keys(tmp_path: Path) -> None:
    """As `etcdctl get --prefix XLLM:` prints them."""
    told = (instance([[64, 9.5]], [], dp_size=2), instance([[32, 8.5]], [], name="10.0.0.2:9000"))
    profile = read_profile(written(tmp_path, *told, keys=True))
    assert [batch.step_us for batch in profile.batches] == [9500, 8500]
    assert profile.notes == (
        "instance '10.0.0.1:9000': tpot_profiling_data is empty",
        "instance '10.0.0.1:9000': batches are those of 2 data-parallel ranks together",
        "instance '10.0.0.2:9000': tpot_profiling_data is empty",
    )


row = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3)).map(list)


@given(st.lists(row, max_size=9), st.lists(row, max_size=9))
def test_every_row_is_a_step_or_counted(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]], decodes: list[list[int]]
) -> None:
    path = written(tmp_path_factory.mktemp("p"), instance([r[1:] for r in prompts], decodes))
    taken = sum(r[-1] > 0 for r in prompts + decodes)
    if not taken:
        with pytest.raises(ProfileError, match="hold no measured step; those of an instance of role MIX are accepted"):
            read_profile(path)
        return
    profile = read_profile(path)
    assert len(steps(profile).samples) == taken
    assert sum(left.num_rows for left in profile.left_out) == len(prompts) + len(decodes) - taken


@pytest.mark.parametrize(
    "row",
    [
        [],
        [64],
        [64, 1, 2],
        "64",
        None,
        [0, 9.5],
        [64.5, 9.5],
        [True, 9.5],
        [2**31, 9.5],
        [64, -1],
        [64, "9.5"],
        [64, 3.7e6],
        [64, float("nan")],
        [64, None],
    ],
)
def test_a_row_that_cannot_be_right_is_refused(tmp_path: Path, row: object) -> None:
    path = written(tmp_path, instance([[64, 9.5], row], []))
    accepted = "[tokens, milliseconds up to 3.6e+06] is accepted"
    assert_refused(path, f"{path}:1: ttft_profiling_data[1] is {row!r}; {accepted}")


def test_more_sequences_than_any_batch_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, instance([], [[64, 10**9, 9.5]]))
    accepted = "[average length, sequences up to 65536, milliseconds up to 3.6e+06] is accepted"
    assert_refused(path, f"{path}:1: tpot_profiling_data[0] is [64, 1000000000, 9.5]; {accepted}")


def test_flaws_of_the_whole_are_named(tmp_path: Path) -> None:
    told = instance([[64, 9.5]], [])
    del told["tpot_profiling_data"]
    path = written(tmp_path, told)
    found = "tpot_profiling_data is missing (fields: name, ttft_profiling_data)"
    assert_refused(path, f"{path}:1: {found}; tpot_profiling_data is accepted")
    path = written(tmp_path, instance({"qwen3": []}, []))
    assert_refused(path, f"{path}:1: ttft_profiling_data is {{'qwen3': []}}; a list of rows is accepted")
    path.write_text('{"ttft_profiling_data": [[64,\n')
    assert_refused(path, f"{path}:2: is no JSON (Expecting value at column 1); {HOLDS} is accepted")
    path.write_text('XLLM:MIX:a\n{"ttft_profiling_data": [[64,\n')
    assert_refused(path, f"{path}:2: is no JSON (Expecting value at column 30); {HOLDS} is accepted")


@given(st.binary(min_size=1, max_size=8), st.data())
def test_bytes_of_anything_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, data: st.DataObject
) -> None:
    content = data.draw(st.sampled_from(releases("xllm-profile"))).read_bytes()
    at = data.draw(st.integers(0, len(content)))
    path = tmp_path_factory.mktemp("p") / "instance.json"
    path.write_bytes(content[:at] + noise + content[at:])
    assert "\n" not in refusal_of(path, "xllm-profile")
