"""Memory of a step, used again by every layer and every step: a steady step allocates nothing large."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, R rows whose logits are wanted, D hidden size, N query heads, K KV heads, H head dim,
#         F width of the MLP, V vocabulary

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.model_config import ModelConfig


class Rows(NamedTuple):
    """One step's part of the workspace.

    Attributes:
        hidden_TD: the residual stream.
        normed_TD: what a branch reads.
        branch_TD: what it adds.
        qkv_THn: query, key and value heads side by side, [T, N + 2 K, H].
        attended_TNH: what the attention returns.
        gate_up_TF2, gated_TF: inside the MLP.
    """

    hidden_TD: Tensor
    normed_TD: Tensor
    branch_TD: Tensor
    qkv_THn: Tensor
    attended_TNH: Tensor
    gate_up_TF2: Tensor
    gated_TF: Tensor


class Workspace:
    """Grows to the largest step seen, which `reserve` may tell it beforehand.

    Attributes:
        num_allocations: how often it grew.
        num_bytes: what it holds now.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        N, K, H, D, F = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.hidden_size,
            config.intermediate_size,
        )
        self._shapes = ((D,), (D,), (D,), (N + 2 * K, H), (N, H), (2 * F,), (F,))
        self._vocab_size, self._dtype, self._device = config.vocab_size, dtype, device
        self._rows = self._allocate(0)
        self._logits_RV = torch.empty((0, self._vocab_size), device=device)
        self._cut = self._rows
        self.num_allocations = 0

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._rows, self._logits_RV))

    def reserve(self, *, tokens: int, logits: int) -> None:
        """Makes room for a step of that many tokens and rows of logits."""
        if tokens > len(self._rows.hidden_TD):
            self._rows = self._cut = self._allocate(0)  # the old memory goes before the new comes
            self._rows = self._cut = self._allocate(tokens)
            self.num_allocations += 1
        if logits > len(self._logits_RV):
            self._logits_RV = torch.empty((logits, self._vocab_size), device=self._device)
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

    def _allocate(self, tokens: int) -> Rows:
        return Rows(*(torch.empty((tokens, *s), dtype=self._dtype, device=self._device) for s in self._shapes))
