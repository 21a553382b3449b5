"""One engine step: chunks of sequences in, logits out."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, R rows whose logits are wanted, D hidden size, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.company import Company
from xllm_lab.engine.device import Device
from xllm_lab.engine.drafts.verify import Row, verify
from xllm_lab.engine.graphs import Graphs
from xllm_lab.engine.kv import KvLayout, LayerKv
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.ops.batch import paged_batch, sent
from xllm_lab.engine.ops.collectives import Group


class SequenceChunk(NamedTuple):
    """What one sequence computes in a step: a prompt, a piece of one, or the last token drawn and drafts behind it.

        tokens    0 ........... num_computed_tokens ........... num_computed_tokens + len(token_ids)
                  in the pool already | computed now, then in the pool too

    Attributes:
        token_ids: the tokens to compute now, at least 1; -1 - row is the token that row drew in the step before.
        num_computed_tokens: tokens of this sequence that are in the pool.
        block_table: blocks of the pool that hold the sequence, covering both parts; may be longer.
        num_logits: of how many of these tokens, the last ones, logits are wanted.
    """

    token_ids: Sequence[int]
    num_computed_tokens: int
    block_table: Sequence[int]
    num_logits: int


class _Computed(NamedTuple):
    """What a step left in memory, until the next one.

    Attributes:
        normed_TD: what the head reads, of all tokens.
        logits_TV: of the same tokens, if its graph had the head in it.
        wanted: the tokens whose logits are.
    """

    normed_TD: Tensor
    logits_TV: Tensor | None
    wanted: list[int]


class Runner:
    """Runs steps of a model over a KV pool. Between steps it keeps memory, and the tokens drawn last.

    Args:
        told: ranks that need the tokens that rank 0 draws; None: nobody does.

    Attributes:
        kv_pool: where keys and values are.
        workspace: the memory of a step.
        graphs: captured steps over that memory, if there are to be any.
        most_logits: rows that the head computes at once when tokens are drawn; a sequence's stay together.
        observer: told of each step, when it is computed: its chunks, and what the head reads of all their tokens, shape
            [T, D], which stands until the next step.
        expert_observer: told of each step how many tokens it had, and how many rows each expert of each layer, shape
            [L, E], int64, which stands until the next step. The workspace must be told beforehand to count them.
        company: where each rank has its own tokens: what is known of the others.
    """

    def __init__(self, model: DecoderModel, kv_pool: KvLayout, device: Device, *, told: Group | None = None) -> None:
        self._model, self.kv_pool, self._device, self._told = model, kv_pool, device, told
        self.workspace = model.workspace()
        self.graphs: Graphs | None = None
        self.most_logits = 1 << 30
        self.observer: Callable[[Sequence[SequenceChunk], Tensor], None] | None = None
        self._drawn: list[int] = []
        among = model.experts
        self.company = Company()
        self._others = among.group if among is not None and among.has_own_tokens else None
        self.expert_observer: Callable[[int, Tensor], None] | None = None

    @property
    def kv(self) -> Sequence[LayerKv]:
        """What the steps read and write."""
        return self.kv_pool.layers

    def run(self, chunks: Sequence[SequenceChunk], graph_tokens: int | None = None) -> Tensor:
        """Computes one step; sequences may share blocks as long as nobody writes into a shared one.

        Prefill and decode mix freely: matrix products run over all tokens at once, attention sequence by sequence.

        Args:
            graph_tokens: the size of the graph to run it in; None: eagerly.

        Returns:
            Logits of the tokens of which they are wanted, in their order: shape [R, V], float32. They stand until the
            next step, which writes its own into the same memory.
        """
        done = self._compute(chunks, graph_tokens)
        return self._logits(done, done.wanted)

    def fill(self, chunks: Sequence[SequenceChunk]) -> None:
        """Computes one step, eagerly, for what it leaves in the pool. Nobody waits for it."""
        self._compute(chunks, None)

    def draw(
        self,
        chunks: Sequence[SequenceChunk],
        rows: Sequence[Row],
        graph_tokens: int | None = None,
        *,
        tells: bool = True,
        beside: Sequence[Callable[[], None]] = (),
    ) -> list[list[int]]:
        """Computes one step and draws its tokens; the next step may follow the last of each before anybody has seen it.

        Args:
            rows: of the requests that draw, in order of their chunks: how, and behind which drafts.
            graph_tokens: as `run`.
            tells: the other ranks, if there are any; they need not know behind drafts, which no step is ahead of.
            beside: launches other work, on another stream, while this step is computed.

        Returns:
            Of each of `rows` the drafts that are kept, and one token more.
        """
        done = self._compute(chunks, graph_tokens)
        for launch in beside:
            launch()
        if not rows:
            self._device.synchronize()  # otherwise reading the tokens is what waits for the step
        tokens: list[list[int]] = []
        left = list(rows)
        for wanted in _parts([1 + len(row.drafts) for row in rows], done.wanted, self.most_logits):
            part: list[Row] = []
            while sum(1 + len(row.drafts) for row in part) < len(wanted):
                part.append(left.pop(0))
            tokens += verify(self._logits(done, wanted), part, argmax=self._model.ops.argmax)
        self._drawn = [drawn[-1] for drawn in tokens]
        if self._told is not None and tokens and tells:
            self._told.broadcast(torch.tensor(self._drawn, device=self._device.torch_device))
        return tokens

    def run_beside(self, *, has_requests: bool = False) -> bool:
        """Where each rank has its own tokens: takes part in a step of others, for their tokens' experts that are here.

        Args:
            has_requests: this rank will have tokens before long, though it is not called again.

        Returns:
            Whether anybody had tokens. All learn the same, and `company` what follows.
        """
        with torch.inference_mode():
            if not self._meet(0, has_requests=has_requests):
                return False
            self._model.run_beside(self.workspace)
        return True

    def follow_draw(
        self, chunks: Sequence[SequenceChunk], graph_tokens: int | None = None, *, tells: bool = True
    ) -> None:
        """`draw` on a rank other than 0, which computes its part and may be told the tokens."""
        done = self._compute(chunks, graph_tokens)
        for wanted in _parts([c.num_logits for c in chunks if c.num_logits], done.wanted, self.most_logits):
            self._logits(done, wanted)
        count = sum(chunk.num_logits > 0 for chunk in chunks)
        if self._told is not None and count and tells:
            drawn_R = torch.empty(count, dtype=torch.int64, device=self._device.torch_device)
            self._told.broadcast(drawn_R)
            self._drawn = drawn_R.tolist()

    def _compute(self, chunks: Sequence[SequenceChunk], graph_tokens: int | None) -> _Computed:
        assert chunks, "a step of no chunks"
        tokens: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            assert len(chunk.token_ids), "a chunk of no tokens"
            tokens += chunk.token_ids
            wanted += range(len(tokens) - chunk.num_logits, len(tokens))
        if min(tokens) < 0:
            tokens = [self._drawn[-1 - token] if token < 0 else token for token in tokens]
        with torch.inference_mode():
            if self._others is not None:
                self._meet(len(tokens), has_requests=True)
            if graph_tokens is None:
                normed_TD, logits_TV = self._run_eagerly(chunks, tokens), None
            else:
                assert self.graphs is not None, f"a graph of {graph_tokens} tokens, and no graphs"
                normed_TD, logits_TV = self.graphs.run(graph_tokens, tokens, chunks)
            if self.observer is not None:
                self.observer(chunks, normed_TD[: len(tokens)])
            if self.expert_observer is not None:
                assert self.workspace.counts_experts, "rows that nobody counted"
                self.expert_observer(len(tokens), self.workspace.expert_rows_LE)
        return _Computed(normed_TD, logits_TV, wanted)

    def _meet(self, num_tokens: int, *, has_requests: bool) -> int:
        """All tell all how many tokens they have in the step that begins. Returns those of all."""
        assert self._others is not None, "a rank whose tokens all have"
        own_3 = torch.tensor([num_tokens, has_requests, self.company.num_calls], device=self._device.torch_device)
        of_all_n3 = torch.empty((self._others.size, 3), dtype=own_3.dtype, device=own_3.device)
        self._others.all_gather(own_3, of_all_n3)
        tokens, requests, calls = of_all_n3.T.tolist()
        self.company.met(requests, calls)
        self.workspace.tokens_of_ranks = tuple(tokens)
        total = sum(self.workspace.tokens_of_ranks)
        # Before the step begins: what stands in the workspace is lost when it grows.
        self.workspace.reserve(tokens=total, logits=0)
        return total

    def _run_eagerly(self, chunks: Sequence[SequenceChunk], tokens: Sequence[int]) -> Tensor:
        positions = [p for c in chunks for p in range(c.num_computed_tokens, c.num_computed_tokens + len(c.token_ids))]
        device = self._device.torch_device
        batch = paged_batch(
            [len(chunk.token_ids) for chunk in chunks],
            [chunk.num_computed_tokens for chunk in chunks],
            [chunk.block_table for chunk in chunks],
            self.kv_pool.layers[0].k_BPKH,
        )
        return self._model.run_layers(
            sent(torch.tensor(tokens), device),
            sent(torch.tensor(positions), device),
            batch=batch,
            kv=self.kv_pool.layers,
            workspace=self.workspace,
        )

    def _logits(self, done: _Computed, wanted: Sequence[int]) -> Tensor:
        """Shape [R, V] of some of the tokens, in ascending order."""
        with torch.inference_mode():
            if done.logits_TV is None:
                wanted_R = sent(torch.tensor(wanted, dtype=torch.int64), self._device.torch_device)
                return self._model.logits(done.normed_TD[wanted_R], self.workspace)
            if wanted and wanted[-1] - wanted[0] == len(wanted) - 1:
                return done.logits_TV[wanted[0] : wanted[-1] + 1]
            return done.logits_TV[wanted]


def _parts(sizes: Sequence[int], wanted: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """`wanted` in parts of at most so many rows, or of one sequence; nothing is a part, too, for ranks to meet in."""
    assert sum(sizes) == len(wanted), f"{len(wanted)} rows of logits for sequences of {list(sizes)}"
    start = end = 0
    for size in sizes:
        if end > start and end + size - start > most:
            yield wanted[start:end]
            start = end
        end += size
    yield wanted[start:end]
