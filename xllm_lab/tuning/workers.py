"""Processes that evaluate trials, and that never outlive their coordinator."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that are gone when the block ends, however it ends, and when this process is killed."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_die_with_the_coordinator)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _die_with_the_coordinator() -> None:
    """In a worker. Its queue would not tell: the worker itself holds the end that the coordinator writes to."""
    coordinator = multiprocessing.parent_process()
    assert coordinator is not None

    def watch() -> None:
        coordinator.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
