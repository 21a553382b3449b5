"""Executors: who evaluates. Each gets plain data and gives plain data, and may die without anybody losing a trial."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from xllm_lab.errors import ConfigError

Job = dict[str, Any]
Report = dict[str, Any]
Function = Callable[[Job], Report]
EXECUTORS = ("processes", "ray")
# A job that takes its worker along so often, alone, is to blame; once may be somebody's `kill`.
MOST_DEATHS = 3
DIED = "WorkerDied"


class Executor(Protocol):
    def run(self, function: Function, jobs: Sequence[Job]) -> list[Report]:
        """Reports in the order of jobs, which are evaluated side by side.

        A job whose worker dies is run again, and is `died` in the end if it always does.
        """
        ...


def died() -> Report:
    """Of a job that nobody survives: a violation with a category, and never kept for other studies."""
    reason = f"its worker was killed {MOST_DEATHS} times; out of memory, most likely"
    return {"failure": {"category": DIED, "reason": reason}, "summary": None, "extrapolated_frac": 0.0}


@contextmanager
def executor(name: str, num_workers: int) -> Iterator[Executor]:
    """Workers that are gone when the block ends, however it ends, and when this process is killed.

    Raises:
        ConfigError: an unknown executor, or one whose library is not installed.
    """
    if name not in EXECUTORS:
        raise ConfigError(f"executor is {name!r}, accepted: {', '.join(EXECUTORS)}")
    if name == "ray":
        from xllm_lab.tuning.ray_workers import ray_workers

        with ray_workers(num_workers) as opened:
            yield opened
        return
    pool = Processes(num_workers)
    try:
        yield pool
    finally:
        pool.close()


class Processes:
    """Worker processes of this machine; whoever dies is replaced.

    Args:
        start: how they begin; "fork" only where this process has no other thread.
    """

    def __init__(self, num_workers: int, *, start: str = "spawn") -> None:
        self._num_workers, self._start = num_workers, start
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Function, jobs: Sequence[Job]) -> list[Report]:
        found = self._side_by_side(function, jobs)
        return [
            self._alone(function, one) if report is None else report for one, report in zip(jobs, found, strict=True)
        ]

    def close(self, *, wait: bool = False) -> None:
        """They end with what they are at."""
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)
            self._pool = None

    def _side_by_side(self, function: Function, jobs: Sequence[Job]) -> list[Report | None]:
        """None where a worker died; nobody can tell whose job it had."""
        found: list[Report | None] = []
        try:
            futures = [self._opened().submit(_in_worker, function, one) for one in jobs]
        except BrokenProcessPool:
            self.close()
            return [None] * len(jobs)
        for future in futures:
            try:
                found.append(future.result())
            except BrokenProcessPool:
                found.append(None)
        if None in found:
            self.close()
        return found

    def _alone(self, function: Function, one: Job) -> Report:
        for _ in range(MOST_DEATHS):
            (report,) = self._side_by_side(function, [one])
            if report is not None:
                return report
        return died()

    def _opened(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context(self._start)
            self._pool = ProcessPoolExecutor(
                self._num_workers, mp_context=context, initializer=_die_with_the_coordinator
            )
        return self._pool


def _in_worker(function: Function, one: Job) -> Report:
    # A ctrl-C is the coordinator's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return function(one)


def _die_with_the_coordinator() -> None:
    """In a worker. Its queue would not tell: the worker itself holds the end that the coordinator writes to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    coordinator = multiprocessing.parent_process()
    assert coordinator is not None

    def watch() -> None:
        coordinator.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
