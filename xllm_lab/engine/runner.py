"""One engine step: chunks of sequences in, logits out."""

# Shapes: T packed tokens, R rows whose logits are wanted, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.device import Device
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.ops.batch import paged_batch


class SequenceChunk(NamedTuple):
    """What one sequence computes in a step: a prompt, a piece of one, or the last token drawn.

        tokens    0 ........... num_computed_tokens ........... num_computed_tokens + len(token_ids)
                  in the pool already | computed now, then in the pool too

    Attributes:
        token_ids: the tokens to compute now, at least 1.
        num_computed_tokens: tokens of this sequence that are in the pool.
        block_table: blocks of the pool that hold the sequence, covering both parts; may be longer.
        wants_logits: whether the last of these tokens' logits are wanted.
    """

    token_ids: Sequence[int]
    num_computed_tokens: int
    block_table: Sequence[int]
    wants_logits: bool


class Runner:
    """Runs steps of a model over a KV pool. Between steps it keeps memory and no state: the pool is all there is.

    Attributes:
        workspace: the memory of a step.
    """

    def __init__(self, model: DecoderModel, kv_pool: KvPool, device: Device) -> None:
        self._model, self._kv_pool, self._device = model, kv_pool, device
        self.workspace = model.workspace()

    def run(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """Computes one step; sequences may share blocks as long as nobody writes into a shared one.

        Prefill and decode mix freely: matrix products run over all tokens at once, attention sequence by sequence.

        Returns:
            Logits of the chunks that want them, in their order: shape [R, V], float32. They stand until the next step,
            which writes its own into the same memory.
        """
        assert chunks, "a step of no chunks"
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            assert len(chunk.token_ids), "a chunk of no tokens"
            start = chunk.num_computed_tokens
            tokens += chunk.token_ids
            positions += range(start, start + len(chunk.token_ids))
            if chunk.wants_logits:
                wanted.append(len(tokens) - 1)
        device = self._device.torch_device
        with torch.inference_mode():
            batch = paged_batch(
                [len(chunk.token_ids) for chunk in chunks],
                [chunk.num_computed_tokens for chunk in chunks],
                [chunk.block_table for chunk in chunks],
                self._kv_pool.layers[0].k_BPKH,
            )
            return self._model.forward(
                torch.tensor(tokens, device=device),
                torch.tensor(positions, device=device),
                torch.tensor(wanted, dtype=torch.int64, device=device),
                batch=batch,
                kv=self._kv_pool.layers,
                workspace=self.workspace,
            )
