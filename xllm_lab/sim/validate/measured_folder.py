"""A measured machine as a folder: its operator profile, and what vLLM did with a workload on it.

    profile/                  see `sim.cost.profile_bundle`
    vllm/meta.json            engine arguments; with later benchmarks also what vLLM made of them, and its KV blocks
    vllm/requests.jsonl       request_id, input_toks, output_toks, arrival_time (epoch s), queued_ts, first_token_ts,
                              last_token_ts (s of the engine's monotonic clock)
    llmservingsim-summary.txt that simulator's rows beside vLLM's; may be absent
    llmservingsim-config.json its machine: memory, link; needed where meta.json does not tell the KV blocks

The form is that of LLMServingSim's benchmark (casys-kaist, commit 5daddb2, bench/). Times are judged as it does: from
the moment the engine's scheduler took the request (`queued_ts`), which is on the same clock as the tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from xllm_lab.errors import TraceError

STATISTICS = ("mean", "median", "P90", "P95", "P99")
METRICS = ("TTFT", "TPOT", "latency")
_SUMMARY_ROW = re.compile(r"^(TTFT|TPOT|Latency)\s+(Mean|Median|P90|P95|P99)\s+([\d.]+)\s+([\d.]+)\s", re.MULTILINE)


class MeasuredRequest(NamedTuple):
    """One request of the run. `arrival_s` counts from the first arrival, the others are on the engine's clock."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    queued_s: float
    first_token_s: float
    last_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredFolder:
    """What a folder holds.

    Attributes:
        meta: `vllm/meta.json`.
        config: `llmservingsim-config.json`; empty if there is none.
        reference_ms: (metric, statistic) -> (vLLM's, LLMServingSim's); empty if there is no summary.
    """

    path: Path
    meta: Mapping[str, Any]
    requests: tuple[MeasuredRequest, ...]
    config: Mapping[str, Any]
    reference_ms: Mapping[tuple[str, str], tuple[float, float]]

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def engine_argument(self, name: str, default: Any) -> Any:
        """What the engine was told, if it was told anything."""
        value = self.meta.get("engine_kwargs", {}).get(name)
        return default if value is None else value

    def resolved(self, section: str, name: str, default: Any) -> Any:
        """What the engine made of it, if the benchmark wrote that down."""
        value = self.meta.get("resolved_config", {}).get(section, {}).get(name)
        return default if value is None else value


def read_measured_folder(path: Path) -> MeasuredFolder:
    """Read a folder.

    Raises:
        TraceError: a missing or unreadable file, or a request without a field or with times that run backwards.
    """
    config = path / "llmservingsim-config.json"
    summary = path / "llmservingsim-summary.txt"
    return MeasuredFolder(
        path=path,
        meta=_json(path / "vllm" / "meta.json"),
        requests=_requests(path / "vllm" / "requests.jsonl"),
        config=_json(config) if config.exists() else {},
        reference_ms=_summary(summary) if summary.exists() else {},
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read ({error}); a folder with profile/ and vllm/ is accepted") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise TraceError(f"{path}: is no JSON ({error}); an object is accepted") from None
    if not isinstance(value, dict):
        raise TraceError(f"{path}: holds a JSON {type(value).__name__}; an object is accepted")
    return value


def _requests(path: Path) -> tuple[MeasuredRequest, ...]:
    rows = [(n, line) for n, line in enumerate(_text(path).splitlines(), start=1) if line.strip()]
    if not rows:
        raise TraceError(f"{path}: holds no requests; at least one is accepted")
    requests = [_request(path, number, line) for number, line in rows]
    first = min(r.arrival_s for r in requests)
    return tuple(r._replace(arrival_s=r.arrival_s - first) for r in requests)


def _request(path: Path, number: int, line: str) -> MeasuredRequest:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise TraceError(f"{path}, line {number}: is no JSON object; one request a line is accepted")

    def positive(name: str) -> float:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise TraceError(f"{path}, line {number}: {name} is {value!r}, a number above 0 is accepted")
        return float(value)

    times = [positive(name) for name in ("queued_ts", "first_token_ts", "last_token_ts")]
    if times != sorted(times):
        raise TraceError(
            f"{path}, line {number}: queued, first and last token are at {times} s; rising times are accepted"
        )
    counts = [positive(name) for name in ("input_toks", "output_toks")]
    if any(c != int(c) for c in counts):
        raise TraceError(f"{path}, line {number}: input_toks and output_toks are {counts}, integers are accepted")
    return MeasuredRequest(int(counts[0]), int(counts[1]), positive("arrival_time"), *times)


def _summary(path: Path) -> dict[tuple[str, str], tuple[float, float]]:
    metric = {"TTFT": "TTFT", "TPOT": "TPOT", "Latency": "latency"}
    statistic = {"Mean": "mean", "Median": "median"}
    found = {
        (metric[m], statistic.get(s, s)): (float(vllm), float(sim))
        for m, s, vllm, sim in _SUMMARY_ROW.findall(_text(path) + "\n")
    }
    if len(found) != len(METRICS) * len(STATISTICS):
        raise TraceError(f"{path}: has {len(found)} rows, expected {', '.join(METRICS)} by {', '.join(STATISTICS)}")
    return found
