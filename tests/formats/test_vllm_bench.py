"""vLLM's benchmark results: what was asked is read, what was measured is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.formats.refusals import assert_refused, assert_refuses_what_is_no_text_file
from xllm_lab.errors import TraceError
from xllm_lab.formats import read_trace, vllm_bench

RESULT = {
    "backend": "vllm",
    "request_rate": 2.0,
    "request_throughput": 1.9,
    "input_lens": [100, 200],
    "output_lens": [10, 20],
    "ttfts": [0.1, 0.2],
    "itls": [[0.01], [0.02]],
    "start_times": [5000.25, 5000.75],
    "errors": ["", ""],
}
REQUEST = {"request_id": "bench-0", "input_toks": 2358, "output_toks": 531, "arrival_time": 1787267980.0827403}
SECONDS = "a number from 0 to 1e+12 is accepted"
DETAILED = "a list, as `vllm bench serve --save-result --save-detailed` records it, is accepted"


def result(**cells: object) -> str:
    return json.dumps({name: cell for name, cell in (RESULT | cells).items() if cell != "left out"})


def request(**cells: object) -> str:
    return json.dumps({name: cell for name, cell in (REQUEST | cells).items() if cell != "left out"})


def told(path: Path, content: str) -> list[tuple[int, int, int]]:
    path.write_text(content)
    return [(r.arrival_us, r.prompt.num_tokens, r.output_tokens) for r in read_trace(path).requests]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_result_document_is_read_on_one_line_or_many(tmp_path: Path, indent: int | None) -> None:
    assert told(tmp_path / "r.json", json.dumps(RESULT, indent=indent)) == [(0, 100, 10), (500_000, 200, 20)]


def test_failed_requests_are_left_out_and_counted(tmp_path: Path) -> None:
    """A request that failed has no output length, and its start may never have been noted."""
    content = result(errors=["", "timed out"], output_lens=[10, 0], start_times=[5000.25, 0.0])
    assert told(tmp_path / "r.json", content) == [(0, 100, 10)]
    assert read_trace(tmp_path / "r.json").source == "r.json (1 failed requests left out)"


def test_requests_of_a_measured_run_keep_their_microseconds(tmp_path: Path) -> None:
    later = request(arrival_time=1787267980.3478317, input_toks=1034, output_toks=769)
    assert told(tmp_path / "requests.jsonl", f"{request()}\n{later}\n") == [(0, 2358, 531), (265_091, 1034, 769)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (result(input_lens="left out"), f"input_lens is missing; {DETAILED}"),
        (result(start_times="left out"), f"start_times is missing; {DETAILED}"),
        (result(output_lens=[10]), "output_lens has 1 entries; one for each of the 2 input_lens is accepted"),
        (result(output_lens=[10, 0]), "output_lens[1] is 0; an integer from 1 to 2147483647 is accepted"),
        (result(start_times=[5000.25, float("nan")]), f"start_times[1] is nan; {SECONDS}"),
        (result(start_times=[5000.25, "late"]), f"start_times[1] is 'late'; {SECONDS}"),
        (request(arrival_time="left out"), f"arrival_time is missing; {SECONDS}"),
        (request(arrival_time=-1.0), f"arrival_time is -1.0; {SECONDS}"),
        (request(input_toks="many"), "input_toks is 'many'; an integer from 1 to 2147483647 is accepted"),
    ],
)
def test_a_flaw_is_named(tmp_path: Path, content: str, said: str) -> None:
    assert_refused(read_trace, tmp_path / "r.json", content, f"1: {said}")


def test_a_cut_document_is_refused_at_its_last_line(tmp_path: Path) -> None:
    cut = json.dumps(RESULT, indent=2)[:60]
    path = tmp_path / "r.json"
    path.write_text(cut)
    with pytest.raises(TraceError, match=rf"^{path}:{cut.count(chr(10)) + 1}: row is .* a JSON object is accepted$"):
        read_trace(path)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    assert_refuses_what_is_no_text_file(vllm_bench.read, tmp_path)
