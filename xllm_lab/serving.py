"""A run of one instance as a conversation: the loop says what to do next, the host does it and says what came of it.

    host                               serve()
    next()                      -->    delivers what has arrived, plans          --> Step        its end, please
    send(Completion(...))       -->    completes it, delivers, plans             --> Step
    send(Completion(...))       -->    nothing to run, more to come              --> Idle        wait till then
    send(Woke(now_us))          -->    ...                                       --> StopIteration: all served

The engine answers with measured times and real tokens, the simulator with predicted times and placeholders; what is
delivered and decided, and in which order, is written once, here.

With async scheduling, step k+1 is planned when step k starts, so that the host's work hides behind the device's. It
cannot know yet what step k brings:

    device     |--- k ---|-- k+1 --|-- k+2 --|          an arrival during k is in the plan of k+2;
    plans     k, k+1    k+2       k+3                   who ends with k has a row in k+1, which is wasted
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple, Protocol

from xllm_lab.copies import NO_COPIES, CopyEnd
from xllm_lab.errors import PolicyError
from xllm_lab.policies.catalog import policy_name
from xllm_lab.records import RequestRecord
from xllm_lab.scheduler import Sampled, Scheduler
from xllm_lab.step import Step, Work
from xllm_lab.workload import Request, RequestId, TokenIds, Workload


class Idle(NamedTuple):
    """Nothing can run before `until_us`, or the end of a copy; None is until something comes."""

    until_us: int | None


class Woke(NamedTuple):
    """The answer to `Idle`: the time at which the host woke, at or after `until_us` or the end of a copy.

    Attributes:
        copied: copies that were over by then, and after the answer before.
    """

    now_us: int
    copied: Sequence[CopyEnd] = NO_COPIES


class Completion:
    """The answer to `Step`.

    Attributes:
        ends_us: the step's end, and those of up to `Step.num_repeats` repetitions that the host ran as well.
        sampled: a token for each chunk that `samples`; None for placeholders, none of which ends a request.
        work: what it was for host and device, if that was measured; of one step without repetitions.
        copied: copies that were over by the last end, and after the answer before.
    """

    __slots__ = ("copied", "ends_us", "sampled", "work")

    def __init__(
        self,
        ends_us: Sequence[int],
        sampled: Mapping[RequestId, Sampled] | None,
        work: Work | None = None,
        copied: Sequence[CopyEnd] = NO_COPIES,
    ) -> None:
        self.ends_us = ends_us
        self.sampled = sampled
        self.work = work
        self.copied = copied


Conversation = Generator[Step | Idle, Completion | Woke, None]

# At equal times a request arrives before its client can go away.
_ARRIVES, _CANCELS = 0, 1


class Event(NamedTuple):
    """A request arrives, or else its client goes away.

    Attributes:
        record: of one that comes from a router, which has it already.
        hands_over: it leaves with its first token, to go on elsewhere.
    """

    arrives: bool
    request: Request
    record: RequestRecord | None = None
    hands_over: bool = False


class Feed(Protocol):
    """What happens to one instance, as far as is known."""

    @property
    def next_us(self) -> int | None:
        """Time of the next event; None if no more is known to happen."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether nothing will ever happen again."""
        ...

    def pop_due(self, now_us: int) -> Event | None:
        """The next event at or before `now_us`."""
        ...

    def on_end(self, request: RequestId, now_us: int) -> None:
        """A request ended."""
        ...

    def on_handover(self, request: Request, record: RequestRecord, now_us: int) -> None:
        """A request left with its first token, to go on elsewhere."""
        ...


class WorkloadFeed:
    """A workload for one instance, in order of (time, arrival before cancellation, id)."""

    def __init__(self, workload: Workload) -> None:
        self._events: list[tuple[int, int, RequestId, Request]] = []
        # Those that have not ended and whose client goes away some time. Who ended is not remembered: that would grow.
        self._may_leave: set[RequestId] = set()
        self._loop = workload.closed_loop
        if self._loop is None:
            self._backlog: list[Request] = []
            for request in workload.requests:
                self._push(request)
        else:
            self._backlog = sorted(workload.requests, key=lambda r: r.id, reverse=True)
            for _ in range(self._loop.num_clients):
                self._send_next(0)

    @property
    def next_us(self) -> int | None:
        return self._events[0][0] if self._events else None

    @property
    def is_over(self) -> bool:
        return not self._events

    def pop_due(self, now_us: int) -> Event | None:
        if not self._events or self._events[0][0] > now_us:
            return None
        _, kind, _, request = heapq.heappop(self._events)
        self._forget_the_ended()
        return Event(kind == _ARRIVES, request)

    def on_end(self, request: RequestId, now_us: int) -> None:
        """A request ended; in a closed loop its client thinks and sends the next one."""
        self._may_leave.discard(request)
        self._forget_the_ended()
        if self._loop is not None:
            self._send_next(now_us + self._loop.think_us)

    def on_handover(self, request: Request, record: RequestRecord, now_us: int) -> None:
        raise AssertionError(f"request {request.id} is handed over, and there is nobody else")

    def _forget_the_ended(self) -> None:
        # Or an engine would wait, with nothing left to do, for a client that it has served to go away.
        while self._events and self._events[0][1] == _CANCELS and self._events[0][2] not in self._may_leave:
            heapq.heappop(self._events)

    def _send_next(self, now_us: int) -> None:
        if self._backlog:
            self._push(self._backlog.pop().at(now_us))

    def _push(self, request: Request) -> None:
        heapq.heappush(self._events, (request.arrival_us, _ARRIVES, request.id, request))
        if request.cancel_us is not None:
            self._may_leave.add(request.id)
            heapq.heappush(self._events, (request.cancel_us, _CANCELS, request.id, request))


def _nothing(step: Step) -> None:
    """What a host does that waits for a step before it runs it."""


def serve(
    scheduler: Scheduler,
    feed: Feed,
    prompt_ids: Callable[[Request], TokenIds],
    *,
    launch: Callable[[Step], None] = _nothing,
    start_us: int = 0,
) -> Conversation:
    """Serve what a feed brings, to its end.

    Args:
        prompt_ids: a request's prompt tokens, shape [prompt tokens]; called once, when it arrives.
        launch: called with every step as soon as it is planned, when block tables and known tokens are what the step
            needs; planned ahead, the step before it is still running. Steps start and end in this order.

    Raises:
        PolicyError: the policy leaves requests waiting for ever, or planned something illegal.
    """
    plans_ahead = scheduler.config.async_scheduling != "off"
    now_us = start_us
    ahead: Step | None = None
    while True:
        _deliver(feed, scheduler, prompt_ids, now_us)
        step = _planned(scheduler, now_us, launch) if ahead is None else ahead
        if step is not None:
            scheduler.start(step, now_us)
            ahead = _planned(scheduler, now_us, launch) if plans_ahead else None
            if ahead is not None or not plans_ahead:
                step.num_repeats = scheduler.num_repeats(step, ahead)
            done = yield step
            assert isinstance(done, Completion), f"a step is answered by a Completion, not by {done}"
            now_us = done.ends_us[-1]
            step.work = done.work
            for request_id in scheduler.complete(step, done.ends_us, done.sampled, ahead):
                feed.on_end(request_id, now_us)
            scheduler.copied(done.copied)
            _hand_over(scheduler, feed, now_us)
        elif feed.is_over and not (scheduler.num_live and scheduler.is_copying):
            if scheduler.num_live:
                name = policy_name(scheduler.policy)
                raise PolicyError(f"policy {name} leaves {scheduler.num_live} requests waiting for ever at {now_us} us")
            return
        else:
            woke = yield Idle(feed.next_us)
            assert isinstance(woke, Woke), f"idling is answered by a Woke, not by {woke}"
            now_us = woke.now_us
            scheduler.copied(woke.copied)
            _hand_over(scheduler, feed, now_us)


def _hand_over(scheduler: Scheduler, feed: Feed, now_us: int) -> None:
    for state in scheduler.handed_over():
        feed.on_handover(state.request, state.record, now_us)


def _planned(scheduler: Scheduler, now_us: int, launch: Callable[[Step], None]) -> Step | None:
    step = scheduler.plan(now_us)
    if step is not None:
        launch(step)
    return step


def _deliver(feed: Feed, scheduler: Scheduler, prompt_ids: Callable[[Request], TokenIds], now_us: int) -> None:
    while (event := feed.pop_due(now_us)) is not None:
        arrives, request, record, hands_over = event
        if arrives:
            scheduler.add(request, prompt_ids(request), now_us, record=record, hands_over=hands_over)
            ended = not scheduler.is_live(request.id)
        else:
            ended = scheduler.cancel(request.id, now_us)
        if ended:
            feed.on_end(request.id, now_us)
