"""The server of xLLM's table of multi-token prediction, as far as the table tells: its clients and its costs."""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from xllm_lab.draft_time import DraftTime, Weights
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.batch.prefill_first import PrefillFirst
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import Off
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.acceptance import GivenAcceptance
from xllm_lab.sim.cost import Batch, Price, Prices
from xllm_lab.sim.drafts import SimulatedDrafts
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.workload import ClosedLoop, Prompt, Request, RequestId, Workload

METHOD = "mtp"
# DeepSeek-R1 on CloudMatrix384, arXiv 2506.12708. The table cannot tell it from the cost of drafting.
ACCEPTANCE_FRAC = 0.7
# In which order lengths come the table does not say: figures are means over so many orders.
_ORDERS = range(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Constants that the table decides.

    Attributes:
        prefill_us, prompt_token_us: of a step of prompts, and for each of their tokens.
        decode_us, sequence_us: of any other step, and for each sequence in it.
        draft_us: on top of a step that verifies drafts: making them, launching what that takes.
        draft_row_us: for each draft, made and verified.
        length_shape: of a Weibull distribution of output lengths; 1 is exponential, less has more of the long ones.
    """

    prefill_us: float
    prompt_token_us: float
    decode_us: float
    sequence_us: float
    draft_us: float
    draft_row_us: float
    length_shape: float

    def lengths(self, num: int, mean: float) -> list[int]:
        """Output lengths with this mean, shortest first: quantiles, so that none is left to chance."""
        levels = ((k + 0.5) / num for k in range(num))
        drawn = [(-math.log1p(-level)) ** (1 / self.length_shape) for level in levels]
        return [max(2, round(mean * num * length / sum(drawn))) for length in drawn]


class ServerCost:
    """Prices its steps: prompts have theirs to themselves, in all others every row has logits."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def step(self, batch: Batch) -> Price:
        server, tokens = self._server, batch.num_tokens
        if batch.num_logits < tokens:
            return Price(server.prefill_us + server.prompt_token_us * tokens)
        return Price(self._decode_us(batch.num_seqs) + server.draft_row_us * (tokens - batch.num_seqs))

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        us = np.full(num_steps, self._decode_us(batch.num_seqs))
        return Prices(us, np.zeros(num_steps, dtype=np.bool_))

    def _decode_us(self, num_seqs: int) -> float:
        return self._server.decode_us + self._server.sequence_us * num_seqs


class Measured(NamedTuple):
    """What the table gives of a row."""

    tpot_ms: float
    ttft_ms: float
    per_s: float


@cache
def table() -> Mapping[str, Any]:
    """The facts, and the constants that were fitted to some of them."""
    return tomllib.loads(files("xllm_lab.sim.validate").joinpath("mtp.toml").read_text(encoding="utf-8"))


def fitted_server() -> Server:
    """The server as it was fitted."""
    return Server(**table()["fitted"])


def serve(server: Server, clients: int, *, drafts: bool, acceptance_frac: float = ACCEPTANCE_FRAC) -> Measured:
    """A row of the table, simulated: the mean over some orders of the same requests."""
    orders = _ORDERS if clients > 1 else _ORDERS[:1]  # one after the other they take as long in any order
    ran = [_serve(server, clients, order, drafts, acceptance_frac) for order in orders]
    return Measured(*(sum(column) / len(ran) for column in zip(*ran, strict=True)))


def _serve(server: Server, clients: int, order: int, drafts: bool, acceptance_frac: float) -> Measured:
    facts = table()
    num, prompt = facts["num_requests"], Prompt(num_tokens=facts["prompt_tokens"])
    lengths = server.lengths(num, prompt.num_tokens / (facts["tokens_per_output_token"] - 1))
    random.Random(order).shuffle(lengths)
    requests = (
        Request(id=RequestId(k), arrival_us=0, prompt=prompt, output_tokens=length) for k, length in enumerate(lengths)
    )
    workload = Workload(requests=tuple(requests), closed_loop=ClosedLoop(num_clients=clients))
    size, longest = facts["block_size"], prompt.num_tokens + max(lengths)
    config = InstanceConfig(
        max_tokens_per_batch=facts["max_tokens_per_batch"],
        max_seqs_per_batch=facts["max_seqs_per_batch"],
        block_size=size,
        num_kv_blocks=num * (2 + longest // size),
        enable_prefix_cache=False,
        max_model_len=longest,
    )
    draft = Fixed(method=METHOD, num_speculative_tokens=facts["depth"]) if drafts else Off()
    timing = Predicted(
        ServerCost(server),
        proposer=SimulatedDrafts(GivenAcceptance((acceptance_frac,), seed=order)),
        draft_time=DraftTime({METHOD: Weights(call_us=server.draft_us)}),
    )
    found = summarize(run_simulation(workload, config, Policies(PrefillFirst(), draft=draft), timing, vocab_size=2))
    assert found.tpot_us is not None, "all outputs have two tokens or more"
    assert found.ttft_us is not None, "all requests ended"
    return Measured(found.tpot_us.mean / 1e3, found.ttft_us.mean / 1e3, found.output_throughput_per_s)
