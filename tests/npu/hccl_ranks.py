"""What the ranks of `test_fake_hccl.py` do. Expected values are made in plain torch from every rank's input."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from tests.fake_cann import control, operators

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
SIZES = (1, 1000, 300_001)  # one element, one piece, several pieces of shared memory


def of_rank(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers: their sums are exact in every type, so results must be equal to the bit."""
    return ((torch.arange(size) * 7 + rank * 3) % 11).to(dtype)


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.cpu(), expected), f"{name}: {found.flatten()[:8]} is not {expected.flatten()[:8]}"


def one_round(rank: int, ranks: int, size: int, dtype: torch.dtype) -> None:
    each = [of_rank(one, size, dtype) for one in range(ranks)]
    mine = each[rank].npu()

    total = mine.clone()
    dist.all_reduce(total)
    check("all_reduce", total, torch.stack(each).sum(0).to(dtype))
    largest = mine.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    check("all_reduce max", largest, torch.stack(each).amax(0))

    gathered = torch.empty(ranks * size, dtype=dtype, device="npu")
    dist.all_gather_into_tensor(gathered, mine)
    check("all_gather", gathered, torch.cat(each))

    parts = torch.cat([each[rank] + one for one in range(ranks)]).npu()
    part = torch.empty(size, dtype=dtype, device="npu")
    dist.reduce_scatter_tensor(part, parts)
    check("reduce_scatter", part, torch.stack([one + rank for one in each]).sum(0).to(dtype))

    arrived = torch.empty(ranks * size, dtype=dtype, device="npu")
    dist.all_to_all_single(arrived, parts)
    check("all_to_all", arrived, torch.cat([one + rank for one in each]))

    told = mine.clone()
    dist.broadcast(told, ranks - 1)
    check("broadcast", told, each[-1])

    received = torch.empty_like(mine)
    if rank == 0:
        dist.send(mine, 1)
    elif rank == 1:
        dist.recv(received, 0)
        check("recv", received, each[0])


def every_collective(rank: int, ranks: int) -> dict[str, Any]:
    control.set_order(os.environ.get("ORDER", "program"), seed=rank, max_delay_us=300)  # type: ignore[arg-type]
    with control.counting() as counts:
        for dtype in TYPES:
            for size in SIZES:
                one_round(rank, ranks, size, dtype)
        dist.barrier()
    return {name: calls for name, calls in counts.calls().items() if name.startswith("hccl:")}


def uneven_all_to_all(rank: int, ranks: int) -> list[int]:
    """Rank r sends r+1 numbers to rank 0 and one to every other."""
    out = [rank + 1] + [1] * (ranks - 1)
    into = [one + 1 if rank == 0 else 1 for one in range(ranks)]
    sent = torch.arange(sum(out), device="npu") + 100 * rank
    arrived = torch.empty(sum(into), dtype=torch.int64, device="npu")
    dist.all_to_all_single(arrived, sent, into, out)
    return arrived.tolist()


def lists_and_pairs(rank: int, ranks: int) -> list[list[float]]:
    gathered = [torch.empty(3, device="npu") for _ in range(ranks)]
    dist.all_gather(gathered, torch.full((3,), float(rank), device="npu"))
    mine, other = torch.full((400_000,), float(rank), device="npu"), torch.empty(400_000, device="npu")
    pairs = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
    for work in dist.batch_isend_irecv(pairs):
        work.wait()
    return [[one[0].item() for one in gathered], [other[0].item(), other[-1].item()]]


def captured(rank: int, ranks: int) -> list[float]:
    given = torch.zeros(100, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        hidden = given + 1
        dist.all_reduce(hidden)
        out = hidden * 2
    found = []
    for value in range(3):
        given.fill_(value + rank)
        graph.replay()
        found.append(out[0].item())
    return found


def a_matmul_that_reduces(rank: int, ranks: int) -> list[float]:
    """An operator that names its communicator, as fused ones do; its reference talks inside one task."""
    import torch_npu

    def matmul_all_reduce(x1: torch.Tensor, x2: torch.Tensor, hcom: str, **_: object) -> torch.Tensor:
        return operators.all_gather(hcom, x1 @ x2).sum(0)

    operators.install({"npu_mm_all_reduce_base": matmul_all_reduce})
    whole: Any = dist.group.WORLD
    group = whole._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    dist.barrier()  # the communicator is made by the first collective
    x = torch.full((2, 3), float(rank + 1), device="npu")
    reduced: torch.Tensor = torch_npu.npu_mm_all_reduce_base(x, torch.ones(3, 2, device="npu"), group)
    return reduced[0].tolist()


def what_needs_two_ranks(rank: int, ranks: int) -> dict[str, Any]:
    """The above in one process group: a process group costs seconds."""
    scenarios = (uneven_all_to_all, lists_and_pairs, captured, a_matmul_that_reduces)
    return {scenario.__name__: scenario(rank, ranks) for scenario in scenarios}


def different_sizes(rank: int, ranks: int) -> None:
    dist.all_reduce(torch.ones(10 + rank, device="npu"))
    torch.npu.synchronize()


def a_rank_that_dies(rank: int, ranks: int) -> None:
    dist.barrier()
    torch.npu.synchronize()
    if rank == 1:
        os._exit(0)
    dist.all_reduce(torch.ones(10, device="npu"))
    torch.npu.synchronize()
