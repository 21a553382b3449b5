"""One engine step: chunks of sequences in, logits out."""

# Shapes: T packed tokens, R rows whose logits are wanted, D hidden size, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.device import Device
from xllm_lab.engine.graphs import Graphs
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.ops.batch import paged_batch
from xllm_lab.engine.ops.collectives import Group
from xllm_lab.engine.sampler import sample
from xllm_lab.workload import Request


class SequenceChunk(NamedTuple):
    """What one sequence computes in a step: a prompt, a piece of one, or the last token drawn.

        tokens    0 ........... num_computed_tokens ........... num_computed_tokens + len(token_ids)
                  in the pool already | computed now, then in the pool too

    Attributes:
        token_ids: the tokens to compute now, at least 1; -1 - row is the token that row drew in the step before.
        num_computed_tokens: tokens of this sequence that are in the pool.
        block_table: blocks of the pool that hold the sequence, covering both parts; may be longer.
        wants_logits: whether the last of these tokens' logits are wanted.
    """

    token_ids: Sequence[int]
    num_computed_tokens: int
    block_table: Sequence[int]
    wants_logits: bool


class Runner:
    """Runs steps of a model over a KV pool. Between steps it keeps memory, and the tokens drawn last.

    Args:
        told: ranks that need the tokens that rank 0 draws; None: nobody does.

    Attributes:
        workspace: the memory of a step.
        graphs: captured steps over that memory, if there are to be any.
        observer: told of each step, when it is computed: its chunks, and what the head reads of all their tokens, shape
            [T, D], which stands until the next step.
    """

    def __init__(self, model: DecoderModel, kv_pool: KvPool, device: Device, *, told: Group | None = None) -> None:
        self._model, self._kv_pool, self._device, self._told = model, kv_pool, device, told
        self.workspace = model.workspace()
        self.graphs: Graphs | None = None
        self.observer: Callable[[Sequence[SequenceChunk], Tensor], None] | None = None
        self._drawn: list[int] = []

    def run(self, chunks: Sequence[SequenceChunk], graph_tokens: int | None = None) -> Tensor:
        """Computes one step; sequences may share blocks as long as nobody writes into a shared one.

        Prefill and decode mix freely: matrix products run over all tokens at once, attention sequence by sequence.

        Args:
            graph_tokens: the size of the graph to run it in; None: eagerly.

        Returns:
            Logits of the chunks that want them, in their order: shape [R, V], float32. They stand until the next step,
            which writes its own into the same memory.
        """
        assert chunks, "a step of no chunks"
        tokens: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            assert len(chunk.token_ids), "a chunk of no tokens"
            tokens += chunk.token_ids
            if chunk.wants_logits:
                wanted.append(len(tokens) - 1)
        if min(tokens) < 0:
            tokens = [self._drawn[-1 - token] if token < 0 else token for token in tokens]
        if graph_tokens is not None:
            return self._replay(chunks, tokens, wanted, graph_tokens)
        positions = [p for c in chunks for p in range(c.num_computed_tokens, c.num_computed_tokens + len(c.token_ids))]
        device = self._device.torch_device
        with torch.inference_mode():
            batch = paged_batch(
                [len(chunk.token_ids) for chunk in chunks],
                [chunk.num_computed_tokens for chunk in chunks],
                [chunk.block_table for chunk in chunks],
                self._kv_pool.layers[0].k_BPKH,
            )
            normed_TD = self._model.run_layers(
                torch.tensor(tokens, device=device),
                torch.tensor(positions, device=device),
                batch=batch,
                kv=self._kv_pool.layers,
                workspace=self.workspace,
            )
            if self.observer is not None:
                self.observer(chunks, normed_TD)
            wanted_R = torch.tensor(wanted, dtype=torch.int64, device=device)
            return self._model.logits(normed_TD[wanted_R], self.workspace)

    def _replay(
        self, chunks: Sequence[SequenceChunk], tokens: Sequence[int], wanted: Sequence[int], graph_tokens: int
    ) -> Tensor:
        assert self.graphs is not None, f"a graph of {graph_tokens} tokens, and no graphs"
        with torch.inference_mode():
            normed_TD, logits_TV = self.graphs.run(graph_tokens, tokens, chunks)
            if self.observer is not None:
                self.observer(chunks, normed_TD[: len(tokens)])
            if logits_TV is None:
                return self._model.logits(normed_TD[wanted], self.workspace)
            return logits_TV[: len(wanted)] if len(wanted) == len(tokens) else logits_TV[wanted]

    def draw(
        self,
        chunks: Sequence[SequenceChunk],
        requests: Sequence[Request],
        positions: Sequence[int],
        graph_tokens: int | None = None,
    ) -> list[int]:
        """Computes one step and draws its tokens, which the next step may follow before anybody has seen them.

        Args:
            requests, positions: of the chunks that want logits, in their order: whose token is drawn, and which
                output token of theirs it becomes (0 first).
            graph_tokens: as `run`.
        """
        logits_RV = self.run(chunks, graph_tokens)
        if not requests:
            self._device.synchronize()  # otherwise reading the tokens is what waits for the step
        sampling, ids = [r.sampling for r in requests], [r.id for r in requests]
        tokens = sample(logits_RV, sampling, ids, positions, argmax=self._model.ops.argmax)
        if self._told is not None and tokens:
            self._told.broadcast(torch.tensor(tokens, device=self._device.torch_device))
        self._drawn = tokens
        return tokens

    def follow_draw(self, chunks: Sequence[SequenceChunk], graph_tokens: int | None = None) -> None:
        """`draw` on a rank other than 0, which computes its part and is told the tokens."""
        self.run(chunks, graph_tokens)
        count = sum(chunk.wants_logits for chunk in chunks)
        if self._told is not None and count:
            drawn_R = torch.empty(count, dtype=torch.int64, device=self._device.torch_device)
            self._told.broadcast(drawn_R)
            self._drawn = drawn_R.tolist()
