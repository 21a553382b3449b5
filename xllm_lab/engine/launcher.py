"""A planned step on its way to the device: what it reads is written down as it is planned, and run when its turn comes.

Planned ahead, a step follows tokens that are still being drawn. They stand in its inputs as `-1 - row`, the row of the
step before that draws them, and the device puts the real ones there when the step starts, so the host never waits for
them (so does xLLM at 3906f5a, `worker_impl.cpp`). A step with drafts is planned when all is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from xllm_lab.engine.clock import Clock
from xllm_lab.engine.drafts.engine_drafts import EngineDrafts, Prefill
from xllm_lab.engine.drafts.verify import Row
from xllm_lab.engine.expert_mover import ExpertMover
from xllm_lab.engine.lane import Done, Lane
from xllm_lab.engine.lead import Lead
from xllm_lab.engine.page_mapper import PageMapper
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.request_state import RequestState
from xllm_lab.scheduler import Scheduler
from xllm_lab.step import Draft, ScheduledChunk, Step
from xllm_lab.workload import Request, RequestId


class Inputs(NamedTuple):
    """What the device needs of a step.

    Attributes:
        chunks: in packing order.
        drawing: requests that draw a token, in that order.
        rows: how each of them does.
        graph_tokens: the size of the graph that it runs in; None: eagerly.
        has_drafts: some verify drafts.
    """

    chunks: list[SequenceChunk]
    drawing: list[Request]
    rows: list[Row]
    graph_tokens: int | None
    has_drafts: bool


class Counted:
    """What each slot of the layers with experts had to do in a step, once it is over."""

    __slots__ = ("_layers", "rows_LP")

    def __init__(self, layers: list[int]) -> None:
        self._layers, self.rows_LP = layers, np.zeros((0, 0), np.int64)

    def read(self, slot_rows_LS: Tensor) -> None:
        """From a step's counters, which the next one overwrites."""
        self.rows_LP = slot_rows_LS[self._layers].cpu().numpy()


class Launched(NamedTuple):
    """A step that is with the device. `host_us` is the time it took the host to get there."""

    inputs: Inputs
    future: Future[Done[list[list[int]]]]
    host_us: int
    counted: Counted | None = None


class Launcher:
    """Hands the steps of one run to the device."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        lane: Lane,
        clock: Clock,
        lead: Lead,
        *,
        drafts: EngineDrafts | None = None,
        mapper: PageMapper | None = None,
        mover: ExpertMover | None = None,
    ) -> None:
        self._runner, self._scheduler, self._lane, self._clock, self._lead = runner, scheduler, lane, clock, lead
        self._drafts, self._mapper, self._mover = drafts, mapper, mover
        self._launched: dict[int, Launched] = {}
        self._rows: dict[RequestId, int] = {}  # of the tokens that the step launched last draws
        self._working_since_us = clock.now_us()  # on the step to be launched next, without the time it waited

    def launch(self, step: Step) -> None:
        """Write down what the step reads, and queue it."""
        if step.drafts and self._drafts is not None:
            step.draft_us = self._drafts.draft_us
        if self._mapper is not None:
            before_us = self._clock.now_us()
            self._mapper.prepare(step)
            step.map_us = self._clock.now_us() - before_us
        inputs = self._inputs(step)
        self._rows = {request.id: row for row, request in enumerate(inputs.drawing)}
        begins = None
        if self._mover is not None and step.experts is not None and step.experts.activates is not None:
            begins = self._mover.activation(step.experts)
        self._lead.step(inputs.chunks, inputs.graph_tokens, draws=True, tells=not inputs.has_drafts)
        host_us = self._clock.now_us() - self._working_since_us
        beside = () if self._drafts is None else self._drafts.follow(self._prefills(step))
        counted = None if self._mover is None else Counted(self._mover.rows)
        future = self._lane.launch(partial(_compute, self._runner, inputs, beside, begins, counted))
        self._launched[step.index] = Launched(inputs, future, host_us, counted)
        self._working_since_us = self._clock.now_us() if self._lane.is_beside else future.result().end_us

    def wait_for(self, step: Step) -> tuple[Launched, Done[list[list[int]]]]:
        """A launched step and what came of it."""
        launched = self._launched.pop(step.index)
        before_us = self._clock.now_us()
        done = launched.future.result()
        self._working_since_us += self._clock.wait_until(done.end_us) - before_us
        if self._mapper is not None:
            self._mapper.finish(step)
        if launched.counted is not None:
            step.expert_rows_LP = launched.counted.rows_LP
        return launched, done

    def run_beside(self) -> int:
        """A step of others, for the experts that are here. Returns the time when it is over."""
        self._lane.rest()  # the device waits for others, not for the host
        has_requests = self._scheduler.num_live > 0
        done = self._lane.launch(partial(self._runner.run_beside, has_requests=has_requests)).result()
        self._lane.rest()
        self._working_since_us = self._clock.wait_until(done.end_us)
        return self._working_since_us

    def rest(self, until_us: int) -> int:
        """Nothing is to be done before `until_us`; returns the time when the host looks again."""
        self._lane.rest()
        self._working_since_us = self._clock.wait_until(until_us)
        return self._working_since_us

    def _inputs(self, step: Step) -> Inputs:
        chunks: list[SequenceChunk] = []
        drawing: list[Request] = []
        rows: list[Row] = []
        drafts = {d.id: d for d in step.drafts if d.token_ids}
        for chunk in step.chunks:
            state, draft = self._scheduler.state(chunk.id), drafts.get(chunk.id)
            behind = () if draft is None else draft.token_ids
            table = self._table(chunk.id)
            tokens = [*self._tokens(state, chunk, len(behind)), *behind]
            computed = chunk.num_computed_tokens
            if behind and step.rows_apart:
                chunks += [SequenceChunk([token], computed + k, table, 1) for k, token in enumerate(tokens)]
            else:
                chunks.append(SequenceChunk(tokens, computed, table, (1 + len(behind)) * chunk.samples))
            if chunk.samples:
                position = computed + chunk.num_tokens - len(behind) - state.num_prompt_tokens
                drawing.append(state.request)
                rows.append(Row(state.request.sampling, state.id, position, behind, self._proposal(draft)))
        return Inputs(chunks, drawing, rows, step.shape.num_tokens, bool(drafts))

    def _table(self, request: RequestId) -> Sequence[int]:
        """As the attention reads it."""
        if self._mapper is None or self._scheduler.pages is None:
            return tuple(self._scheduler.ledger.block_table(request))
        return self._mapper.table(self._scheduler.pages.slots.slot(request))

    def _prefills(self, step: Step) -> list[Prefill]:
        """Chunks that begin inside a prompt."""
        return [
            Prefill(
                state, tuple(self._scheduler.ledger.block_table(chunk.id)), chunk.num_computed_tokens + chunk.num_tokens
            )
            for chunk in step.others
            if chunk.num_computed_tokens < (state := self._scheduler.state(chunk.id)).num_prompt_tokens
        ]

    def _proposal(self, draft: Draft | None) -> Tensor | None:
        if draft is None or self._drafts is None:
            return None
        return self._drafts.probabilities(draft.id, draft.method)

    def _tokens(self, state: RequestState, chunk: ScheduledChunk, num_drafts: int) -> Sequence[int]:
        """Known ones."""
        start, end = chunk.num_computed_tokens, chunk.num_computed_tokens + chunk.num_tokens - num_drafts
        tokens: list[int] = state.token_ids(start, end).tolist()
        # Of a request's tokens only the last can be on its way: the step before draws one.
        if tokens[-1] < 0:
            tokens[-1] = -1 - self._rows[state.id]
        assert min(tokens[:-1], default=0) >= 0, f"request {state.id} computes a token that nobody drew"
        return tokens


def _compute(
    runner: Runner,
    inputs: Inputs,
    beside: Sequence[Callable[[], None]],
    begins: Callable[[], None] | None,
    counted: Counted | None,
) -> list[list[int]]:
    if begins is not None:
        begins()
    tells = not inputs.has_drafts
    drawn = runner.draw(inputs.chunks, inputs.rows, inputs.graph_tokens, tells=tells, beside=beside)
    if counted is not None:
        counted.read(runner.workspace.slot_rows_LS)
    return drawn
