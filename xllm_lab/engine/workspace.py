"""Memory of a step, used again by every layer and every step: a steady step allocates nothing large."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, R rows whose logits are wanted, D hidden size, N query heads, K KV heads, H head dim,
#         F width of the MLP, V vocabulary, n ranks, U rows of a rank's part of the vocabulary

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.sharding import Shard
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.request_state import MOST_DRAFTS


class Rows(NamedTuple):
    """One step's part of the workspace.

    Attributes:
        hidden_TD: the residual stream.
        normed_TD: what a branch reads.
        branch_TD: what it adds.
        qkv_THn: query, key and value heads side by side, [T, N + 2 K, H].
        attended_TNH: what the attention returns.
        gate_up_TF2, gated_TF: inside the MLP.
        cos_TH, sin_TH: of the tokens' angles, as `rope` wants them.
    """

    hidden_TD: Tensor
    normed_TD: Tensor
    branch_TD: Tensor
    qkv_THn: Tensor
    attended_TNH: Tensor
    gate_up_TF2: Tensor
    gated_TF: Tensor
    cos_TH: Tensor
    sin_TH: Tensor


class Workspace:
    """Grows to the largest step seen, which `reserve` may tell it beforehand.

    Attributes:
        num_allocations: how often it grew.
        num_bytes: what it holds now.
        is_fixed: whether somebody counts on its addresses; it may then grow no more.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
    ) -> None:
        """Args: `shard` says which part of a model `config` is; None: all of it."""
        N, K, H, D, F = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.hidden_size,
            config.intermediate_size,
        )
        self._shapes = ((D,), (D,), (D,), (N + 2 * K, H), (N, H), (2 * F,), (F,), (H,), (H,))
        self._vocab_size, self._dtype, self._device = config.vocab_size, dtype, device
        self._num_ranks = 0 if shard is None else shard.size
        self._part_rows = 0 if shard is None else shard.vocabulary(config.vocab_size).rows
        self._rows = self._allocate(0)
        self._own_T = torch.empty(0, dtype=torch.int64, device=device)
        self._logits_RV = torch.empty((0, self._vocab_size), device=device)
        self._parts = torch.empty(0, device=device)
        self._cut = self._rows
        self.num_allocations = 0
        self.is_fixed = False

    @property
    def num_bytes(self) -> int:
        held = (*self._rows, self._own_T, self._logits_RV, self._parts)
        return sum(t.numel() * t.element_size() for t in held)

    def bytes_for(self, *, tokens: int, logits: int) -> int:
        """What it holds at least once so much is reserved."""
        a_token = sum(math.prod(shape) for shape in self._shapes) * self._dtype.itemsize
        a_token += self._own_T.element_size() * bool(self._num_ranks)
        a_row = (self._vocab_size + self._parts_width) * self._logits_RV.element_size()
        most_tokens, most_logits = max(tokens, len(self._rows.hidden_TD)), max(logits, len(self._logits_RV))
        return most_tokens * a_token + most_logits * a_row

    def reserve(self, *, tokens: int, logits: int) -> None:
        """Makes room for a step of that many tokens and rows of logits."""
        grows = tokens > len(self._rows.hidden_TD) or logits > len(self._logits_RV)
        assert not (grows and self.is_fixed), f"{tokens} tokens, {logits} logits: graphs count on addresses here"
        if tokens > len(self._rows.hidden_TD):
            self._rows = self._cut = self._allocate(0)  # the old memory goes before the new comes
            self._rows = self._cut = self._allocate(tokens)
            self._own_T = torch.empty(tokens if self._num_ranks else 0, dtype=torch.int64, device=self._device)
            self.num_allocations += 1
        if logits > len(self._logits_RV):
            self._logits_RV = torch.empty((logits, self._vocab_size), device=self._device)
            self._parts = torch.empty(logits * self._parts_width, device=self._device)
            self.num_allocations += 1

    def rows(self, tokens: int) -> Rows:
        """Views for a step of that many tokens; what they hold is the last step's."""
        self.reserve(tokens=tokens, logits=0)
        if len(self._cut.hidden_TD) != tokens:
            self._cut = Rows(*(t[:tokens] for t in self._rows))
        return self._cut

    def logits(self, rows: int) -> Tensor:
        """Shape [R, V], float32."""
        self.reserve(tokens=0, logits=rows)
        return self._logits_RV[:rows]

    def own_tokens(self, tokens: int) -> Tensor:
        """Shape [T], int64: where a rank of several finds tokens in its part of the embedding."""
        self.reserve(tokens=tokens, logits=0)
        return self._own_T[:tokens]

    def logit_parts(self, rows: int) -> tuple[Tensor, Tensor]:
        """Shapes [R, U] and [n, R, U], float32: a rank's part of the logits, and those of all."""
        self.reserve(tokens=0, logits=rows)
        own, n, U = rows * self._part_rows, self._num_ranks, self._part_rows
        return self._parts[:own].view(rows, U), self._parts[own : own + n * own].view(n, rows, U)

    @property
    def _parts_width(self) -> int:
        return (1 + self._num_ranks) * self._part_rows

    def _allocate(self, tokens: int) -> Rows:
        # Zeros: rows that only pad a step may never be written, and are read.
        return Rows(*(torch.zeros((tokens, *s), dtype=self._dtype, device=self._device) for s in self._shapes))


def most_logits(config: InstanceConfig) -> int:
    """Rows that the head computes at once: one for each sequence, and at least those of one with all its drafts."""
    return min(max(config.max_seqs_per_batch, 1 + MOST_DRAFTS), config.max_tokens_per_batch)
