"""Experts spread over ranks: which expert each slot of a layer has, told to the operators in memory that stays."""

# Shapes: T packed tokens, k experts of a token, E experts, C copies of an expert at most

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops import expert_slots
from xllm_lab.engine.ops.collectives import Group
from xllm_lab.engine.sharding import ExpertShare
from xllm_lab.errors import ConfigError

ALL_GATHER = "all-gather"
ALL_TO_ALL = "all-to-all"
DISPATCHES = (ALL_GATHER, ALL_TO_ALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParallel:
    """How ranks share the experts of a model.

    Attributes:
        group: the ranks.
        dispatch: "all-gather": every rank has all tokens, and computes its experts' part of each; "all-to-all": a
            token's rows go to the ranks of its experts, and come back.
        num_redundant: slots of each rank beside those that hold every expert once.
        has_own_tokens: attention is data-parallel: each rank has tokens of its own. Else all have all of them.
    """

    group: Group
    dispatch: str = ALL_GATHER
    num_redundant: int = 0
    has_own_tokens: bool = False

    @property
    def share(self) -> ExpertShare:
        return ExpertShare(self.group.rank, self.group.size, self.num_redundant)


def refuse_dispatch(dispatch: str, num_redundant: int, *, is_parallel: bool) -> None:
    """Raise ConfigError for an unknown way to the experts, or slots and a way that nobody needs."""
    if dispatch not in DISPATCHES:
        raise ConfigError(f"expert_dispatch is {dispatch!r}, accepted: {', '.join(DISPATCHES)}")
    if not is_parallel and dispatch != ALL_GATHER:
        raise ConfigError(f"expert_dispatch is {dispatch!r} without expert_parallel; accepted: with it")
    if not is_parallel and num_redundant:
        raise ConfigError(f"num_redundant_experts is {num_redundant} without expert_parallel; accepted: 0, or with it")


def refuse_if_not_spreadable(config: ModelConfig, size: int, num_redundant: int, name: str) -> None:
    """Raise ConfigError if the experts of a model, by its name, cannot lie on so many ranks."""
    if config.mixture is None:
        raise ConfigError(f"expert_parallel, and {name} has no experts; accepted: a mixture of experts")
    if size == 1:
        raise ConfigError("expert_parallel with one rank; accepted: tensor_parallel or instances of at least 2")
    ExpertShare(0, size, num_redundant).slots(config.mixture.routing.num_experts)


class LayerSlots:
    """The slots of one layer on all ranks. Its tensors keep their addresses, so that graphs follow a change.

    Attributes:
        slots: the expert in each, rank 0's slots first.
        first, num_own: this rank's slots among them.
    """

    def __init__(self, num_experts: int, share: ExpertShare, device: torch.device, first_turn: int) -> None:
        """Args: `first_turn` is the copy of an expert that gets its first row."""
        self.num_own, self._num_experts, self._first_turn = share.num_own(num_experts), num_experts, first_turn
        self.first = share.rank * self.num_own
        # A rank has no expert twice, so an expert has at most as many copies as there are ranks.
        self._slot_EC = torch.zeros((num_experts + 1, share.size), dtype=torch.int32, device=device)
        self._num_copies_E = torch.ones(num_experts + 1, dtype=torch.int32, device=device)
        self._has_copies = share.num_redundant > 0
        self.slots: tuple[int, ...] = ()
        self.put(share.slots(num_experts))

    def put(self, slots: Sequence[int]) -> None:
        """From the next step on; whoever calls it on all ranks sees to it that their weights are where they say.

        Args:
            slots: the expert in each; every expert has one, and no rank has one twice.
        """
        assert not self.slots or len(slots) == len(self.slots), f"{len(slots)} slots instead of {len(self.slots)}"
        where: list[list[int]] = [[] for _ in range(self._num_experts)]
        for slot, expert in enumerate(slots):
            where[expert].append(slot)
        assert all(where), "an expert without a slot"
        assert all(len({s // self.num_own for s in own}) == len(own) for own in where), "an expert twice on a rank"
        where.append([len(slots)])  # nobody's
        most = self._slot_EC.shape[1]
        self._slot_EC.copy_(torch.tensor([own + [0] * (most - len(own)) for own in where], dtype=torch.int32))
        self._num_copies_E.copy_(torch.tensor([len(own) for own in where], dtype=torch.int32))
        self.slots = tuple(slots)

    def assign(self, expert_Tk: Tensor, slot_Tk: Tensor) -> Tensor:
        """The slots of tokens' experts, written into `slot_Tk`."""
        copies_E = self._num_copies_E if self._has_copies else None
        expert_slots.assign(expert_Tk, self._slot_EC, copies_E, self._first_turn, slot_Tk)
        return slot_Tk

    @property
    def own(self) -> tuple[int, ...]:
        """The expert in each slot of this rank."""
        return self.slots[self.first : self.first + self.num_own]
