"""Memory of a step, used again by every layer and every step: a steady step allocates nothing large."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T packed tokens, R rows whose logits are wanted, D hidden size, N query heads, K KV heads, H head dim,
#         F width of an MLP, V vocabulary, n ranks, U rows of a rank's part of the vocabulary, L layers, E experts, k
#         of a token, S slots of all ranks, P of this one; of latent attention, as in `latent_attention`

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
        query_down_TQ ... value_TNV: inside latent attention; empty where there is none, as `qkv_THn` is where there is.
        router_TE ... slot_Tk: inside a mixture of experts, likewise; `router_TE` and `weight_Tk` are float32,
            `expert_Tk`, `place_Tk` and `slot_Tk` int32, the last only where ranks share the experts.
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
    query_down_TQ: Tensor
    query_nope_TNI: Tensor
    query_rope_TNR: Tensor
    latent_TC: Tensor
    key_rope_T1R: Tensor
    query_TNH: Tensor
    value_TNV: Tensor
    router_TE: Tensor
    weight_Tk: Tensor
    expert_Tk: Tensor
    place_Tk: Tensor
    expert_rows_TkD: Tensor
    expert_gate_up_TkF2: Tensor
    expert_gated_TkF: Tensor
    shared_gate_up_TF2: Tensor
    shared_gated_TF: Tensor
    shared_TD: Tensor
    slot_Tk: Tensor


class _Row(NamedTuple):
    """What one token has in a field of `Rows`; dtype None is the model's."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


_NONE = _Row((0,))


class Workspace:
    """Grows to the largest step seen, which `reserve` may tell it beforehand.

    Attributes:
        num_allocations: how often it grew.
        num_bytes: what it holds now.
        expert_rows_LE: int64, how many rows each expert of each layer had in the last step; 0 in layers without. With
            expert parallelism, of the tokens that this rank has: of all, or where each has its own, of those.
        slot_rows_LS: likewise of each slot of all ranks; empty without expert parallelism.
        own_rows_LP: rows that each slot of this rank computed, for whoever.
        counts_experts: whether somebody reads the first two.
        tokens_of_ranks: where each rank has its own, tokens that each has in the step at hand.
        is_fixed: whether somebody counts on its addresses; it may then grow no more.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
    ) -> None:
        """Args: `shard` says which part of a model `config` is; None: all of it."""
        self._vocab_size, self._dtype, self._device = config.vocab_size, dtype, device
        self._a_token = _a_token(config, spreads_experts=shard is not None and shard.experts is not None)
        is_divided = shard is not None and shard.size > 1
        self._num_ranks = shard.size if shard is not None and is_divided else 0
        self._part_rows = shard.vocabulary(config.vocab_size).rows if shard is not None and is_divided else 0
        self._rows = self._allocate(0)
        self._own_T = torch.empty(0, dtype=torch.int64, device=device)
        self._logits_RV = torch.empty((0, self._vocab_size), device=device)
        self._parts = torch.empty(0, device=device)
        self._cut = self._rows
        num_experts = config.mixture.routing.num_experts if config.mixture else 0
        own = 0 if shard is None or shard.experts is None else shard.experts.num_own(num_experts)
        slots = 0 if shard is None or shard.experts is None else own * shard.experts.size
        self.expert_rows_LE, self.slot_rows_LS, self.own_rows_LP = (
            torch.zeros((config.num_layers, count), dtype=torch.int64, device=device)
            for count in (num_experts, slots, own)
        )
        self.tokens_of_ranks: tuple[int, ...] = ()
        self.counts_experts = False
        self.num_allocations = 0
        self.is_fixed = False

    @property
    def num_bytes(self) -> int:
        held = (*self._rows, self._own_T, self._logits_RV, self._parts)
        return sum(t.nbytes for t in held) + self._counter_bytes

    def bytes_for(self, *, tokens: int, logits: int) -> int:
        """What it holds at least once so much is reserved."""
        a_token = sum(math.prod(shape) * (dtype or self._dtype).itemsize for shape, dtype in self._a_token)
        a_token += self._own_T.element_size() * bool(self._num_ranks)
        a_row = (self._vocab_size + self._parts_width) * self._logits_RV.element_size()
        most_tokens, most_logits = max(tokens, len(self._rows.hidden_TD)), max(logits, len(self._logits_RV))
        return most_tokens * a_token + most_logits * a_row + self._counter_bytes

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
            self._cut = Rows(*(t[:tokens] if t.numel() else t for t in self._rows))
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
    def _counter_bytes(self) -> int:
        return self.expert_rows_LE.nbytes + self.slot_rows_LS.nbytes + self.own_rows_LP.nbytes

    @property
    def _parts_width(self) -> int:
        return (1 + self._num_ranks) * self._part_rows

    def _allocate(self, tokens: int) -> Rows:
        # Zeros: rows that only pad a step may never be written, and are read.
        made = ((shape, dtype or self._dtype) for shape, dtype in self._a_token)
        return Rows(*(torch.zeros((tokens, *shape), dtype=dtype, device=self._device) for shape, dtype in made))


def _a_token(config: ModelConfig, *, spreads_experts: bool) -> list[_Row]:
    """What each field has of one token, in the order of `Rows`."""
    N, K, H, R = config.num_heads, config.num_kv_heads, config.head_dim, config.rope_dim
    D, F = config.hidden_size, config.intermediate_size
    if config.mixture is not None and len(config.mixture.layers) == config.num_layers:
        F = 0
    dense = [(D,), (D,), (D,), (N + 2 * K, H), (N, H), (2 * F,), (F,), (R,), (R,)]
    of_latents, of_experts = [_NONE] * 7, [_NONE] * 11
    if (latent := config.latent) is not None:
        dense[3] = (0,)
        C, nope = latent.rank, latent.nope_dim
        shapes = ((latent.query_rank,), (N, nope), (N, R), (C,), (1, R), (N, H), (N, latent.value_dim))
        of_latents = [_Row(shape) for shape in shapes]
    if (mixture := config.mixture) is not None:
        (E, k, *_), F, S = mixture.routing, mixture.intermediate_size, mixture.shared_size
        of_experts = [
            *(_Row((E,), torch.float32), _Row((k,), torch.float32), _Row((k,), torch.int32), _Row((k,), torch.int32)),
            *(_Row((k, D)), _Row((k, 2 * F)), _Row((k, F))),
            *(_Row((2 * S,)), _Row((S,)), _Row((D if S else 0,))),
            _Row((k,), torch.int32) if spreads_experts else _NONE,
        ]
    return [*(_Row(shape) for shape in dense), *of_latents, *of_experts]


def most_logits(config: InstanceConfig) -> int:
    """Rows that the head computes at once: one for each sequence, and at least those of one with all its drafts."""
    return min(max(config.max_seqs_per_batch, 1 + MOST_DRAFTS), config.max_tokens_per_batch)
