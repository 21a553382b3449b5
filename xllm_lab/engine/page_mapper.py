"""Maps pages for the steps of a run: what a step needs before it starts, the rest on a thread beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from xllm_lab.engine.device import Device
from xllm_lab.engine.virtual_kv_pool import VirtualKvPool
from xllm_lab.step import PageRun, Step


class PageMapper:
    """Does what the scheduler says of pages. Close it, or use it with `with`.

    Times are wall times: what happens beside a step is no processor's time that anybody waits for.

    Attributes:
        table: the block table of the sequence in a slot.
    """

    def __init__(self, pool: VirtualKvPool, device: Device) -> None:
        self._pool = pool
        self.table = pool.table
        self._thread = ThreadPoolExecutor(1, "pages", device.like_this_thread())
        self._beside: tuple[Step, Future[int]] | None = None

    def prepare(self, step: Step) -> None:
        """What a step needs is mapped when this returns; the rest begins."""
        # Also where this step maps nothing: it may enter a page that is being mapped ahead.
        self._wait()
        moves = step.pages
        if moves is None:
            return
        for run in moves.maps:
            self._pool.map(run)
        if moves.ahead or moves.unmaps:
            self._beside = step, self._thread.submit(self._do, moves.ahead, moves.unmaps)

    def finish(self, step: Step) -> None:
        """The step is over, and says how long took what was beside it, once that is."""
        if self._beside is not None and self._beside[0] is step:
            self._wait()

    def _wait(self) -> None:
        if self._beside is not None:
            step, done = self._beside
            step.beside_us, self._beside = done.result(), None

    def __enter__(self) -> PageMapper:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def _do(self, ahead: Sequence[PageRun], unmaps: Sequence[PageRun]) -> int:
        started_ns = time.perf_counter_ns()
        for run in ahead:
            self._pool.map(run)
        for run in unmaps:
            self._pool.unmap(run)
        return (time.perf_counter_ns() - started_ns) // 1000
