"""Workloads for Hypothesis: small, and of every kind a file or a transform may meet."""

from __future__ import annotations

from hypothesis import strategies as st

from xllm_lab.workload import ClosedLoop, Priority, Prompt, Request, RequestId, Sampling, Slo, Workload

HOUR_US = 3_600_000_000

_maybe_us = st.none() | st.integers(1, HOUR_US)
_token_ids = st.lists(st.integers(0, 50_000), min_size=1, max_size=20)
_hashes = st.lists(st.integers(0, 2**70), max_size=6)

slos = st.builds(Slo, ttft_us=_maybe_us, tpot_us=_maybe_us, e2e_us=_maybe_us)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 10),
    top_k=st.integers(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
    stop_token_ids=st.lists(st.integers(0, 50_000), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Prompts of token ids, of block hashes, and of a length alone."""
    if draw(st.booleans()):
        token_ids = tuple(draw(_token_ids))
        return Prompt(num_tokens=len(token_ids), token_ids=token_ids)
    return Prompt(
        num_tokens=draw(st.integers(1, 3000)),
        block_hashes=tuple(draw(_hashes)),
        hash_block_tokens=draw(st.integers(1, 600)),
    )


@st.composite
def requests(draw: st.DrawFn, request_id: int) -> Request:
    """One request; about half of them keep their defaults."""
    arrival_us = draw(st.integers(0, HOUR_US))
    plain = draw(st.booleans())
    return Request(
        id=RequestId(request_id),
        arrival_us=arrival_us,
        prompt=draw(prompts()),
        output_tokens=draw(st.integers(1, 3000)),
        slo=Slo() if plain else draw(slos),
        priority=Priority.NORMAL if plain else draw(st.sampled_from(Priority)),
        sampling=Sampling() if plain else draw(samplings),
        cancel_us=None if plain else arrival_us + draw(st.integers(0, HOUR_US)),
        kind="" if plain else draw(st.text(max_size=5)),
    )


@st.composite
def workloads(draw: st.DrawFn, *, min_size: int = 1, open_loop: bool = False) -> Workload:
    """Workloads of a few requests whose ids need not count from 0, nor follow the arrivals."""
    ids = draw(st.lists(st.integers(0, 10_000), min_size=min_size, max_size=12, unique=True))
    loops = st.builds(ClosedLoop, num_clients=st.integers(1, 64), think_us=st.integers(0, HOUR_US))
    return Workload(
        requests=tuple(draw(requests(i)) for i in ids),
        closed_loop=None if open_loop else draw(st.none() | loops),
        source=draw(st.text(max_size=20)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


def plain_request(
    request_id: int, arrival_us: int = 0, *, prompt_tokens: int = 100, output_tokens: int = 10
) -> Request:
    """A request that a story can tell in one line."""
    prompt = Prompt(num_tokens=prompt_tokens)
    return Request(id=RequestId(request_id), arrival_us=arrival_us, prompt=prompt, output_tokens=output_tokens)
