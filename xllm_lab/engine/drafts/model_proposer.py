"""Drafts by a model: its KV catches up with the tokens that are known, then it goes on by itself.

known tokens   t0 t1 t2 t3 t4 | drafts        every line is a batch with the other requests' rows
first run      t2 t3 t4       -> d1           rows that are missing; a prompt may take several runs
second run                 d1 -> d2           one row for each request

A model that works beside the target has read the prompt when the first drafts are asked for: the first run is short.
"""

# Shapes: R rows whose logits are wanted, V vocabulary, d drafts of a request

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from xllm_lab.drafting import Asked
from xllm_lab.engine.drafts.engine_drafts import Prefill
from xllm_lab.engine.drafts.synced_rows import SyncedRows
from xllm_lab.engine.runner import SequenceChunk
from xllm_lab.workload import RequestId, Sampling

# Of logits [V], how to draw, whose token and which output token of theirs: the token, and the distribution [V] that it
# was drawn from; None if it was not.
Draw = Callable[[Tensor, Sampling, RequestId, int], tuple[int, Tensor | None]]


class Drafter(Protocol):
    """A model that drafts, over a KV pool with the target's block tables.

    Attributes:
        reads_target: whether row p reads what the target made of token p, and then token p + 1, to predict the next; a
            row behind the last known token has to do with something worse, and is computed again. Else it reads token
            p, and stands once the target draws the same token.
        max_rows: it computes no row behind so many.
        fill: launches rows that are only to be in KV, beside what the target computes and in order with `run`; None: it
            can do nothing beside the target.
    """

    reads_target: bool
    max_rows: int

    @property
    def fill(self) -> Callable[[Sequence[SequenceChunk]], None] | None: ...

    def run(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """As `Runner.run`; `num_computed_tokens` are rows."""
        ...

    def argmax(self, logits_RV: Tensor) -> list[int]:
        """Of what `run` returned. The host has waited for it, so that any stream may read it then."""
        ...


@dataclass(slots=True)
class _Drafting:
    """One request on its way: rows [first_row + num_done, ...) of `tokens` are to be computed."""

    asked: Asked
    depth: int
    first_row: int
    tokens: list[int]
    num_done: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.tokens) - self.num_done

    def chunk(self, most_tokens: int) -> SequenceChunk:
        tokens = self.tokens[self.num_done : self.num_done + most_tokens]
        is_last = len(tokens) == self.num_left
        return SequenceChunk(tokens, self.first_row + self.num_done, self.asked.block_table, is_last)


class ModelProposer:
    """A `Proposer` by one method.

    Args:
        method: "draft_model" or "mtp".
        draw: for requests that are not greedy.
        max_tokens_per_run: more rows than that are computed one run after another.
    """

    def __init__(self, method: str, drafter: Drafter, *, block_size: int, draw: Draw, max_tokens_per_run: int) -> None:
        self.methods = (method,)
        self._drafter, self._draw, self._max_tokens = drafter, draw, max_tokens_per_run
        self._synced = SyncedRows(block_size)
        self._probabilities: dict[RequestId, list[Tensor]] = {}

    @property
    def num_requests(self) -> int:
        """About which it remembers something."""
        return self._synced.num_requests

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        """Drafts for each: as many as were asked for, unless the model's context ends before."""
        self._probabilities.clear()
        all_of_them = [self._begin(a) for a in asked]
        work = [w for w in all_of_them if w.depth > 0]
        while unfinished := [w for w in work if len(w.drafts) < w.depth]:
            self._run(unfinished)
        for w in work:
            self._keep(w)
        return [w.drafts for w in all_of_them]

    def follow(self, prefills: Sequence[Prefill]) -> Callable[[], None] | None:
        """As `Follows`: of each prompt what is missing, in one run. What it has no room for, a later one computes."""
        if self._drafter.fill is None:
            return None
        chunks: list[SequenceChunk] = []
        room = self._max_tokens
        for prefill in prefills:
            if room and (chunk := self._missing(prefill, room)):
                chunks.append(chunk)
                room -= len(chunk.token_ids)
        return partial(self._drafter.fill, chunks) if chunks else None

    def probabilities(self, request: RequestId) -> Tensor | None:
        """What the drafts made last were drawn from, shape [d, V]; None if the request is greedy or has none."""
        kept = self._probabilities.get(request)
        return torch.stack(kept) if kept else None

    def forget(self, request: RequestId) -> None:
        self._synced.forget(request)
        self._probabilities.pop(request, None)

    def _missing(self, prefill: Prefill, most_tokens: int) -> SequenceChunk | None:
        """Rows that it counts as computed from now on: whatever reads them is launched later, on the same stream."""
        state, table, num_tokens = prefill
        # The target draws a token before the first drafts, and one behind the last.
        if state.request.output_tokens < 3 or state.num_tokens > self._drafter.max_rows:
            return None
        asked = Asked(state, self.methods[0], 0, table)
        start = self._synced.count(asked)
        end = min(num_tokens, start + most_tokens)
        if start >= end:
            return None
        self._synced.write(asked, start, end)
        self._synced.keep(asked, start, end, ())
        return SequenceChunk(state.token_ids(start, end).tolist(), start, table, 0)

    def _begin(self, asked: Asked) -> _Drafting:
        assert asked.method in self.methods, f"{asked.method} drafts asked of {self.methods[0]}"
        state, lag = asked.state, int(self._drafter.reads_target)
        num_rows = state.num_tokens - lag
        assert num_rows > 0, f"request {state.id} drafts behind {state.num_tokens} tokens"
        first_row = min(self._synced.count(asked), num_rows - 1)  # the last row's logits are wanted, known or not
        depth = min(asked.depth, self._drafter.max_rows - num_rows + 1)
        return _Drafting(asked, depth, first_row, state.token_ids(first_row + lag, state.num_tokens).tolist())

    def _run(self, unfinished: Sequence[_Drafting]) -> None:
        """Who is nearly there goes first, so that nobody waits for another's prompt."""
        batch: list[_Drafting] = []
        chunks: list[SequenceChunk] = []
        room = self._max_tokens
        for w in sorted(unfinished, key=lambda w: w.num_left):
            if room:
                chunk = w.chunk(room)
                batch.append(w)
                chunks.append(chunk)
                room -= len(chunk.token_ids)
                start = chunk.num_computed_tokens
                self._synced.write(w.asked, start, start + len(chunk.token_ids))
        logits_RV = self._drafter.run(chunks)
        for w, chunk in zip(batch, chunks, strict=True):
            w.num_done += len(chunk.token_ids)
        self._extend([w for w, chunk in zip(batch, chunks, strict=True) if chunk.num_logits], logits_RV)

    def _extend(self, drawing: Sequence[_Drafting], logits_RV: Tensor) -> None:
        tokens = self._drafter.argmax(logits_RV) if drawing else []
        for row, (w, token) in enumerate(zip(drawing, tokens, strict=True)):
            state = w.asked.state
            if state.request.sampling.temperature > 0:
                position = state.num_tokens + len(w.drafts) - state.num_prompt_tokens
                token, q_V = self._draw(logits_RV[row], state.request.sampling, state.id, position)  # noqa: PLW2901
                assert q_V is not None, f"request {state.id} samples, and its draft was not drawn"
                self._probabilities.setdefault(state.id, []).append(q_V)
            w.drafts.append(token)
            w.tokens.append(token)

    def _keep(self, w: _Drafting) -> None:
        if self._drafter.reads_target:
            self._synced.keep(w.asked, w.first_row, w.asked.state.num_tokens - 1, ())
        else:
            self._synced.keep(w.asked, w.first_row, w.asked.state.num_tokens, w.drafts[:-1])
