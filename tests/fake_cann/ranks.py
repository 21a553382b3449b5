"""Several processes, each with its own fake devices, joined by the real ProcessGroupHCCL.

`run("tests.npu.hccl_ranks:sums", 2)` starts two processes, in each of which the function is called as
`sums(rank, num_ranks)` after `init_process_group("hccl")`, and returns what they returned, in the order of ranks.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from typing import Any

MARK = "RESULT "


class RanksFailedError(AssertionError):
    """A rank ended badly; the text has the end of every rank's output."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(target: str, num_ranks: int, *, timeout_s: float = 120, **environment: str) -> list[Any]:
    """Calls `module:function` in `num_ranks` processes and returns their results, which must be JSON.

    Raises:
        RanksFailedError: a rank raised, died or took longer than `timeout_s`.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    shared |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_cann.ranks", target]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    outputs = []
    for rank in ranks:
        try:
            outputs.append(rank.communicate(timeout=timeout_s)[0])
        except subprocess.TimeoutExpired:
            rank.kill()
            outputs.append(rank.communicate()[0] + f"\nno end after {timeout_s} s")
    if any(rank.returncode != 0 for rank in ranks):
        raise RanksFailedError("\n".join(f"--- rank {i}:\n{text[-8000:]}" for i, text in enumerate(outputs)))
    results = []
    for text in outputs:
        line = next(line for line in reversed(text.splitlines()) if line.startswith(MARK))
        results.append(json.loads(line.removeprefix(MARK)))
    return results


def main(target: str) -> None:
    from tests import fake_cann

    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fake_cann.start(num_devices=num_ranks)
    import torch
    import torch.distributed as dist

    torch.npu.set_device(rank)
    dist.init_process_group("hccl")
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(rank, num_ranks)
    sys.stdout.write(f"{MARK}{json.dumps(result)}\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
