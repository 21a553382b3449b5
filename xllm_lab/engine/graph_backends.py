"""How a device captures: a recorder opens a tape, the model runs, and the closed tape is a program.

CPU: calls of our kernels are written down and replayed by one C call (`ops/tape.py`). CUDA: the driver captures what is
launched. Either way a call that a device cannot capture splits the program, and is made anew in each replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from xllm_lab.engine.device import Device
from xllm_lab.engine.ops import native, reference
from xllm_lab.engine.ops.build import NotBuiltError
from xllm_lab.engine.ops.tape import Kernel, Program, Tape

# Walks through the sequences of a step in Python.
_NOT_CAPTURED = frozenset({reference.paged_attention})


class OpenTape(Tape, Protocol):
    """A tape whose calls were run, too, by the time it is closed.

    Attributes:
        num_kernels: kernels that are replayed.
        num_calls: calls from Python that a replay takes.
    """

    @property
    def num_kernels(self) -> int: ...
    @property
    def num_calls(self) -> int: ...
    def close(self) -> Callable[[], None]:
        """What replays it."""
        ...


class Recorder(Protocol):
    """A device's way to capture."""

    def open(self) -> OpenTape: ...


def recorder_for(device: Device) -> Recorder:
    """The device's own, or Python calls where it has none."""
    return CudaRecorder() if device.torch_device.type == "cuda" else CpuRecorder()


class CpuRecorder:
    """Kernels of ours in one C call, everything else in Python."""

    def open(self) -> Program:
        try:
            return Program(native.load().replay)
        except NotBuiltError:
            return Program(None)


class CudaRecorder:
    """CUDA graphs in one memory pool, so that what one allocates while captured, others may reuse."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def open(self) -> CudaTape:
        return CudaTape(self._pool)


class CudaTape:
    """Pieces of CUDA graph with Python calls between.

    A capture launches nothing, so the step is run by replaying it once it is closed. Kernels are counted by operator:
    the driver does not say.
    """

    def __init__(self, pool: Any) -> None:
        self._pool, self._pieces = pool, list[Callable[[], None]]()
        self._outside = torch.cuda.current_stream()
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(self._outside)
        self.num_kernels = 0
        self._graph = self._begin()

    @property
    def num_calls(self) -> int:
        return len(self._pieces)

    def kernel(self, kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        raise AssertionError("a kernel for CPUs on a CUDA device")

    def call(self, call: Callable[[], None]) -> None:
        if getattr(call, "func", None) in _NOT_CAPTURED:
            self._end()
            self._pieces.append(call)
            self._graph = self._begin()
        else:
            call()
            self.num_kernels += 1

    def close(self) -> Callable[[], None]:
        self._end()
        self._outside.wait_stream(self._stream)
        pieces = tuple(self._pieces)

        def replay() -> None:
            for piece in pieces:
                piece()

        replay()
        return replay

    def _begin(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_stream(self._stream)
        graph.capture_begin(pool=self._pool)
        return graph

    def _end(self) -> None:
        self._graph.capture_end()
        torch.cuda.set_stream(self._outside)
        self._pieces.append(self._graph.replay)
