"""What an accelerator computes on beside the host, and captures with: `torch.cuda` and `torch.npu` alike.

A captured call whose host arguments change from step to step needs a *task group* around it, where the device has them:

    captured    wait for the group's event | clear the event | the call
    replayed    the graph, and beside it on another stream: the call with new arguments, put into the graph | the event

The first replay runs with the arguments that were captured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class TaskGroup:
    """One call in a graph, made anew for each replay."""

    def __init__(self, api: Any, stream: Any, updating: Any, call: Callable[[], None]) -> None:
        """Captures the call on a stream that is being captured; `updating` is another.

        The event is recorded before the capture waits for it: torch_npu 2.13.0 drops a wait for an event that was never
        recorded, though its documentation allows it (`NPUEvent::block` returns if there is no event yet).
        """
        self._api, self._call = api, call
        self._event = api.ExternalEvent()
        self._event.record(updating)
        self._event.wait(stream)
        self._event.reset(stream)
        api.graph_task_group_begin(stream)
        call()
        self._handle = api.graph_task_group_end(stream)

    def update(self, stream: Any) -> None:
        """Puts the call as it is now into the graph, whose replay waits for it; `stream` is not the graph's."""
        self._api.graph_task_update_begin(stream, self._handle)
        self._call()
        self._api.graph_task_update_end(stream)
        self._event.record(stream)


class Streams:
    """Streams, events and graphs of one device.

    Args:
        api: `torch.cuda` or `torch.npu`.
        new_graph: its class of graphs.

    Attributes:
        has_task_groups: whether host arguments of a captured call can be replaced.
        loads_lazily: whether a kernel's first launch compiles or loads it, which must not happen in a capture.
    """

    def __init__(self, api: Any, new_graph: Callable[[], Any], *, loads_lazily: bool = False) -> None:
        self._api, self._new_graph, self.loads_lazily = api, new_graph, loads_lazily
        self.has_task_groups = hasattr(api, "graph_task_group_begin")
        self._beside: Any = None
        self._sides: dict[str, Any] = {}

    def new(self, *others: Any) -> Any:
        """A stream, neither this thread's nor one of `others`: torch has 32, and hands them out again and again."""
        stream = self._api.Stream()
        while stream in (self.current(), self._beside, *self._sides.values(), *others):
            stream = self._api.Stream()
        return stream

    def beside(self) -> AbstractContextManager[object]:
        """Inside, this thread's stream is one beside all others, which begins behind what was launched here before.

        That is before the first time. The stream stays the same, so that torch gives the next run what one freed there.
        """
        if self._beside is None:
            stream = self.new()
            stream.wait_stream(self.current())
            self._beside = stream
        context: AbstractContextManager[object] = self._api.stream(self._beside)
        return context

    def side(self, name: str) -> Callable[[Callable[[], None]], None]:
        """What launches work on one more stream, of that name, from any thread, and waits for that work alone.

        What it reads must be done when it begins: it waits for no other stream.
        """
        if name not in self._sides:
            self._sides[name] = self.new()
        stream = self._sides[name]
        done = self._api.Event(blocking=True)  # the waiting thread leaves its core to others

        def run(work: Callable[[], None]) -> None:
            with self._api.stream(stream):
                work()
                done.record(stream)
            done.synchronize()

        return run

    def current(self) -> Any:
        """This thread's."""
        return self._api.current_stream()

    def use(self, stream: Any) -> None:
        """Make it this thread's."""
        self._api.set_stream(stream)

    def pool(self) -> Any:
        """Memory that graphs may share: what one allocates while captured, others may reuse."""
        return self._api.graph_pool_handle()

    def capture(self, pool: Any) -> Any:
        """A graph that records this thread's stream until its `capture_end`."""
        graph = self._new_graph()
        graph.capture_begin(pool=pool)
        return graph

    def group(self, updating: Any, call: Callable[[], None]) -> TaskGroup:
        """Capture a call whose host arguments change, to be updated on that stream."""
        return TaskGroup(self._api, self.current(), updating, call)

    def update(self, groups: tuple[TaskGroup, ...], stream: Any) -> None:
        """Make the calls of a graph anew, in its order, while it is replayed on another stream."""
        with self._api.stream(stream):
            for group in groups:
                group.update(stream)

    def limit_cores(self, stream: Any, *, cube_cores: int, vector_cores: int) -> bool:
        """Give a stream so many of the device's cores; False: the device does not share them out."""
        if not hasattr(self._api, "set_stream_limit"):
            return False
        self._api.set_stream_limit(stream, cube_cores, vector_cores)
        return True

    def cores(self, stream: Any) -> tuple[int, int]:
        """Cube and vector cores that a stream may use, on a device that shares them out."""
        limit = self._api.get_stream_limit(stream)
        return limit["cube_core_num"], limit["vector_core_num"]
