"""A tensor-parallel group of threads in one process, of which one runs at a time: no libraries, no ports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ThreadedGroup:
    """One rank's end of it. Sums are taken in order of rank."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    @property
    def communicator(self) -> str:
        raise AssertionError("nobody speaks in it but who has it")

    def all_reduce(self, x: Tensor) -> None:
        x.copy_(torch.stack(self._meeting.exchange(self.rank, x)).sum(0))

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        out.copy_(torch.stack(self._meeting.exchange(self.rank, x)))

    def reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        out.copy_(torch.stack(self._meeting.exchange(self.rank, x)).sum(0)[self.rank])

    def all_to_all(self, x: Tensor, out: Tensor, sent: Sequence[int], received: Sequence[int]) -> None:
        assert (len(x), len(out)) == (sum(sent), sum(received))
        offered = self._meeting.exchange(self.rank, x)
        splits = self._meeting.exchange(self.rank, torch.tensor(sent))
        parts = [torch.split(x, each.tolist())[self.rank] for x, each in zip(offered, splits, strict=True)]
        assert [len(part) for part in parts] == list(received)
        out.copy_(torch.cat(parts))

    def broadcast(self, x: Tensor) -> None:
        x.copy_(self._meeting.exchange(self.rank, x)[0])


class Meeting:
    """Where the threads meet: everybody leaves something, and takes what all have left."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._left: list[Any] = [None] * size
        self._all_here = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._left[rank] = x.clone()
        self._all_here.wait()
        taken = list(self._left)
        self._all_here.wait()
        return taken

    def break_up(self) -> None:
        self._all_here.abort()


def on_ranks(size: int, work: Callable[[ThreadedGroup], T]) -> Sequence[T]:
    """What `work` returns on each rank; what any of them raises first."""
    meeting = Meeting(size)
    found: list[Any] = [None] * size
    raised: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadedGroup(rank, meeting))
        except BaseException as error:
            raised.append(error)
            meeting.break_up()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return found
