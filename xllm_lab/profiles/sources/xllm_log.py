"""Logs of an xLLM server, written through glog: what became of each request and, of some servers, each batch.

When a request ends, there is a line for each of its sequences (`Request::log_statistic`, xllm 3906f5a9):

    I20251114 16:20:42.901324 114580 request.cpp:109] x-request-id: , x-request-time: , request_id: chatcmpl-7,
    sequence 0, max_tokens: 5120, temperature: 0, finish_reason: stop, prompt_tokens: 21, num_prefix_cache_tokens: 0,
    generated_tokens: 135, ttft: 81.0ms, total_latency: 3541.6ms, avg tpot: 25.8ms, generation speed: 39.0 tokens/s

all on one line; it arrived at the line's time less its total latency. Earlier builds lack `num_prefix_cache_tokens` and
all behind `total_latency`. A failed request has a `status_code` instead of its latencies.

Instances that serve online and offline requests apart (`enable_pd_ooc`) tell each batch at VLOG(1)
(`ContinuousScheduler::step_with_pd_ooc`), with its sequences' lengths, the token that the step computes included:

    I20251114 16:20:42.901324 114580 continuous_scheduler.cpp:735] PERF - bs=2 - [4099, 513] - 31.250 ms

A prefill instance writes the same line about prompts. A decode instance is told by another one, PERF_MODEL_DEBUG, which
follows each of its own.

Several processes write into one log, disks fill up and logs are rotated: a line that is cut off or damaged is counted.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from xllm_lab.errors import ProfileError
from xllm_lab.profiles.profile import BatchRow, Profile, RequestRow, SequencePart
from xllm_lab.profiles.sources._csv import LONGEST_REQUEST_NS, LONGEST_STEP_NS, NS, UNITS, refusal, shown
from xllm_lab.profiles.sources._tally import Unused

NAME = "xllm-log"
HOLDS = "a log of xLLM, with lines of finished requests (INFO) or of batches (VLOG 1)"

TAKEN_AS_DECODES = "lengths as logged, taken to be decodes: a prefill instance logs its prompts alike"

_BATCH_MARK, _DECODE_MARK = "PERF - bs=", "PERF_MODEL_DEBUG"
_REQUEST_MARKS = ("x-request-id: ", "generated_tokens: ", "total_latency: ")
_SNIFFED_BYTES = 1 << 20

# Years stand in glog's prefix since its release 0.5. Whoever collects logs may write something before it.
_PREFIX = r"[IWEF](?P<year>\d{4})?(?P<month>\d\d)(?P<day>\d\d) (?P<time>\d\d:\d\d:\d\d\.\d{6}) +\d+ [^ \]]+:\d+\] "
# A client chooses its x-request-id; what counts is the last request_id.
_SEQUENCE = (
    r"x-request-id: .*, request_id: (?P<request>[^,]*), sequence (?P<sequence>\d+), max_tokens: -?\d+, "
    r"temperature: [^ ]+, "
)
_COUNT, _NUMBER, _UNIT = r"\d{1,20}", r"\d{1,20}(?:\.\d+)?", r"[^\d\s,.]+"
_ENDED = re.compile(
    rf"{_PREFIX}{_SEQUENCE}finish_reason: \w*, prompt_tokens: (?P<prompt>{_COUNT}), "
    rf"(?:num_prefix_cache_tokens: (?P<cached>{_COUNT}), )?generated_tokens: (?P<output>-?{_COUNT}), "
    rf"ttft: (?P<ttft>{_NUMBER})(?P<ttft_unit>{_UNIT}), "
    rf"total_latency: (?P<total_latency>{_NUMBER})(?P<total_latency_unit>{_UNIT})"
    rf"(?:, avg tpot: {_NUMBER}\w+, generation speed: {_NUMBER} tokens/s)?\Z"
)
_FAILED = re.compile(rf"{_PREFIX}{_SEQUENCE}prompt_tokens: \d+, status_code : (?P<code>\d+), status_msg : ")
_BATCH = re.compile(
    rf"PERF - bs=(?P<size>{_COUNT}) - \[(?P<lengths>(?:{_COUNT}(?:, {_COUNT})*)?)\] - "
    rf"(?P<step>{_NUMBER}) ?(?P<step_unit>{_UNIT})\Z"
)

_OTHER = "neither a request's nor a batch's line"
_DAMAGED_REQUEST = "a request's line that is cut off or damaged"
_DAMAGED_BATCH = "a batch's line that is cut off or damaged"
# Any year will do where none is told, if it has a 29th of February.
_SOME_YEAR = "2000"
_MOST_TOKENS = 2**31 - 1
_EPOCH = datetime.datetime(1970, 1, 1)
_MICROSECOND = datetime.timedelta(microseconds=1)


def recognises(path: Path) -> bool:
    """Whether a line of either kind stands in the first megabyte."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_SNIFFED_BYTES).decode("utf-8", errors="replace")
    return _BATCH_MARK in start or ("request_id: " in start and any(mark in start for mark in _REQUEST_MARKS))


def read(path: Path) -> Profile:
    """The requests and batches in a log; ProfileError names the line of what cannot be right."""
    found = _Found(path)
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                found.take(number, line.rstrip("\r\n"))
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); {HOLDS} is accepted") from error
    return found.profile()


@dataclass(slots=True)
class _Found:
    """What the lines said so far."""

    path: Path
    requests: list[RequestRow] = field(default_factory=list)
    batches: list[BatchRow] = field(default_factory=list)
    num_predicted: int = 0
    units: dict[str, str] = field(default_factory=dict)
    unused: Unused = field(default_factory=Unused)
    first_damaged: int | None = None

    def take(self, number: int, line: str) -> None:
        """Every line becomes a request, a batch, or a count."""
        if _BATCH_MARK in line:
            self._batch(number, line)
        elif _DECODE_MARK in line:
            self.num_predicted += 1
            self.unused.add(self.path.name, f"{_DECODE_MARK}, which is what xLLM expected and did not measure")
        elif any(mark in line for mark in _REQUEST_MARKS):
            self._request(number, line)
        else:
            self.unused.add(self.path.name, _OTHER)

    def profile(self) -> Profile:
        if not self.requests and not self.batches:
            where = self.path if self.first_damaged is None else f"{self.path}:{self.first_damaged}"
            told = "; ".join(f"{left.num_rows} lines: {left.reason}" for left in self.unused.rows())
            raise ProfileError(f"{where}: no request and no batch can be read ({told or 'empty'}); {HOLDS} is accepted")
        basis = "" if self.num_predicted else TAKEN_AS_DECODES
        return Profile(
            source=NAME,
            path=self.path,
            num_steps=len(self.batches),
            batches=tuple(replace(batch, basis=basis) for batch in self.batches),
            requests=tuple(self.requests),
            units=self.units,
            left_out=self.unused.rows(),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        cached = sum(request.cached_tokens or 0 for request in self.requests)
        if cached:
            prompts = sum(request.prompt_tokens for request in self.requests)
            yield (
                f"{cached} of {prompts} prompt tokens were found in the prefix cache; which prompts began alike is not "
                f"logged, so those of the trace share nothing"
            )
        again = len(self.requests) - len({request.request for request in self.requests})
        if again:
            yield f"{again} requests have an earlier one's id: together, prefill and decode instances log each twice"

    def _request(self, number: int, line: str) -> None:
        ended = _ENDED.search(line)
        if ended is None:
            failed = _FAILED.search(line)
            self._leave(number, f"a request that failed with status_code {failed['code']}" if failed else None)
            return
        finish_us = _microseconds(ended)
        if finish_us is None or (_is_cut(ended["total_latency_unit"]) and ended.end("total_latency_unit") == len(line)):
            self._leave(number, None)
            return
        if ended["sequence"] != "0":
            # A trace's request has one output.
            self.unused.add(self.path.name, "a further sequence of a request that asked for several")
            return
        ttft_ns = self._ns(number, ended, "ttft", LONGEST_REQUEST_NS)
        total_ns = self._ns(number, ended, "total_latency", LONGEST_REQUEST_NS)
        prompt_tokens, output_tokens = int(ended["prompt"]), int(ended["output"])
        if prompt_tokens > _MOST_TOKENS:
            raise refusal(self.path, number, f"prompt_tokens is {prompt_tokens}", f"at most {_MOST_TOKENS}")
        self.requests.append(
            RequestRow(
                request=ended["request"],
                prompt_tokens=prompt_tokens,
                # xLLM takes one token off, and 0 - 1 is the largest number of 64 bits there.
                output_tokens=output_tokens if 0 <= output_tokens <= _MOST_TOKENS else 0,
                arrival_us=finish_us - round(total_ns / 1e3),
                e2e_us=total_ns / 1e3,
                queue_us=None,
                ttft_us=ttft_ns / 1e3 if ttft_ns else None,  # a decode instance has not seen the first token
                cached_tokens=None if ended["cached"] is None else int(ended["cached"]),
            )
        )

    def _batch(self, number: int, line: str) -> None:
        batch = _BATCH.search(line)
        if batch is None or _is_cut(batch["step_unit"]):
            self.unused.add(self.path.name, _DAMAGED_BATCH)
            self.first_damaged = self.first_damaged or number
            return
        lengths = [int(length) for length in batch["lengths"].split(",") if length.strip()]
        if len(lengths) != int(batch["size"]):
            raise refusal(self.path, number, f"bs is {batch['size']} with {len(lengths)} lengths", "as many lengths")
        if not all(1 <= length <= _MOST_TOKENS for length in lengths):
            wrong = next(length for length in lengths if not 1 <= length <= _MOST_TOKENS)
            raise refusal(self.path, number, f"a length is {wrong}", f"1 to {_MOST_TOKENS}")
        ns = self._ns(number, batch, "step", LONGEST_STEP_NS)
        if not ns or not lengths:
            self.unused.add(self.path.name, "a batch that took no time or has no sequences", ns)
            return
        parts = tuple(
            SequencePart(request=str(k), is_prefill=False, num_tokens=1, num_computed_tokens=length - 1)
            for k, length in enumerate(lengths)
        )
        self.batches.append(BatchRow(line=number, step_us=ns / 1e3, parts=parts))

    def _leave(self, number: int, reason: str | None) -> None:
        if reason is None:
            self.first_damaged = self.first_damaged or number
        self.unused.add(self.path.name, reason or _DAMAGED_REQUEST)

    def _ns(self, number: int, line: re.Match[str], name: str, most: int) -> int:
        unit = line[f"{name}_unit"]
        if unit not in NS:
            raise refusal(self.path, number, f"unit of {name} is {shown(unit)}", UNITS)
        self.units[f"{self.path.name}: {name}"] = unit
        ns = float(line[name]) * NS[unit]
        if not ns <= most:
            raise refusal(self.path, number, f"{name} is {line[name]}{unit}", f"0 to {most / NS[unit]:g}{unit}")
        return round(ns)


def _is_cut(unit: str) -> bool:
    """Whether this is the beginning of a unit, as the end of a line that was cut."""
    return unit not in NS and any(known.startswith(unit) for known in NS)


def _microseconds(line: re.Match[str]) -> int | None:
    """Of the line's time, on the server's own clock; None for a day that there is not."""
    date = f"{line['year'] or _SOME_YEAR}-{line['month']}-{line['day']} {line['time']}"
    try:
        return (datetime.datetime.fromisoformat(date) - _EPOCH) // _MICROSECOND
    except ValueError:
        return None
