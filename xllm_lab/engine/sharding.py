"""A model divided over the ranks of a tensor-parallel group: what each holds, and which models cannot be divided.

    columns of     qkv, gate and up    each rank has its heads, and its channels of the MLP or of every expert,
                                       or, with expert parallelism, some experts with all their channels
    rows of        out, down           each adds its part of the sum: an all-reduce follows
    vocabulary     embedding, head     each has its tokens' rows: an all-reduce, and an all-gather of logits, follow
    whole          norms, routers, what compresses queries and KV

Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3. Where ranks are more than KV heads, several keep the same
one, as vLLM and xLLM do; of latent attention all keep all of KV, which heads share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.layer_config import Mixture
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.errors import ConfigError
from xllm_lab.policies.experts.placement import contiguous

# Rows of a part of the vocabulary are a multiple of these, which kernels like.
_VOCABULARY_ROWS = 64
# By module: w1, w2 and w3 are gate, down and up in Mixtral's names.
_COLUMNS = ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "w1", "w3")
_ROWS = ("o_proj", "down_proj", "w2")


def refuse_if_indivisible(
    config: ModelConfig, tensor_parallel: int, name: str, *, has_whole_experts: bool = False
) -> None:
    """Raise ConfigError if a model, by its name, cannot be divided over so many ranks.

    Args:
        has_whole_experts: experts lie on ranks, and are not divided.
    """
    told = f"tensor_parallel is {tensor_parallel}"
    if tensor_parallel < 1:
        raise ConfigError(f"{told}, at least 1 is accepted")
    parts = [(config.num_heads, "attention heads"), (config.intermediate_size, "channels of the MLP")]
    if (mixture := config.mixture) is not None:
        parts.append((mixture.shared_size, "channels of the shared experts"))
        if not has_whole_experts:
            parts.append((mixture.intermediate_size, "channels of an expert"))
    for count, what in parts:
        if count % tensor_parallel:
            raise ConfigError(f"{told}; a divisor of the {count} {what} of {name} is accepted")
    if config.num_kv_heads % tensor_parallel and tensor_parallel % config.num_kv_heads:
        raise ConfigError(
            f"{told}; a divisor or a multiple of the {config.num_kv_heads} key-value heads of {name} is accepted"
        )


class ExpertShare(NamedTuple):
    """A rank among those that the experts lie on: each has as many slots, and a slot the weights of one expert.

    Attributes:
        rank, size: of the ranks.
        num_redundant: slots of each rank beside those that hold every expert once.
    """

    rank: int
    size: int
    num_redundant: int = 0

    def slots(self, num_experts: int) -> tuple[int, ...]:
        """The expert in each slot of a layer before anything moved: rank 0's slots first.

        Raises:
            ConfigError: the experts do not divide among the ranks, or there are more slots than a rank can use.
        """
        try:
            return contiguous(num_experts, self.size, self.num_redundant)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def num_own(self, num_experts: int) -> int:
        """Slots of each rank."""
        return num_experts // self.size + self.num_redundant

    def own(self, num_experts: int) -> tuple[int, ...]:
        """The expert in each slot of this rank."""
        num_own = self.num_own(num_experts)
        return self.slots(num_experts)[self.rank * num_own : (self.rank + 1) * num_own]


class VocabularyPart(NamedTuple):
    """The tokens whose rows of embedding and head a rank has.

    Attributes:
        first: of its tokens.
        own: tokens of each rank; the last rank's may be fewer.
        rows: `own` and at least one row of zeros, which stands for the tokens of others.
    """

    first: int
    own: int
    rows: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model that `refuse_if_indivisible` lets pass.

    Attributes:
        rank, size: of those that share each matrix.
        experts: of those that the experts lie on; None: experts are divided like all else.
    """

    rank: int = 0
    size: int = 1
    experts: ExpertShare | None = None

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The part's own heads and channels; hidden size and vocabulary are the whole model's."""
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
            intermediate_size=whole.intermediate_size // self.size,
            mixture=whole.mixture and self._mixture(whole.mixture),
        )

    def _mixture(self, whole: Mixture) -> Mixture:
        own, shared = whole.intermediate_size, whole.shared_size // self.size
        if self.experts is None:
            own //= self.size
        return replace(whole, intermediate_size=own, shared_size=shared)

    def vocabulary(self, vocab_size: int) -> VocabularyPart:
        """The part of so many tokens."""
        own = -(-vocab_size // self.size)
        return VocabularyPart(self.rank * own, own, -(-(own + 1) // _VOCABULARY_ROWS) * _VOCABULARY_ROWS)

    def cut(self, weights: dict[str, Tensor], whole: ModelConfig) -> dict[str, Tensor]:
        """The part's weights, copied; `weights`, as `weights.checked` returns them, is emptied meanwhile."""
        if self.size == 1 and self.experts is None:
            return weights
        cut: dict[str, Tensor] = {}
        for name in list(weights):
            weight = weights.pop(name)
            *_, block, number, _, _ = ("", "", *name.split("."))
            if self.experts is not None and block == "experts":
                assert whole.mixture is not None, "experts of no mixture"
                part = weight if int(number) in self.experts.own(whole.mixture.routing.num_experts) else None
            else:
                part = weight if self.size == 1 else self._part(name, weight, whole)
            if part is not None:
                cut[name] = part
        return cut

    def _part(self, name: str, weight: Tensor, whole: ModelConfig) -> Tensor | None:
        module, kind = name.split(".")[-2:]
        if module in ("embed_tokens", "lm_head"):
            return self._rows_of_vocabulary(weight)
        if module in ("k_proj", "v_proj"):
            heads = max(1, whole.num_kv_heads // self.size)
            first = self.rank * whole.num_kv_heads // self.size
            return weight[first * whole.head_dim : (first + heads) * whole.head_dim].clone()
        if module in _COLUMNS:
            return weight.chunk(self.size, 0)[self.rank].clone()
        if module in _ROWS:
            if kind == "bias":  # it is added once
                return weight if self.rank == 0 else None
            return weight.chunk(self.size, 1)[self.rank].clone(memory_format=torch.contiguous_format)
        return weight

    def _rows_of_vocabulary(self, weight_VD: Tensor) -> Tensor:
        part = self.vocabulary(len(weight_VD))
        rows = weight_VD[part.first : part.first + part.own]
        return torch.cat([rows, rows.new_zeros(part.rows - len(rows), rows.shape[1])])
