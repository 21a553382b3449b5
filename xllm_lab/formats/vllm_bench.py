"""What was asked of a vLLM server, from the results of benchmarking it.

Two forms, told apart by their first row:

- the JSON document that `vllm bench serve --save-result --save-detailed` writes: lists `input_lens`, `output_lens`,
  `start_times` (seconds on a monotonic clock, when the client sent the request) and `errors`, one entry per request;
- `requests.jsonl` of a measured run, one object a line: `input_toks`, `output_toks`, `arrival_time` (epoch seconds).

Times that the server took (ttfts, itls, queued_ts, ...) are results, not part of a workload, and are passed over.
A request that failed has no output length: it is left out, and `Workload.source` says how many were.
"""

from __future__ import annotations

from pathlib import Path

from xllm_lab.formats._rows import Arrival, Row, Text, json_row, load, nanoseconds, refusal, workload
from xllm_lab.workload import Prompt, Workload

NAME = "vllm-bench"

_NS_PER_S = 1_000_000_000
_REQUEST_FIELDS = ('"input_toks"', '"output_toks"')
# Written with and without --save-detailed, so that a result without details is recognised and told what it lacks.
_RESULT_FIELDS = ('"input_lens"', '"request_throughput"', '"total_input_tokens"')


def sniff(first_line: str, path: Path) -> bool:
    """Whether the first line is a row of requests.jsonl, or a result document (whole, or opening an indented one)."""
    known = any(field in first_line for field in (*_REQUEST_FIELDS, *_RESULT_FIELDS))
    return known or (path.suffix == ".json" and first_line.strip() == "{")


def read(path: Path) -> Workload:
    """The workload of a benchmark run; TraceError names the line and field of what cannot be read."""
    text = load(path)
    first_line = next(text.lines())[1]
    if any(field in first_line for field in _REQUEST_FIELDS):
        return workload([_request(json_row(path, number, line)) for number, line in text.lines()], text)
    return _result(json_row(path, 1, text.content), text)


def _request(row: Row) -> Arrival:
    return Arrival(
        nanoseconds(row.number("arrival_time"), _NS_PER_S),
        Prompt(num_tokens=row.whole("input_toks")),
        row.whole("output_toks"),
    )


def _result(document: Row, text: Text) -> Workload:
    lists = {name: _list(document, name) for name in ("input_lens", "output_lens", "start_times")}
    num_requests = len(lists["input_lens"])
    lists["errors"] = _list(document, "errors") if "errors" in document.cells else [""] * num_requests
    for name, items in lists.items():
        if len(items) != num_requests:
            found = f"{name} has {len(items)} entries"
            raise refusal(text.path, 1, found, f"one for each of the {num_requests} input_lens")
    succeeded = [i for i, error in enumerate(lists["errors"]) if not error]
    failed = num_requests - len(succeeded)
    arrivals = [_entry(document, lists, i) for i in succeeded]
    return workload(arrivals, text, note=f" ({failed} failed requests left out)" if failed else "")


def _list(document: Row, name: str) -> list[object]:
    items = document.cells.get(name)
    if not isinstance(items, list):
        raise document.refusal(name, "a list, as `vllm bench serve --save-result --save-detailed` records it,")
    return items


def _entry(document: Row, lists: dict[str, list[object]], i: int) -> Arrival:
    entry = Row(document.path, document.line, {f"{name}[{i}]": items[i] for name, items in lists.items()})
    return Arrival(
        nanoseconds(entry.number(f"start_times[{i}]"), _NS_PER_S),
        Prompt(num_tokens=entry.whole(f"input_lens[{i}]")),
        entry.whole(f"output_lens[{i}]"),
    )
