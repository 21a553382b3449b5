"""A prompt's tokens are decided by its hashes, its id and the seed, and by nothing else."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workload_strategies import plain_request, prompts
from xllm_lab.errors import ConfigError, TraceError
from xllm_lab.workload import (
    ClosedLoop,
    Prompt,
    Request,
    RequestId,
    Sampling,
    Slo,
    TokenIds,
    Workload,
    prompt_token_ids,
    stream,
)

VOCAB_SIZE = 49_152
hashes = st.lists(st.integers(0, 2**70), min_size=1, max_size=5).map(tuple)


def tokens(prompt: Prompt, *, request_id: int = 0, seed: int = 1) -> TokenIds:
    request = Request(id=RequestId(request_id), arrival_us=0, prompt=prompt, output_tokens=1)
    return prompt_token_ids(request, vocab_size=VOCAB_SIZE, seed=seed)


@given(prompts(), st.integers(0, 2**63 - 1))
def test_a_prompt_has_its_length_and_stays_inside_the_vocabulary(prompt: Prompt, seed: int) -> None:
    """Synthesised tokens leave the first sixteenth to special tokens; given ones are passed on as they are."""
    ids = tokens(prompt, seed=seed)
    assert ids.shape == (prompt.num_tokens,)
    if prompt.token_ids is None:
        assert ids.min() >= VOCAB_SIZE // 16
        assert ids.max() < VOCAB_SIZE
    else:
        assert tuple(ids) == prompt.token_ids


@given(
    shared=hashes,
    mine=st.integers(0, 99),
    yours=st.integers(100, 199),
    block=st.integers(16, 64),
    tail=st.integers(16, 99),
)
def test_prompts_share_exactly_the_blocks_of_equal_hashes(
    shared: tuple[int, ...], mine: int, yours: int, block: int, tail: int
) -> None:
    """Equal hashes are equal tokens, different hashes different ones, and what no hash covers is unique."""
    length = (len(shared) + 1) * block + tail
    first = tokens(Prompt(num_tokens=length, block_hashes=(*shared, mine), hash_block_tokens=block), request_id=1)
    second = tokens(Prompt(num_tokens=length, block_hashes=(*shared, yours), hash_block_tokens=block), request_id=2)
    end = len(shared) * block
    assert np.array_equal(first[:end], second[:end])
    assert not np.array_equal(first[end : end + block], second[end : end + block])
    assert not np.array_equal(first[end + block :], second[end + block :])


@given(block_hashes=hashes, block=st.integers(1, 64), cut=st.integers(1, 300))
def test_a_shorter_prompt_of_the_same_hashes_is_a_prefix(block_hashes: tuple[int, ...], block: int, cut: int) -> None:
    """A block that the prompt's end cuts is the start of the whole block."""
    whole = Prompt(num_tokens=len(block_hashes) * block, block_hashes=block_hashes, hash_block_tokens=block)
    short = Prompt(
        num_tokens=min(cut, whole.num_tokens), block_hashes=block_hashes, hash_block_tokens=whole.hash_block_tokens
    )
    assert np.array_equal(tokens(short, request_id=1), tokens(whole, request_id=2)[: short.num_tokens])


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_prompts_of_length_alone_are_unique_to_their_id(one: int, other: int) -> None:
    same = np.array_equal(
        tokens(Prompt(num_tokens=32), request_id=one), tokens(Prompt(num_tokens=32), request_id=other)
    )
    assert same == (one == other)


TELL = """
import hashlib
from xllm_lab.arrivals import gamma_bursts
from xllm_lab.transforms import mix, sample
from xllm_lab.workload import Prompt, Request, Workload, prompt_token_ids
requests = [Request(id=i, arrival_us=us, prompt=Prompt(num_tokens=700, block_hashes=(i % 3,)), output_tokens=5)
            for i, us in enumerate(gamma_bursts(20, 5.0, 2.0, seed=3))]
workload = mix(sample(Workload(requests=tuple(requests)), seed=4, num=9), Workload(requests=tuple(requests)))
tokens = b"".join(prompt_token_ids(r, vocab_size=999, seed=5).tobytes() for r in workload.requests)
print(hash("x"), hashlib.sha256(repr(workload).encode() + tokens).hexdigest())
"""


def test_every_process_sees_the_same_workload() -> None:
    """Hash randomisation really differs between the two processes, and nothing else does."""

    def tell(hash_seed: str) -> tuple[str, str]:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        answer = subprocess.run(
            [sys.executable, "-c", TELL], env=environment, capture_output=True, text=True, check=True
        )
        randomised, digest = answer.stdout.split()
        return randomised, digest

    one, other = tell("1"), tell("2")
    assert one[0] != other[0]
    assert one[1] == other[1]


def test_tokens_stay_what_they_were() -> None:
    """A recorded run names its workload by checksum and seed, so these tokens may never change."""
    ids = tokens(Prompt(num_tokens=1100, block_hashes=(7, 8)), request_id=3, seed=1)
    assert hashlib.sha256(ids.tobytes()).hexdigest()[:16] == "d6d27500c9b0eff2"


def test_drawing_from_one_stream_never_shifts_another() -> None:
    before = stream(1, "arrivals").random(3)
    stream(1, "lengths").random(100)
    assert np.array_equal(stream(1, "arrivals").random(3), before)
    assert not np.array_equal(stream(1, "lengths").random(3), before)


def test_requests_are_put_in_order_of_arrival_and_then_of_id() -> None:
    workload = Workload(requests=(plain_request(2, 5), plain_request(1, 5), plain_request(3, 0)))
    assert [request.id for request in workload.requests] == [3, 1, 2]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: plain_request(4, -1), "arrival_us is -1, at least 0"),
        (lambda: plain_request(-4), "id is -4, at least 0"),
        (lambda: plain_request(4, prompt_tokens=0), "prompt tokens is 0, at least 1"),
        (lambda: plain_request(4, output_tokens=0), "output_tokens is 0, at least 1"),
        (lambda: Prompt(num_tokens=3, token_ids=(1, 2)), "num_tokens is 3, the 2 token_ids differ"),
        (lambda: Prompt(num_tokens=1, token_ids=(-1,)), "token id is -1, at least 0"),
        (lambda: Prompt(num_tokens=3, block_hashes=(-1,)), "block hash is -1, at least 0"),
        (lambda: Prompt(num_tokens=3, hash_block_tokens=0), "hash_block_tokens is 0, at least 1"),
        (lambda: Slo(ttft_us=0), "ttft_us is 0, at least 1"),
        (lambda: Sampling(temperature=-0.5), "temperature is -0.5, at least 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature is nan, at least 0"),
        (lambda: Sampling(temperature=float("inf")), "temperature is inf, a finite number"),
        (lambda: Sampling(top_p=0.0), "top_p is 0.0, more than 0 and at most 1"),
        (lambda: ClosedLoop(num_clients=0), "num_clients is 0, at least 1"),
        (lambda: Workload(requests=()), "no requests, at least one"),
        (lambda: Workload(requests=(plain_request(1), plain_request(1))), "ids repeat"),
        (lambda: Workload(requests=(plain_request(1),), seed=-1), "seed is -1, at least 0"),
    ],
)
def test_impossible_values_are_refused_by_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(TraceError) as refused:
        make()
    assert said in str(refused.value)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is -1, at least 0 is accepted"):
        stream(-1, "arrivals")
