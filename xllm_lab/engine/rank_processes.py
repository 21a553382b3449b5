"""Ranks that this process starts on its own machine, and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from xllm_lab.engine.rank_place import Place

LOST_STATUS = 3  # of a rank that ends because another one is gone


@dataclass(slots=True)
class Started:
    """A rank that this process started; what it says goes to a file, and is shown if it ends without a word."""

    rank: int
    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def ended(self, within_s: float) -> str | None:
        """How it ended, if by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(within_s)
            if status == LOST_STATUS:
                return None
            self.said.seek(0)
            lines = self.said.read().decode(errors="replace").strip().splitlines()
            how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
            return f"rank {self.rank} ended with {how}" + (f": {lines[-1]}" if lines else "")
        return None


def start(first: Place, rank: int) -> Started:
    """Another rank of the group that `first` is rank 0 of, with the device of that number."""
    place = Place(
        rank=rank, size=first.size, local_rank=rank, master_addr=first.master_addr, master_port=first.master_port
    )
    said = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
    process = subprocess.Popen(
        [sys.executable, "-m", "xllm_lab.engine.follow"],
        env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, **place.environment()},
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
    )
    return Started(rank, process, said)


def kill(started: Sequence[Started]) -> None:
    """None of them is left when this returns."""
    for one in started:
        one.process.kill()  # nothing, if it has ended
    for one in started:
        one.process.wait()
        one.said.close()
