"""From one workload to another: pure functions that a notebook can chain.

A request keeps its id through every transform but `mix`: the tokens of a prompt that is given by its length alone are
drawn from the id, so a window or a sample asks for the very prompts the whole trace would ask for. `mix` has to
renumber, which gives such prompts other tokens; they are as unique as before, so no prefix hit appears or is lost.

A client's patience, from `arrival_us` to `cancel_us`, is its own: it moves with the arrival and never stretches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from xllm_lab.errors import ConfigError
from xllm_lab.workload import Prompt, Request, RequestId, Sampling, Slo, Workload, stream


def mean_rate_per_s(workload: Workload) -> float:
    """Requests per second from the first arrival to the last: (n - 1) gaps over their sum.

    Raises:
        ConfigError: fewer than two distinct arrival times have no rate.
    """
    first, last = workload.requests[0], workload.requests[-1]
    if first.arrival_us == last.arrival_us:
        raise ConfigError(f"{workload.source}: all requests arrive at {first.arrival_us} us; two times are needed")
    return (len(workload.requests) - 1) * 1e6 / (last.arrival_us - first.arrival_us)


def scale_time(workload: Workload, *, rate_factor: float) -> Workload:
    """Arrivals at `rate_factor` times the rate: 2.0 halves every arrival time, to the nearest microsecond."""
    _positive("rate_factor", rate_factor)
    return _each(workload, lambda request: request.at(round(request.arrival_us / rate_factor)))


def scale_rate_to(workload: Workload, rate_per_s: float) -> Workload:
    """Arrivals stretched or squeezed evenly until `mean_rate_per_s` is `rate_per_s`."""
    _positive("rate_per_s", rate_per_s)
    return scale_time(workload, rate_factor=rate_per_s / mean_rate_per_s(workload))


def scale_length(workload: Workload, factor: float) -> Workload:
    """Prompts and outputs `factor` times as long, rounded up.

    What two prompts share scales with them:

    - Blocks of `hash_block_tokens` become blocks of floor(factor * hash_block_tokens) tokens, at least 1, under the
      same hashes. Rounding lengths up and blocks down keeps the start of every block inside its prompt, so prompts
      that differ go on differing; what is missing at the end is unique to the request. Sharing can therefore only
      shrink, by less than one token a block; it grows only where a scaled block would be shorter than one token.
    - Token ids are repeated or skipped evenly: the new token j is the old token floor(j / factor).
    """
    _positive("factor", factor)
    # 0.1 means one tenth: the float nearest to it would round 30 tokens up to 4.
    exact = Fraction(str(factor))
    return _each(
        workload,
        lambda request: replace(
            request,
            prompt=_scaled(request.prompt, exact),
            output_tokens=math.ceil(request.output_tokens * exact),
        ),
    )


def clip_length(
    workload: Workload, *, max_prompt_tokens: int | None = None, max_output_tokens: int | None = None
) -> Workload:
    """Prompts cut to their first `max_prompt_tokens`, outputs to `max_output_tokens`; `None` does not cut."""
    for name, most in (("max_prompt_tokens", max_prompt_tokens), ("max_output_tokens", max_output_tokens)):
        if most is not None:
            _at_least_one(name, most)
    return _each(
        workload,
        lambda request: replace(
            request,
            prompt=_clipped(request.prompt, max_prompt_tokens),
            output_tokens=min(request.output_tokens, max_output_tokens or request.output_tokens),
        ),
    )


def window(workload: Workload, start_us: int, end_us: int) -> Workload:
    """Requests that arrive in [start_us, end_us), on a clock that shows 0 at `start_us`.

    Raises:
        ConfigError: nobody arrives in the window.
    """
    kept = tuple(r for r in workload.requests if start_us <= r.arrival_us < end_us)
    if not kept:
        first, last = workload.requests[0].arrival_us, workload.requests[-1].arrival_us
        raise ConfigError(
            f"window [{start_us}, {end_us}) us holds no request of {workload.source}; "
            f"arrivals run from {first} to {last}"
        )
    return replace(workload, requests=tuple(r.at(r.arrival_us - start_us) for r in kept))


def head(workload: Workload, num: int) -> Workload:
    """The first `num` requests, or all of a shorter workload."""
    _at_least_one("num", num)
    return replace(workload, requests=workload.requests[:num])


def part(workload: Workload, start: int, end: int) -> Workload:
    """Requests [start, end) by position, on a clock that shows 0 when the first of them arrives.

    Raises:
        ConfigError: the workload does not have that many.
    """
    if not 0 <= start < end <= len(workload.requests):
        there = len(workload.requests)
        raise ConfigError(f"requests [{start}, {end}) of {workload.source}; accepted: a part of [0, {there})")
    kept = workload.requests[start:end]
    return replace(workload, requests=tuple(r.at(r.arrival_us - kept[0].arrival_us) for r in kept))


def sample(workload: Workload, *, seed: int, num: int | None = None, frac: float | None = None) -> Workload:
    """A random part of the requests at their own arrival times: `num` of them, or the fraction `frac` in (0, 1].

    The rate falls with the share that is kept. With one seed, a smaller sample is part of every larger one.

    Raises:
        ConfigError: not exactly one of `num` and `frac`, or more than there are.
    """
    total = len(workload.requests)
    if (num is None) == (frac is None):
        raise ConfigError(f"sample takes either num or frac, got num={num} and frac={frac}")
    if frac is not None:
        if not 0 < frac <= 1:
            raise ConfigError(f"frac is {frac}, more than 0 and at most 1 is accepted")
        num = max(1, round(frac * total))
    assert num is not None
    if not 1 <= num <= total:
        raise ConfigError(f"num is {num}, from 1 to the {total} requests of {workload.source} is accepted")
    chosen = stream(seed, "sample").permutation(total)[:num]
    return replace(workload, requests=tuple(workload.requests[int(i)] for i in sorted(chosen)))


def mix(*workloads: Workload) -> Workload:
    """All requests of several workloads on one clock, numbered from 0 in order of arrival.

    Equal times are ordered by the place of their workload among the arguments, then by id. Block hashes of different
    traces mean different text even where the numbers are equal, so those of each further trace are moved past the
    ones before; workloads with the same checksum are parts of one trace and go on sharing prefixes. Prompts are
    synthesised with the first workload's seed.

    Raises:
        ConfigError: no workload, or workloads that differ in `closed_loop`.
    """
    if not workloads:
        raise ConfigError("mix takes at least one workload, got none")
    first = workloads[0]
    for other in workloads[1:]:
        if other.closed_loop != first.closed_loop:
            raise ConfigError(
                f"mix takes workloads of one closed_loop, got {first.closed_loop} and {other.closed_loop}"
            )
    entries = [
        (request.arrival_us, place, request.id, _rehashed(request, offset))
        for place, (workload, offset) in enumerate(zip(workloads, _hash_offsets(workloads), strict=True))
        for request in workload.requests
    ]
    entries.sort(key=lambda entry: entry[:3])
    return replace(
        first,
        requests=tuple(replace(entry[3], id=RequestId(number)) for number, entry in enumerate(entries)),
        source=" + ".join(workload.source for workload in workloads),
        checksum=" + ".join(workload.checksum for workload in workloads if workload.checksum),
    )


def with_slo(workload: Workload, slo: Slo) -> Workload:
    """Every request under the same promise, in place of its own."""
    return _each(workload, lambda request: replace(request, slo=slo))


def with_sampling(workload: Workload, sampling: Sampling) -> Workload:
    """Every request sampled the same way."""
    return _each(workload, lambda request: replace(request, sampling=sampling))


def _each(workload: Workload, change: Callable[[Request], Request]) -> Workload:
    return replace(workload, requests=tuple(change(request) for request in workload.requests))


def _scaled(prompt: Prompt, factor: Fraction) -> Prompt:
    num_tokens = math.ceil(prompt.num_tokens * factor)
    token_ids = prompt.token_ids
    if token_ids is not None:
        last = prompt.num_tokens - 1
        token_ids = tuple(token_ids[min(last, int(j / factor))] for j in range(num_tokens))
    return replace(
        prompt,
        num_tokens=num_tokens,
        token_ids=token_ids,
        hash_block_tokens=max(1, math.floor(prompt.hash_block_tokens * factor)),
    )


def _clipped(prompt: Prompt, max_tokens: int | None) -> Prompt:
    if max_tokens is None or prompt.num_tokens <= max_tokens:
        return prompt
    return replace(
        prompt,
        num_tokens=max_tokens,
        token_ids=None if prompt.token_ids is None else prompt.token_ids[:max_tokens],
        block_hashes=prompt.block_hashes[: math.ceil(max_tokens / prompt.hash_block_tokens)],
    )


def _hash_offsets(workloads: tuple[Workload, ...]) -> list[int]:
    """What to add to each workload's block hashes; equal checksums share one offset."""
    # A trace's number of hashes must count all its parts before the next trace is placed past it.
    sizes: dict[str, int] = {}
    names = [workload.checksum or f"place {place}" for place, workload in enumerate(workloads)]
    for name, workload in zip(names, workloads, strict=True):
        largest = max((h for r in workload.requests for h in r.prompt.block_hashes), default=-1)
        sizes[name] = max(sizes.get(name, 0), largest + 1)
    offsets: dict[str, int] = {}
    end = 0
    for name, size in sizes.items():
        offsets[name] = end
        end += size
    return [offsets[name] for name in names]


def _rehashed(request: Request, offset: int) -> Request:
    prompt = request.prompt
    if not offset or not prompt.block_hashes:
        return request
    return replace(request, prompt=replace(prompt, block_hashes=tuple(h + offset for h in prompt.block_hashes)))


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}, a finite number above 0 is accepted")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}, at least 1 is accepted")
