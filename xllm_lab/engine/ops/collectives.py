"""What the ranks of a group say to one another while they compute a step.

A group is one of torch's, bound to the library of its device: gloo for CPUs, NCCL for CUDA, HCCL for NPUs. All ranks
call the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from xllm_lab.engine.ops.tape import taped


class Group(Protocol):
    """Ranks that share each matrix of a model, or its experts; this process is one of them."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def communicator(self) -> str:
        """Its name for operators that speak in it themselves, which NPUs have."""
        ...

    def all_reduce(self, x: Tensor) -> None:
        """x becomes the sum of every rank's x, the same bits everywhere."""
        ...

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        """out[r] becomes rank r's x; both are contiguous."""
        ...

    def broadcast(self, x: Tensor) -> None:
        """x becomes rank 0's x."""
        ...

    def reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        """out becomes the sum of every rank's x[r], where r is this rank; both are contiguous."""
        ...

    def all_to_all(self, x: Tensor, out: Tensor, sent: Sequence[int], received: Sequence[int]) -> None:
        """The first sent[0] rows of x go to rank 0, the next sent[1] to rank 1; out has rank 0's rows first.

        Args:
            sent, received: rows to and from each rank; nobody checks that they are what the others say.
        """
        ...


class TorchGroup:
    """The process group of torch that this process is in: there is one.

    Args:
        library: "gloo", "nccl" or "hccl".
        timeout_s: how long a rank waits for another.
        lost: what to raise when an operation fails, because another rank is gone or silent.
    """

    def __init__(
        self,
        library: str,
        store: Any,
        *,
        rank: int,
        size: int,
        timeout_s: float,
        lost: Callable[[RuntimeError], Exception],
    ) -> None:
        self.rank, self.size, self._lost = rank, size, lost
        self._gather: Callable[[Tensor, Tensor], object] = (
            # The first is the name of the second since torch 2.13.
            dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
        )
        self._scatter: Callable[[Tensor, Tensor], object] = (
            dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
        )
        self._run(
            dist.init_process_group,
            library,
            store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )

    @property
    def communicator(self) -> str:
        """As `Group.communicator`. The group's first collective makes it, which a step has before its first layer."""
        whole: Any = dist.group.WORLD
        name: str = whole._get_backend(torch.device("npu")).get_hccl_comm_name(self.rank)
        return name

    def all_reduce(self, x: Tensor) -> None:
        """As `Group.all_reduce`."""
        self._run(dist.all_reduce, x)

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        """As `Group.all_gather`."""
        self._run(self._gather, out.view(-1), x.view(-1))

    def broadcast(self, x: Tensor) -> None:
        """As `Group.broadcast`."""
        self._run(dist.broadcast, x, 0)

    def reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        """As `Group.reduce_scatter`."""
        self._run(self._scatter, out.view(-1), x.view(-1))

    def all_to_all(self, x: Tensor, out: Tensor, sent: Sequence[int], received: Sequence[int]) -> None:
        """As `Group.all_to_all`."""
        self._run(dist.all_to_all_single, out, x, list(received), list(sent))

    def close(self) -> None:
        """Leave the group; whoever waits for this rank is told that it is gone."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _run(self, operation: Callable[..., object], *arguments: Any, **named: Any) -> None:
        try:
            operation(*arguments, **named)
        except RuntimeError as error:
            raise self._lost(error) from error


@taped
def join_logits(parts_nRU: Tensor, own: int, logits_RV: Tensor) -> None:
    """Puts each rank's columns of the logits beside one another.

    Args:
        parts_nRU: as gathered; of each rank's U columns the first `own` are its tokens', the others pad.
    """
    vocab_size = logits_RV.shape[1]
    for rank, part_RU in enumerate(parts_nRU):
        first = rank * own
        kept = min(own, vocab_size - first)
        if kept > 0:
            logits_RV[:, first : first + kept].copy_(part_RU[:, :kept])


@taped
def own_rows(token_T: Tensor, first: int, own: int, row_T: Tensor) -> None:
    """Rows of this rank's part of the embedding, whose row `own` is zero and stands for the tokens of other ranks."""
    torch.sub(token_T, first, out=row_T)
    row_T.masked_fill_((row_T < 0) | (row_T > own), own)
