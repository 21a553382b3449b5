"""Make the traces of this folder: `python traces/make.py`. The same bytes every time; a test compares them.

Sized for a model of some hundred million weights on two CPU cores: a hundred requests are about 20,000 prompt tokens
and 4,000 output tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xllm_lab.arrivals import gamma_bursts, poisson
from xllm_lab.formats import own
from xllm_lab.workload import Prompt, Request, RequestId, Workload, stream

RATE_PER_S = 1.0
NUM_AGENTS = 8
HASH_BLOCK_TOKENS = 32


def make(folder: Path) -> None:
    """Write every trace into `folder`."""
    for name, workload in (("chat", chat()), ("bursty", bursty()), ("shared-prefix", shared_prefix())):
        own.write(workload, folder / f"{name}.jsonl")


def chat(num: int = 600, seed: int = 11) -> Workload:
    """Short conversations of people who do not know of each other: Poisson arrivals."""
    return _workload(poisson(num, RATE_PER_S, seed), _prompts(num, seed), seed)


def bursty(num: int = 600, seed: int = 12) -> Workload:
    """The lengths of `chat` in bursts: gaps of coefficient of variation 3."""
    return _workload(gamma_bursts(num, RATE_PER_S, 3.0, seed), _prompts(num, seed), seed)


def shared_prefix(num: int = 600, seed: int = 13) -> Workload:
    """Calls of eight agents, the first more popular than the last, each with a system prompt of its own.

    Every prompt starts with the 3 to 6 whole blocks of its agent and ends in a question nobody else asks.
    """
    rng = stream(seed, "agents")
    num_blocks = rng.integers(3, 7, NUM_AGENTS)
    ends = np.cumsum(num_blocks)
    popularity = 1.0 / np.arange(1, NUM_AGENTS + 1)
    agents = rng.choice(NUM_AGENTS, num, p=popularity / popularity.sum())
    questions = _lognormal(seed, "questions", num, median=45, sigma=0.5, least=4, most=200)
    prompts = [
        Prompt(
            num_tokens=int(num_blocks[agent]) * HASH_BLOCK_TOKENS + question,
            block_hashes=tuple(range(int(ends[agent] - num_blocks[agent]), int(ends[agent]))),
            hash_block_tokens=HASH_BLOCK_TOKENS,
        )
        for agent, question in zip(agents, questions, strict=True)
    ]
    return _workload(poisson(num, RATE_PER_S, seed), prompts, seed)


def _prompts(num: int, seed: int) -> list[Prompt]:
    lengths = _lognormal(seed, "prompts", num, median=160, sigma=0.6, least=16, most=640)
    return [Prompt(num_tokens=length) for length in lengths]


def _workload(arrival_us: tuple[int, ...], prompts: list[Prompt], seed: int) -> Workload:
    outputs = _lognormal(seed, "outputs", len(prompts), median=35, sigma=0.5, least=4, most=128)
    return Workload(
        requests=tuple(
            Request(id=RequestId(i), arrival_us=arrival_us[i], prompt=prompts[i], output_tokens=outputs[i])
            for i in range(len(prompts))
        ),
        source="traces/make.py",
        seed=seed,
    )


def _lognormal(seed: int, purpose: str, num: int, *, median: float, sigma: float, least: int, most: int) -> list[int]:
    lengths = stream(seed, purpose).lognormal(np.log(median), sigma, num)
    return [int(length) for length in np.rint(np.clip(lengths, least, most))]


if __name__ == "__main__":
    make(Path(__file__).parent)
