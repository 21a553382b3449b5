"""What is asked of a server: requests, when they arrive, and what a prompt consists of.

A `Workload` is plain data. Engine and simulator serve the same one: a prompt that a trace gives only as lengths
and block hashes is synthesised, so that equal hashes become equal tokens and prefix hits are real in both hosts.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from numpy.random import Generator, default_rng  # numpy imports it late, and loses a ctrl-C that comes meanwhile

from xllm_lab.errors import ConfigError, TraceError
from xllm_lab.policies.api import RequestId

__all__ = [
    "ClosedLoop",
    "Priority",
    "Prompt",
    "Request",
    "RequestId",
    "Sampling",
    "Slo",
    "TokenIds",
    "Workload",
    "prompt_token_ids",
    "stream",
]

TokenIds = npt.NDArray[np.int32]


# Above the classes: their defaults are built, and so checked, while this module is read.
def _at_least(owner: str, name: str, value: float, least: int) -> None:
    if not value >= least:  # and so NaN is refused too
        raise TraceError(f"{owner}: {name} is {value}, at least {least} is accepted")


# 30 years. Sums of such times, and of ten thousand think times, are far from the 64 bits of a record.
LONGEST_US = 10**15


def _at_most_30_years(owner: str, name: str, value_us: int) -> None:
    if value_us > LONGEST_US:
        raise TraceError(f"{owner}: {name} is {value_us}, at most {LONGEST_US} is accepted")


class Priority(enum.IntEnum):
    """xLLM's request priorities; a smaller number is more urgent."""

    HIGH = 1
    NORMAL = 2
    LOW = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What the client was promised. `None` means no promise.

    Attributes:
        ttft_us: time to first token, from arrival.
        tpot_us: mean time per output token after the first.
        e2e_us: time to the last token, from arrival.
    """

    ttft_us: int | None = None
    tpot_us: int | None = None
    e2e_us: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("ttft_us", self.ttft_us), ("tpot_us", self.tpot_us), ("e2e_us", self.e2e_us)):
            if value is not None:
                _at_least("slo", name, value, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn from logits. `temperature` 0 is greedy.

    Attributes:
        temperature: logits are divided by it; 0 takes the largest logit, the smallest id among equals.
        top_k: keep the k largest logits; 0 keeps all.
        top_p: keep the smallest set whose probability reaches this fraction; 1 keeps all.
        seed: the draw for output position i depends on (seed, request id, i) alone, never on the batch.
        stop_token_ids: generation ends after one of these.
        ignore_eos: replay mode: exactly `Request.output_tokens` tokens are produced.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("top_k", self.top_k), ("seed", self.seed)):
            _at_least("sampling", name, value, 0)
        if not math.isfinite(self.temperature):
            raise TraceError(f"sampling: temperature is {self.temperature}, a finite number is accepted")
        if not 0 < self.top_p <= 1:
            raise TraceError(f"sampling: top_p is {self.top_p}, more than 0 and at most 1 is accepted")
        for token_id in self.stop_token_ids:
            _at_least("sampling", "stop token id", token_id, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt of `num_tokens`, given as token ids or as block hashes.

    With neither, its tokens are unique to the request. With `block_hashes`, tokens
    `[i * hash_block_tokens, (i + 1) * hash_block_tokens)` are a function of `block_hashes[i]` alone; tokens after
    the last hash are unique to the request. Hashes beyond the prompt's end mean nothing.
    """

    num_tokens: int
    token_ids: tuple[int, ...] | None = None
    block_hashes: tuple[int, ...] = ()
    hash_block_tokens: int = 512

    def __post_init__(self) -> None:
        _at_least("prompt", "hash_block_tokens", self.hash_block_tokens, 1)
        for block_hash in self.block_hashes:
            _at_least("prompt", "block hash", block_hash, 0)
        if self.token_ids is not None:
            if len(self.token_ids) != self.num_tokens:
                raise TraceError(f"prompt: num_tokens is {self.num_tokens}, the {len(self.token_ids)} token_ids differ")
            for token_id in self.token_ids:
                _at_least("prompt", "token id", token_id, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as the client sends it.

    Attributes:
        id: its place in the workload; ties between equal times are broken by it.
        arrival_us: microseconds after the workload's start.
        output_tokens: tokens to produce (replay), or at most to produce when `sampling.ignore_eos` is off.
            No policy ever sees it.
        cancel_us: the client goes away at this time; `None` is never.
        kind: what the client says it is, as "code" or "chat"; no policy sees it.
    """

    id: RequestId
    arrival_us: int
    prompt: Prompt
    output_tokens: int
    slo: Slo = Slo()
    priority: Priority = Priority.NORMAL
    sampling: Sampling = Sampling()
    cancel_us: int | None = None
    kind: str = ""

    def __post_init__(self) -> None:
        owner = f"request {self.id}"
        _at_least(owner, "id", self.id, 0)
        _at_least(owner, "arrival_us", self.arrival_us, 0)
        _at_most_30_years(owner, "arrival_us", self.arrival_us)
        _at_least(owner, "prompt tokens", self.prompt.num_tokens, 1)
        _at_least(owner, "output_tokens", self.output_tokens, 1)
        if self.cancel_us is not None:
            _at_least(owner, "cancel_us", self.cancel_us, self.arrival_us)
            _at_most_30_years(owner, "cancel_us", self.cancel_us)

    def at(self, arrival_us: int) -> Request:
        """The same request at another time; the client's patience, `cancel_us - arrival_us`, moves with it."""
        cancel_us = None if self.cancel_us is None else self.cancel_us - self.arrival_us + arrival_us
        return replace(self, arrival_us=arrival_us, cancel_us=cancel_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """A fixed number of clients, each sending its next request `think_us` after its last one finished."""

    num_clients: int
    think_us: int = 0

    def __post_init__(self) -> None:
        _at_least("closed loop", "num_clients", self.num_clients, 1)
        _at_least("closed loop", "think_us", self.think_us, 0)
        _at_most_30_years("closed loop", "think_us", self.think_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in order of arrival, and where they came from.

    Attributes:
        requests: sorted by (arrival_us, id); ids are unique.
        closed_loop: if set, arrival times are ignored and clients send requests in order of id.
        source: file or generator, for people.
        checksum: of the source as it was read, for the manifest.
        seed: of synthesised prompts.
    """

    requests: tuple[Request, ...]
    closed_loop: ClosedLoop | None = None
    source: str = "made in memory"
    checksum: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.requests, key=lambda r: (r.arrival_us, r.id)))
        if not ordered:
            raise TraceError(f"{self.source}: no requests, at least one is accepted")
        if len({r.id for r in ordered}) != len(ordered):
            raise TraceError(f"{self.source}: request ids repeat; each must be unique")
        _at_least(self.source, "seed", self.seed, 0)
        object.__setattr__(self, "requests", ordered)


def prompt_token_ids(request: Request, *, vocab_size: int, seed: int) -> TokenIds:
    """The prompt's token ids, shape [num_tokens], each in [0, vocab_size).

    Synthesised tokens avoid the first sixteenth of the vocabulary, where tokenizers keep their special tokens.
    """
    prompt = request.prompt
    if prompt.token_ids is not None:
        return np.asarray(prompt.token_ids, dtype=np.int32)
    low = vocab_size // 16
    pieces: list[TokenIds] = []
    for block_hash in prompt.block_hashes[: -(-prompt.num_tokens // prompt.hash_block_tokens)]:
        pieces.append(_tokens((seed, 0, block_hash), prompt.hash_block_tokens, low, vocab_size))
    missing = prompt.num_tokens - sum(len(p) for p in pieces)
    if missing > 0:
        pieces.append(_tokens((seed, 1, request.id), missing, low, vocab_size))
    return np.concatenate(pieces)[: prompt.num_tokens]


def stream(seed: int, purpose: str) -> Generator:
    """The named random stream of a run: drawing from one never shifts another.

    Raises:
        ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}, at least 0 is accepted")
    return default_rng([seed, *purpose.encode()])


def _tokens(key: tuple[int, int, int], count: int, low: int, high: int) -> TokenIds:
    # The key is spelled out so that neither hash randomisation nor the order of requests can reach the tokens.
    return default_rng(list(key)).integers(low, high, count, dtype=np.int32)
