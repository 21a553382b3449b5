"""A log of xLLM: every line is a request, a batch, or counted; whatever was cut off, wherever."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles.refused import assert_refused, refusal_of
from tests.profiles.xllm_lines import OTHER, PREDICTED, batch_line, failed_line, request_line
from xllm_lab.profiles import Profile, read_profile
from xllm_lab.profiles.sources.xllm_log import HOLDS, TAKEN_AS_DECODES
from xllm_lab.profiles.steps import EXACT, steps
from xllm_lab.profiles.trace import trace
from xllm_lab.step_time import Chunk


def read(folder: Path, *lines: str, end: str = "\n") -> Profile:
    path = folder / "xllm.INFO"
    path.write_text("\n".join(lines) + end, newline="")
    return read_profile(path)


def left_out(profile: Profile) -> dict[str, int]:
    return {left.reason: left.num_rows for left in profile.left_out}


def test_a_request_of_either_build(tmp_path: Path) -> None:
    """It arrived when it ended, less its total latency."""
    new, old = read(tmp_path, request_line(cached=16)), read(tmp_path, request_line(is_short=True))
    for profile, cached in ((new, 16), (old, None)):
        (request,) = profile.requests
        assert (request.request, request.prompt_tokens, request.output_tokens) == ("chatcmpl-a", 21, 135)
        assert (request.ttft_us, request.e2e_us, request.cached_tokens) == (81_000, 3_541_600, cached)
        # 2025-11-14 16:20:42.901324 in seconds since 1970, as `date -u +%s` has it.
        assert request.arrival_us == 1_763_137_242_901_324 - 3_541_600
        assert not profile.left_out
    assert new.notes == ("16 of 21 prompt tokens were found in the prefix cache; which prompts began alike is not "
                         "logged, so those of the trace share nothing",)  # fmt: skip


def test_batches_are_decodes_of_exact_lengths(tmp_path: Path) -> None:
    """The length has the token that the step computes."""
    profile = read(tmp_path, batch_line([4099, 513]), PREDICTED)
    found = steps(profile)
    (sample,) = found.samples
    assert sample.chunks == (Chunk(1, 4098), Chunk(1, 512))
    assert (sample.num_logits, sample.step_us) == (2, 31_250)
    assert found.num_by_basis == {EXACT: 1}
    assert left_out(profile) == {"PERF_MODEL_DEBUG, which is what xLLM expected and did not measure": 1}


def test_batches_of_an_instance_that_may_prefill_are_told_apart(tmp_path: Path) -> None:
    """Only decode instances predict their steps; a prefill instance logs its prompts as they log their decodes."""
    assert steps(read(tmp_path, batch_line([4099, 513]))).num_by_basis == {TAKEN_AS_DECODES: 1}


def test_the_story_of_a_log(tmp_path: Path) -> None:
    """Lines in order of ends, requests in order of arrivals; what no trace can hold is counted."""
    profile = read(
        tmp_path,
        OTHER,
        request_line(at="42.000000", total="500.0ms", prompt=10, output=5),
        request_line(at="42.100000", total="2000.0ms", prompt=20, output=6),
        request_line(at="42.100000", total="2000.0ms", prompt=20, output=7, sequence=1),
        request_line(at="42.200000", total="100.0ms", prompt=30, output=2**64 - 1),
        failed_line(3),
        failed_line(3),
        failed_line(14),
        batch_line([]),
        batch_line([7], "0.000 ms"),
    )
    made = trace(profile)
    assert made.workload is not None
    assert [(r.arrival_us, r.prompt.num_tokens, r.output_tokens) for r in made.workload.requests] == [
        (0, 20, 6),
        (1_400_000, 10, 5),
    ]
    assert [(left.reason, left.num_rows) for left in made.left_out] == [
        ("a request without a prompt or without an output", 1)
    ]
    assert left_out(profile) == {
        "neither a request's nor a batch's line": 1,
        "a further sequence of a request that asked for several": 1,
        "a request that failed with status_code 3": 2,
        "a request that failed with status_code 14": 1,
        "a batch that took no time or has no sequences": 2,
    }


def test_what_a_client_calls_its_request_changes_nothing(tmp_path: Path) -> None:
    header = "PERF, request_id: x, sequence 9, generated_tokens: 1, total_latency: 1.0ms"
    (request,) = read(tmp_path, request_line(header=header)).requests
    assert (request.request, request.e2e_us) == ("chatcmpl-a", 3_541_600)


def test_a_decode_instance_has_not_seen_the_first_token(tmp_path: Path) -> None:
    assert read(tmp_path, request_line(ttft="0.0ms")).requests[0].ttft_us is None


def test_logs_put_together_hold_requests_twice(tmp_path: Path) -> None:
    (note,) = read(tmp_path, request_line(), request_line()).notes
    assert note.startswith("1 requests have an earlier one's id")


@pytest.mark.parametrize(("total", "unit"), [("3541.6ms", "ms"), ("3.5416s", "s"), ("3541600us", "us")])
def test_times_are_converted_by_their_unit(tmp_path: Path, total: str, unit: str) -> None:
    profile = read(tmp_path, request_line(total=total), batch_line([2], f"{total[: -len(unit)]} {unit}"))
    assert profile.requests[0].e2e_us == profile.batches[0].step_us == 3_541_600
    assert profile.units["xllm.INFO: total_latency"] == profile.units["xllm.INFO: step"] == unit


def test_lines_that_a_collector_began_or_ended(tmp_path: Path) -> None:
    """Containers' logs begin with a time of their own, and other systems end lines otherwise."""
    line = f"2025-11-14T16:20:42Z stdout F {request_line()}\r"
    assert read(tmp_path, line).requests == read(tmp_path, request_line()).requests


KINDS = {
    "request": request_line(),
    "old request": request_line(is_short=True),
    "sequence": request_line(sequence=1),
    "failed": failed_line(),
    "batch": batch_line([5, 6]),
    "idle": batch_line([]),
    "predicted": PREDICTED,
    "other": OTHER,
    "blank": "",
    "no day": request_line().replace("20251114", "20251399"),
}


@given(st.lists(st.sampled_from(sorted(KINDS))), st.data())
def test_every_line_is_used_or_counted(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], data: st.DataObject
) -> None:
    """Lines cut off at any place, too; and what was cut is never taken for what it was not."""
    whole = [KINDS[kind] for kind in kinds]
    lines = [line[: data.draw(st.integers(0, len(line)))] if data.draw(st.booleans()) else line for line in whole]
    profile = read(tmp_path_factory.mktemp("p"), *lines, KINDS["request"], KINDS["batch"])
    assert len(profile.requests) + len(profile.batches) + sum(left_out(profile).values()) == len(lines) + 2
    assert len({(r.prompt_tokens, r.output_tokens, r.e2e_us, r.ttft_us, r.arrival_us) for r in profile.requests}) == 1
    assert {(batch.step_us, len(batch.parts)) for batch in profile.batches} == {(31_250, 2)}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (request_line(ttft="81.0min"), "unit of ttft is 'min'; ns, us, microsecond, ms, millisecond, s or second"),
        (request_line(total="3.5h"), "unit of total_latency is 'h'; ns, us, microsecond, ms, millisecond, s or second"),
        (batch_line([2], "1.0 cycles"), "unit of step is 'cycles'; ns, us, microsecond, ms, millisecond, s or second"),
        (request_line(total="900000s"), "total_latency is 900000s; 0 to 86400s"),
        (batch_line([2], "7200.0 s"), "step is 7200.0s; 0 to 3600s"),
        (batch_line([2, 0]), "a length is 0; 1 to 2147483647"),
        (batch_line([2]).replace("bs=1", "bs=2"), "bs is 2 with 1 lengths; as many lengths"),
        (request_line(prompt=2**31), "prompt_tokens is 2147483648; at most 2147483647"),
    ],
)
def test_a_line_that_cannot_be_right_is_refused(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "xllm.INFO"
    path.write_text(f"{OTHER}\n{line}\n")
    assert_refused(path, f"{path}:2: {said} is accepted")


def test_a_log_in_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    """With the line of the first flaw, and how many there are."""
    path = tmp_path / "xllm.INFO"
    path.write_text(f"{OTHER}\n" + f"{request_line().replace('ttft', 'first_token')}\n" * 2)
    counts = "2 lines: a request's line that is cut off or damaged; 1 lines: neither a request's nor a batch's line"
    assert_refused(path, f"{path}:2: no request and no batch can be read ({counts}); {HOLDS} is accepted")


@given(st.binary(max_size=200))
def test_bytes_of_anything_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    """Within a line, between lines: never another error than the one for users."""
    path = tmp_path_factory.mktemp("p") / "xllm.INFO"
    line = KINDS["request"].encode()
    path.write_bytes(line[:80] + noise + line[80:] + b"\n" + KINDS["batch"].encode() + noise + b"\n")
    assert "\n" not in refusal_of(path, "xllm-log")
