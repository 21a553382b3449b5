"""How a device captures: a recorder opens a tape, the model runs, and the closed tape is a program.

CPU: calls of our kernels are written down and replayed by one C call (`ops/tape.py`). Accelerators: the driver captures
what is launched. A call that reads the host's lists is put into the graph anew for each replay where the device can do
that; where it cannot, it splits the program, and is made between the pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from xllm_lab.engine.device import Device, Streams
from xllm_lab.engine.device.streams import TaskGroup
from xllm_lab.engine.ops import native
from xllm_lab.engine.ops.build import NotBuiltError
from xllm_lab.engine.ops.tape import Kernel, Program, Tape, updating

R = TypeVar("R")


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
    def close(self) -> Callable[[], object]:
        """What replays it."""
        ...


class Recorder(Protocol):
    """A device's way to capture.

    Attributes:
        rehearses: whether a step has to run before it is captured.
    """

    @property
    def rehearses(self) -> bool: ...
    def open(self, *, whole: bool) -> OpenTape:
        """`whole`: every row of the step belongs to a sequence, those that pad included."""
        ...


def recorder_for(device: Device) -> Recorder:
    """The device's own, or Python calls where it has none."""
    return CpuRecorder() if device.streams is None else StreamRecorder(device.streams)


class CpuRecorder:
    """Kernels of ours in one C call, everything else in Python."""

    rehearses = False

    def open(self, *, whole: bool) -> Program:
        try:
            return Program(native.load().replay)
        except NotBuiltError:
            return Program(None)


class StreamRecorder:
    """Graphs of an accelerator in one memory pool."""

    def __init__(self, streams: Streams) -> None:
        self._streams, self._pool = streams, streams.pool()
        self._capturing = streams.new()
        self._updating = streams.new(self._capturing)
        self.rehearses = streams.loads_lazily

    def open(self, *, whole: bool) -> StreamTape:
        return StreamTape(self._streams, self._pool, self._capturing, self._updating if whole else None)


class StreamTape:
    """One graph, or pieces of graph with Python calls between.

    A capture launches nothing, so the step is run by replaying it once it is closed. Kernels are counted by operator:
    the driver does not say.

    Args:
        updating: the stream on which calls are put into the graph anew; None: they split it.
    """

    def __init__(self, streams: Streams, pool: Any, capturing: Any, updating: Any | None) -> None:
        self._streams, self._pool, self._stream = streams, pool, capturing
        self._updating = updating if streams.has_task_groups else None
        self._pieces, self._groups = list[Callable[[], None]](), list[TaskGroup]()
        self._outside = streams.current()
        assert self._outside not in (capturing, updating), "a replay would wait for what stands behind it"
        self._stream.wait_stream(self._outside)
        self.num_kernels = 0
        self._graph = self._begin()

    @property
    def num_calls(self) -> int:
        return len(self._pieces) + len(self._groups)

    def kernel(self, kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        raise AssertionError("a kernel for CPUs on an accelerator")

    def call(self, call: Callable[[], R]) -> R:
        self.num_kernels += 1
        return call()

    def host_call(self, call: Callable[[], None]) -> None:
        if self._updating is not None:
            self._groups.append(self._streams.group(self._updating, call))
            self.num_kernels += 1
        else:
            self._end()
            self._pieces.append(call)
            self._graph = self._begin()

    def close(self) -> Callable[[], None]:
        self._end()
        self._outside.wait_stream(self._stream)
        streams, stream, pieces, groups = self._streams, self._updating, tuple(self._pieces), tuple(self._groups)

        def run() -> None:
            for piece in pieces:
                piece()

        def run_updated() -> None:
            run()
            with updating():
                streams.update(groups, stream)

        run()  # with the host's lists as they were captured
        return run_updated if groups else run

    def _begin(self) -> Any:
        self._streams.use(self._stream)
        return self._streams.capture(self._pool)

    def _end(self) -> None:
        self._graph.capture_end()
        self._streams.use(self._outside)
        self._pieces.append(self._graph.replay)
