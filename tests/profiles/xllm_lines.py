"""Lines as an xLLM server logs them (`request.cpp`, `continuous_scheduler.cpp` and `pd_ooc_scheduler.cpp`)."""

from __future__ import annotations

PREFIX = "I20251114 16:20:{at} 114580 {file}:109] "
PREDICTED = PREFIX.format(at="45.000000", file="pd_ooc_scheduler.cpp") + " - PERF_MODEL_DEBUG: 28.412 ms"
OTHER = PREFIX.format(at="39.000000", file="master.cpp") + "Creating worker process, devices: npu:0"


def request_line(
    *,
    at: str = "42.901324",
    name: str = "chatcmpl-a",
    sequence: int = 0,
    prompt: int = 21,
    cached: int = 0,
    output: int = 135,
    ttft: str = "81.0ms",
    total: str = "3541.6ms",
    header: str = "",
    is_short: bool = False,
) -> str:
    """As xLLM writes it; the short form is that of earlier builds."""
    hits = "" if is_short else f"num_prefix_cache_tokens: {cached}, "
    tail = "" if is_short else ", avg tpot: 25.8ms, generation speed: 39.0 tokens/s"
    return (
        f"{PREFIX.format(at=at, file='request.cpp')}x-request-id: {header}, x-request-time: , request_id: {name}, "
        f"sequence {sequence}, max_tokens: 5120, temperature: 0.7, finish_reason: stop, prompt_tokens: {prompt}, "
        f"{hits}generated_tokens: {output}, ttft: {ttft}, total_latency: {total}{tail}"
    )


def failed_line(code: int = 3) -> str:
    return (
        f"{PREFIX.format(at='43.000000', file='request.cpp')}x-request-id: , x-request-time: , request_id: chatcmpl-f, "
        f"sequence 0, max_tokens: 5120, temperature: 0, prompt_tokens: 90000, status_code : {code}, status_msg : Long"
    )


def batch_line(lengths: list[int], time: str = "31.250 ms") -> str:
    told = ", ".join(map(str, lengths))
    prefix = PREFIX.format(at="44.000000", file="continuous_scheduler.cpp")
    return f"{prefix}PERF - bs={len(lengths)} - [{told}] - {time}"
