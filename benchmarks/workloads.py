"""What the speed benchmarks serve: plain workloads, quick to make, the same in every run."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xllm_lab import arrivals
from xllm_lab.formats import azure
from xllm_lab.workload import Prompt, Request, RequestId, Workload, stream

MAX_MODEL_LEN = 4096


def azure_conversation(trace: Path) -> Workload:
    """The requests of an Azure trace, each prompt shortened until prompt and output fit into `MAX_MODEL_LEN`.

    Vidur shortens prompts so, for models whose context is that long.
    """
    whole = azure.read(trace)
    return replace(whole, requests=tuple(_fitting(request) for request in whole.requests))


def fixed_length(num: int = 20_000, rate_per_s: float = 20.0, num_tokens: int = 512) -> Workload:
    """Prompts and outputs of `num_tokens` each at equal distances, as `dynamo.replay` makes them without a trace."""
    lengths = np.full((num, 2), num_tokens)
    return _made(lengths, arrivals.uniform(num, rate_per_s), f"{num} of {num_tokens}/{num_tokens} at {rate_per_s}/s")


def chat(num: int, rate_per_s: float, seed: int = 0) -> Workload:
    """Poisson arrivals of log-normal lengths with the log-moments of Azure's 2023 conversation trace.

    There, the logarithm of the prompt has mean 6.63 and standard deviation 0.99, that of the output 5.02 and 0.86. The
    largest output is 1,000 tokens. Makes about 200,000 requests a second, 0.3 KiB each.
    """
    drawn = stream(seed, "lengths").lognormal((6.63, 5.02), (0.99, 0.86), (num, 2))
    lengths = np.clip(np.rint(drawn).astype(np.int64), 1, (MAX_MODEL_LEN, 1000))
    lengths[:, 0] = np.minimum(lengths[:, 0], MAX_MODEL_LEN - lengths[:, 1])
    return _made(lengths, arrivals.poisson(num, rate_per_s, seed), f"{num} chats at {rate_per_s}/s")


def _fitting(request: Request) -> Request:
    room = MAX_MODEL_LEN - request.output_tokens
    return request if request.prompt.num_tokens <= room else replace(request, prompt=_prompt(room))


def _made(lengths: npt.NDArray[np.int64], arrival_us: tuple[int, ...], source: str) -> Workload:
    """`lengths` of shape [requests, 2]: tokens of prompt and output."""
    rows = zip(arrival_us, lengths.tolist(), strict=True)
    return Workload(
        requests=tuple(
            Request(id=RequestId(i), arrival_us=us, prompt=_prompt(prompt), output_tokens=output)
            for i, (us, (prompt, output)) in enumerate(rows)
        ),
        source=source,
    )


@functools.cache
def _prompt(num_tokens: int) -> Prompt:
    """One object for all prompts of a length: a million requests share a few thousand."""
    return Prompt(num_tokens=num_tokens)
