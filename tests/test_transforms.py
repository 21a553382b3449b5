"""Transforms keep what they do not name: requests, lengths, identity of prompts, gaps, patience."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workload_strategies import HOUR_US, plain_request, slos, workloads
from xllm_lab.errors import ConfigError
from xllm_lab.transforms import (
    clip_length,
    head,
    mean_rate_per_s,
    mix,
    part,
    sample,
    scale_length,
    scale_rate_to,
    scale_time,
    window,
    with_sampling,
    with_slo,
)
from xllm_lab.workload import ClosedLoop, Prompt, Request, RequestId, Sampling, Slo, Workload, prompt_token_ids

seeds = st.integers(0, 2**63 - 1)
factors = st.floats(0.01, 8)


def sharing(*block_hashes: tuple[int, ...], block: int, tail: int = 0) -> Workload:
    prompts = [Prompt(num_tokens=len(h) * block + tail, block_hashes=h, hash_block_tokens=block) for h in block_hashes]
    return Workload(
        requests=tuple(
            Request(id=RequestId(i), arrival_us=i, prompt=prompt, output_tokens=8) for i, prompt in enumerate(prompts)
        ),
        checksum="one trace",
    )


def shared_tokens(workload: Workload) -> int:
    """How many leading tokens the first two prompts have in common."""
    one, other = (prompt_token_ids(r, vocab_size=49_152, seed=workload.seed) for r in workload.requests[:2])
    common = min(len(one), len(other))
    different = np.flatnonzero(one[:common] != other[:common])
    return int(different[0]) if different.size else common


@given(workloads(), st.floats(0.01, 100))
def test_scaling_time_moves_every_arrival_by_the_factor_and_nothing_else(workload: Workload, factor: float) -> None:
    scaled = scale_time(workload, rate_factor=factor)
    by_id = {request.id: request for request in scaled.requests}
    for request in workload.requests:
        moved = by_id[request.id]
        assert abs(moved.arrival_us - request.arrival_us / factor) <= 1
        assert moved.at(request.arrival_us) == request


def test_a_rate_factor_of_two_is_twice_the_rate() -> None:
    workload = Workload(requests=(plain_request(0, 0), plain_request(1, 10), plain_request(2, 40)))
    assert [r.arrival_us for r in scale_time(workload, rate_factor=2.0).requests] == [0, 5, 20]


@given(workloads(min_size=2), st.floats(0.1, 1000))
def test_scaling_to_a_rate_reaches_it(workload: Workload, rate_per_s: float) -> None:
    if workload.requests[0].arrival_us == workload.requests[-1].arrival_us:
        return
    span_us = (len(workload.requests) - 1) * 1e6 / rate_per_s
    scaled = scale_rate_to(workload, rate_per_s).requests
    assert abs(scaled[-1].arrival_us - scaled[0].arrival_us - span_us) <= 1 + 1e-9 * scaled[-1].arrival_us


@given(workloads(), factors)
def test_scaling_lengths_rounds_up_and_keeps_everything_else(workload: Workload, factor: float) -> None:
    exact = Fraction(str(factor))
    for old, new in zip(workload.requests, scale_length(workload, factor).requests, strict=True):
        assert 0 <= new.prompt.num_tokens - old.prompt.num_tokens * exact < 1
        assert 0 <= new.output_tokens - old.output_tokens * exact < 1
        assert replace(new, prompt=old.prompt, output_tokens=old.output_tokens) == old


@given(workloads())
def test_a_length_factor_of_one_changes_nothing(workload: Workload) -> None:
    assert scale_length(workload, 1.0) == workload


def test_a_tenth_of_thirty_tokens_is_three() -> None:
    """30 * 0.1 is a little more than 3 in floating point, and lengths round up."""
    workload = Workload(requests=(plain_request(0, prompt_tokens=30),))
    assert scale_length(workload, 0.1).requests[0].prompt.num_tokens == 3


@given(num_shared=st.integers(0, 4), block=st.integers(16, 64), tail=st.integers(0, 40), factor=st.floats(0.5, 4))
def test_scaled_prompts_share_by_the_factor_and_go_on_differing(
    num_shared: int, block: int, tail: int, factor: float
) -> None:
    """Sharing shrinks by less than a token a block and never grows."""
    shared = tuple(range(num_shared))
    workload = sharing((*shared, 100), (*shared, 200), block=block, tail=tail)
    exact = num_shared * block * Fraction(str(factor))
    got = shared_tokens(scale_length(workload, factor))
    assert exact - num_shared < got <= exact or got == exact == 0


@given(st.lists(st.integers(0, 99), min_size=3, max_size=30), st.floats(0.2, 5))
def test_scaled_token_ids_keep_a_common_start(ids: list[int], factor: float) -> None:
    def scaled(token_ids: list[int]) -> tuple[int, ...] | None:
        request = plain_request(0)
        prompt = Prompt(num_tokens=len(token_ids), token_ids=tuple(token_ids))
        return scale_length(Workload(requests=(replace(request, prompt=prompt),)), factor).requests[0].prompt.token_ids

    longer, shorter = scaled([*ids, 100, 101, 102]), scaled(ids)
    assert longer is not None
    assert shorter is not None
    common = int(len(ids) * Fraction(str(factor)))
    assert longer[:common] == shorter[:common]


@given(workloads(), st.integers(1, 3000), st.integers(1, 3000))
def test_clipping_cuts_the_end_of_a_prompt(workload: Workload, max_prompt: int, max_output: int) -> None:
    clipped = clip_length(workload, max_prompt_tokens=max_prompt, max_output_tokens=max_output)
    for old, new in zip(workload.requests, clipped.requests, strict=True):
        assert new.prompt.num_tokens == min(old.prompt.num_tokens, max_prompt)
        assert new.output_tokens == min(old.output_tokens, max_output)
        whole = prompt_token_ids(old, vocab_size=999, seed=1)
        covered = min(new.prompt.num_tokens, len(old.prompt.block_hashes) * old.prompt.hash_block_tokens)
        start = new.prompt.num_tokens if old.prompt.token_ids is not None else covered
        assert np.array_equal(prompt_token_ids(new, vocab_size=999, seed=1)[:start], whole[:start])
    assert clip_length(clipped, max_prompt_tokens=max_prompt, max_output_tokens=max_output) == clipped


@given(workloads(), st.lists(st.integers(1, HOUR_US), max_size=5))
def test_windows_that_meet_hold_every_request_once(workload: Workload, cuts: list[int]) -> None:
    edges = [0, *sorted(set(cuts)), HOUR_US + 1]
    found = []
    for start_us, end_us in pairwise(edges):
        if any(start_us <= r.arrival_us < end_us for r in workload.requests):
            part = window(workload, start_us, end_us)
            found += [r.at(r.arrival_us + start_us) for r in part.requests]
    assert tuple(found) == workload.requests


@given(workloads(), st.data(), seeds)
def test_a_sample_is_part_of_the_workload_and_of_every_larger_sample(
    workload: Workload, data: st.DataObject, seed: int
) -> None:
    total = len(workload.requests)
    small = data.draw(st.integers(1, total))
    large = data.draw(st.integers(small, total))
    few, many = (sample(workload, seed=seed, num=num).requests for num in (small, large))
    assert len(few) == small
    assert {r.id for r in few} <= {r.id for r in many}
    assert set(many) <= set(workload.requests)
    assert sample(workload, seed=seed, frac=1.0) == workload


@given(st.lists(workloads(open_loop=True), min_size=1, max_size=4))
def test_a_mix_holds_every_request_of_every_workload(parts: list[Workload]) -> None:
    mixed = mix(*parts)
    assert [r.id for r in mixed.requests] == list(range(len(mixed.requests)))

    def told(request: Request) -> str:
        return repr(replace(request, id=RequestId(0), prompt=replace(request.prompt, block_hashes=())))

    assert sorted(told(r) for r in mixed.requests) == sorted(told(r) for part in parts for r in part.requests)


def test_a_mix_orders_equal_times_by_workload_and_then_by_id() -> None:
    one = Workload(requests=(plain_request(5, 7, output_tokens=1), plain_request(6, 7, output_tokens=2)))
    other = Workload(requests=(plain_request(0, 7, output_tokens=3), plain_request(9, 3, output_tokens=4)))
    assert [r.output_tokens for r in mix(one, other).requests] == [4, 1, 2, 3]


@pytest.mark.parametrize(("same_trace", "expected"), [(True, 64), (False, 0)])
def test_only_parts_of_one_trace_share_prefixes_in_a_mix(same_trace: bool, expected: int) -> None:
    """Hash 0 of one trace and hash 0 of another are different text."""
    one = sharing((0, 1), block=32)
    other = one if same_trace else replace(one, checksum="another trace")
    assert shared_tokens(mix(one, other)) == expected


def test_what_shares_inside_a_trace_shares_in_a_mix() -> None:
    one, pair = sharing((0,), block=32), replace(sharing((0, 1), (0, 2), block=32), checksum="another trace")
    mixed = mix(one, pair)
    requests = tuple(r for r in mixed.requests if len(r.prompt.block_hashes) == 2)
    assert shared_tokens(replace(mixed, requests=requests)) == 32


def test_the_head_of_a_workload_is_its_first_requests() -> None:
    workload = Workload(requests=tuple(plain_request(i, i) for i in range(5)))
    assert [r.id for r in head(workload, 2).requests] == [0, 1]
    assert head(workload, 99) == workload


@given(workloads(), slos)
def test_one_promise_for_all(workload: Workload, slo: Slo) -> None:
    promised = with_slo(workload, slo)
    assert {r.slo for r in promised.requests} == {slo}
    assert [replace(r, slo=Slo()) for r in promised.requests] == [replace(r, slo=Slo()) for r in workload.requests]


def test_one_sampling_for_all() -> None:
    sampling = Sampling(temperature=0.7, seed=3)
    sampled = with_sampling(Workload(requests=(plain_request(0), plain_request(1))), sampling)
    assert [r.sampling for r in sampled.requests] == [sampling, sampling]


TWO = Workload(requests=(plain_request(0, 10), plain_request(1, 20)), source="two.jsonl")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: scale_time(TWO, rate_factor=0.0), "rate_factor is 0.0, a finite number above 0"),
        (lambda: scale_rate_to(TWO, float("nan")), "rate_per_s is nan, a finite number above 0"),
        (lambda: mean_rate_per_s(head(TWO, 1)), "two.jsonl: all requests arrive at 10 us"),
        (lambda: scale_length(TWO, -1.0), "factor is -1.0, a finite number above 0"),
        (lambda: clip_length(TWO, max_prompt_tokens=0), "max_prompt_tokens is 0, at least 1"),
        (lambda: window(TWO, 20, 20), "window [20, 20) us holds no request of two.jsonl; arrivals run from 10 to 20"),
        (lambda: head(TWO, 0), "num is 0, at least 1"),
        (lambda: sample(TWO, seed=1), "either num or frac, got num=None and frac=None"),
        (lambda: sample(TWO, seed=1, num=1, frac=0.5), "either num or frac, got num=1 and frac=0.5"),
        (lambda: sample(TWO, seed=1, num=3), "num is 3, from 1 to the 2 requests of two.jsonl"),
        (lambda: sample(TWO, seed=1, frac=1.5), "frac is 1.5, more than 0 and at most 1"),
        (mix, "at least one workload, got none"),
        (lambda: mix(TWO, replace(TWO, closed_loop=ClosedLoop(num_clients=2))), "workloads of one closed_loop"),
    ],
)
def test_impossible_transforms_are_refused_by_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert said in str(refused.value)


@given(workloads(), st.data())
def test_a_part_keeps_its_requests_and_their_gaps(w: Workload, data: st.DataObject) -> None:
    """Requests by position, on a clock that starts with the first of them."""
    start = data.draw(st.integers(0, len(w.requests) - 1))
    end = data.draw(st.integers(start + 1, len(w.requests)))
    kept = part(w, start, end).requests
    origin_us = w.requests[start].arrival_us
    assert kept == tuple(r.at(r.arrival_us - origin_us) for r in w.requests[start:end])
    assert kept[0].arrival_us == 0


def test_a_part_that_is_not_there_is_refused() -> None:
    """The message says what there is."""
    w = Workload(requests=(plain_request(0),))
    with pytest.raises(ConfigError, match=r"requests \[0, 2\) .* a part of \[0, 1\)"):
        part(w, 0, 2)
