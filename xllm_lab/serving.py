"""A run of one instance as a conversation: the loop says what to do next, the host does it and says what came of it.

    host                               serve()
    next()                      -->    delivers what has arrived, plans          --> Step        run this
    send(Completion(...))       -->    completes it, delivers, plans             --> Step
    send(Completion(...))       -->    nothing to run, more to come              --> Idle        wait till then
    send(Woke(now_us))          -->    ...                                       --> StopIteration: all served

The engine answers with measured times and real tokens, the simulator with predicted times and placeholders; what is
delivered and decided, and in which order, is written once, here.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from xllm_lab.errors import PolicyError
from xllm_lab.policies.catalog import policy_name
from xllm_lab.scheduler import Sampled, Scheduler, Step
from xllm_lab.workload import Request, RequestId, TokenIds, Workload


class Idle(NamedTuple):
    """Nothing can run before `until_us`."""

    until_us: int


class Woke(NamedTuple):
    """The answer to `Idle`: the time at which the host woke, at or after `until_us`."""

    now_us: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to `Step`."""

    end_us: int
    sampled: Mapping[RequestId, Sampled]


Conversation = Generator[Step | Idle, Completion | Woke, None]

# At equal times a request arrives before its client can go away.
_ARRIVES, _CANCELS = 0, 1


class Feed:
    """What happens to the instance, in order of (time, arrival before cancellation, id)."""

    def __init__(self, workload: Workload) -> None:
        self._events: list[tuple[int, int, RequestId, Request]] = []
        self._ended: set[RequestId] = set()
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
        """Time of the next event; None if nothing more is known to happen."""
        return self._events[0][0] if self._events else None

    def pop_due(self, now_us: int) -> tuple[bool, Request] | None:
        """The next event at or before `now_us`: (whether it is an arrival, the request)."""
        if not self._events or self._events[0][0] > now_us:
            return None
        _, kind, _, request = heapq.heappop(self._events)
        self._forget_the_ended()
        return kind == _ARRIVES, request

    def on_end(self, request: RequestId, now_us: int) -> None:
        """A request ended; in a closed loop its client thinks and sends the next one."""
        self._ended.add(request)
        self._forget_the_ended()
        if self._loop is not None:
            self._send_next(now_us + self._loop.think_us)

    def _forget_the_ended(self) -> None:
        # Or an engine would wait, with nothing left to do, for a client that it has served to go away.
        while self._events and self._events[0][1] == _CANCELS and self._events[0][2] in self._ended:
            heapq.heappop(self._events)

    def _send_next(self, now_us: int) -> None:
        if self._backlog:
            self._push(self._backlog.pop().at(now_us))

    def _push(self, request: Request) -> None:
        heapq.heappush(self._events, (request.arrival_us, _ARRIVES, request.id, request))
        if request.cancel_us is not None:
            heapq.heappush(self._events, (request.cancel_us, _CANCELS, request.id, request))


def serve(
    scheduler: Scheduler, workload: Workload, prompt_ids: Callable[[Request], TokenIds], *, start_us: int = 0
) -> Conversation:
    """Serve a workload to its end.

    Args:
        prompt_ids: a request's prompt tokens, shape [prompt tokens]; called once, when it arrives.

    Raises:
        PolicyError: the policy leaves requests waiting for ever, or planned something illegal.
    """
    feed = Feed(workload)
    now_us = start_us
    while True:
        _deliver(feed, scheduler, prompt_ids, now_us)
        step = scheduler.plan(now_us)
        if step is not None:
            done = yield step
            assert isinstance(done, Completion), f"a step is answered by a Completion, not by {done}"
            now_us = done.end_us
            for request_id in scheduler.complete(step, now_us, done.sampled):
                feed.on_end(request_id, now_us)
        elif feed.next_us is not None:
            woke = yield Idle(feed.next_us)
            assert isinstance(woke, Woke), f"idling is answered by a Woke, not by {woke}"
            now_us = woke.now_us
        elif scheduler.num_live:
            name = policy_name(scheduler.policy)
            raise PolicyError(f"policy {name} leaves {scheduler.num_live} requests waiting for ever at {now_us} us")
        else:
            return


def _deliver(feed: Feed, scheduler: Scheduler, prompt_ids: Callable[[Request], TokenIds], now_us: int) -> None:
    while (event := feed.pop_due(now_us)) is not None:
        arrives, request = event
        if arrives:
            scheduler.add(request, prompt_ids(request), now_us)
            ended = not scheduler.is_live(request.id)
        else:
            ended = scheduler.cancel(request.id, now_us)
        if ended:
            feed.on_end(request.id, now_us)
