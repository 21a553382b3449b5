"""A planned step on its way to the device: what it reads is written down as it is planned, and run when its turn comes.

Planned ahead, a step follows tokens that are still being drawn. They stand in its inputs as `-1 - row`, the row of the
step before that draws them, and the device puts the real ones there when the step starts, so the host never waits for
them (so does xLLM at 3906f5a, `worker_impl.cpp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from xllm_lab.engine.clock import Clock
from xllm_lab.engine.lane import Done, Lane
from xllm_lab.engine.lead import Lead
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.request_state import RequestState
from xllm_lab.scheduler import Scheduler
from xllm_lab.step import ScheduledChunk, Step
from xllm_lab.workload import Request, RequestId


class Inputs(NamedTuple):
    """What the device needs of a step.

    Attributes:
        chunks: in packing order.
        drawing: requests that draw a token, in that order.
        positions: which output token of theirs it becomes, 0 first.
        graph_tokens: the size of the graph that it runs in; None: eagerly.
    """

    chunks: list[SequenceChunk]
    drawing: list[Request]
    positions: list[int]
    graph_tokens: int | None


class Launched(NamedTuple):
    """A step that is with the device. `host_us` is the time it took the host to get there."""

    inputs: Inputs
    future: Future[Done[list[int]]]
    host_us: int


class Launcher:
    """Hands the steps of one run to the device."""

    def __init__(self, runner: Runner, scheduler: Scheduler, lane: Lane, clock: Clock, lead: Lead) -> None:
        self._runner, self._scheduler, self._lane, self._clock, self._lead = runner, scheduler, lane, clock, lead
        self._launched: dict[int, Launched] = {}
        self._rows: dict[RequestId, int] = {}  # of the tokens that the step launched last draws
        self._working_since_us = clock.now_us()  # on the step to be launched next, without the time it waited

    def launch(self, step: Step) -> None:
        """Write down what the step reads, and queue it."""
        inputs = self._inputs(step)
        self._rows = {request.id: row for row, request in enumerate(inputs.drawing)}
        self._lead.step(inputs.chunks, inputs.graph_tokens, draws=True)
        host_us = self._clock.now_us() - self._working_since_us
        future = self._lane.launch(partial(_compute, self._runner, inputs))
        self._launched[step.index] = Launched(inputs, future, host_us)
        self._working_since_us = self._clock.now_us() if self._lane.is_beside else future.result().end_us

    def wait_for(self, step: Step) -> tuple[Launched, Done[list[int]]]:
        """A launched step and what came of it."""
        launched = self._launched.pop(step.index)
        before_us = self._clock.now_us()
        done = launched.future.result()
        self._working_since_us += self._clock.wait_until(done.end_us) - before_us
        return launched, done

    def rest(self, until_us: int) -> int:
        """Nothing is to be done before `until_us`; returns the time when the host looks again."""
        self._lane.rest()
        self._working_since_us = self._clock.wait_until(until_us)
        return self._working_since_us

    def _inputs(self, step: Step) -> Inputs:
        chunks: list[SequenceChunk] = []
        drawing: list[Request] = []
        positions: list[int] = []
        for chunk in step.chunks:
            state = self._scheduler.state(chunk.id)
            table = tuple(self._scheduler.ledger.block_table(chunk.id))
            chunks.append(SequenceChunk(self._tokens(state, chunk), chunk.num_computed_tokens, table, chunk.samples))
            if chunk.samples:
                drawing.append(state.request)
                positions.append(chunk.num_computed_tokens + chunk.num_tokens - state.num_prompt_tokens)
        return Inputs(chunks, drawing, positions, step.shape.num_tokens)

    def _tokens(self, state: RequestState, chunk: ScheduledChunk) -> Sequence[int]:
        start, end = chunk.num_computed_tokens, chunk.num_computed_tokens + chunk.num_tokens
        tokens: list[int] = state.token_ids(start, end).tolist()
        # Of a request's tokens only the last can be on its way: the step before draws one.
        if tokens[-1] < 0:
            tokens[-1] = -1 - self._rows[state.id]
        assert min(tokens[:-1], default=0) >= 0, f"request {state.id} computes a token that nobody drew"
        return tokens


def _compute(runner: Runner, inputs: Inputs) -> list[int]:
    return runner.draw(inputs.chunks, inputs.drawing, inputs.positions, inputs.graph_tokens)
