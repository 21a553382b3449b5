"""How an engine process keeps step with its fleet: the feed, the seat and the voice of one serving.

lockstep    serves up to `now_us`, says so, and goes on when the router answers with all that came until then;
            what is said and waited for takes no time
real time   says what it did after each step, and looks at what came; nobody waits
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Any

from xllm_lab.decisions import ARRIVES, LEAVES, PREFILLS
from xllm_lab.engine.clock import Clock, VirtualClock, WallClock
from xllm_lab.engine.cluster.messages import IndexTeller, Reporter, event_from, load_cells
from xllm_lab.engine.company import Company
from xllm_lab.engine.copies import EngineCopies
from xllm_lab.records import RequestRecord
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import Event
from xllm_lab.step import Step
from xllm_lab.wire import Channel
from xllm_lab.workload import Request, RequestId, TokenIds, prompt_token_ids

_COPIES_S = 0.001  # between looks at copies, of an engine that has nothing else to do


class Pace(ABC):
    """A `Feed` and a `Seat` at the end of a channel to the router.

    Args:
        tells_index: whether the router asks for cached prefixes.

    Attributes:
        reporter: the scheduler's recorder.
        is_over: whether the router has nothing more, nor anybody who shares experts with this engine.
        company: those, if there are such.
    """

    def __init__(self, channel: Channel, *, vocab_size: int, seed: int, tells_index: bool) -> None:
        self.reporter = Reporter()
        self.company = Company()
        self._is_over = False
        self.start_us = 0
        self.scheduler: Scheduler  # which needs the reporter first
        self._channel = channel
        self._vocab_size, self._seed = vocab_size, seed
        self._index = IndexTeller() if tells_index else None
        self._events: deque[tuple[int, Event]] = deque()  # with when they were sent
        self._requests: dict[RequestId, Request] = {}
        self._prompts: dict[RequestId, TokenIds] = {}
        self._took: list[tuple[int, str, RequestId]] = []

    @abstractmethod
    def open_clock(self) -> Clock: ...
    @abstractmethod
    def planned(self, step: Step) -> None: ...
    @abstractmethod
    def rest(self, copies: EngineCopies | None = None) -> int: ...
    @abstractmethod
    def _look(self, now_us: int) -> None:
        """Have the events up to a time."""

    @property
    def is_over(self) -> bool:
        return self._is_over and not self.company.is_needed

    @property
    def next_us(self) -> int | None:
        return None

    def pop_due(self, now_us: int) -> Event | None:
        self._look(now_us)
        # A step ended some time before anybody looks: what was sent since belongs to the next look.
        if not self._events or self._events[0][0] > now_us:
            return None
        _, event = self._events.popleft()
        kind = LEAVES if not event.arrives else PREFILLS if event.hands_over else ARRIVES
        self._took.append((now_us, kind, event.request.id))
        if event.arrives:
            assert event.record is not None, "the router has one of each"
            self.reporter.begins(event.record)
        return event

    def on_end(self, request: RequestId, now_us: int) -> None:
        self._requests.pop(request, None)

    def on_handover(self, request: Request, record: RequestRecord, now_us: int) -> None:
        self._requests.pop(request.id, None)
        self.reporter.hands_over(record, now_us)

    def prompt_ids(self, request: Request) -> TokenIds:
        """Its prompt, shape [prompt tokens], made when the request was heard of."""
        return self._prompts.pop(request.id)

    def _hear(self, message: Mapping[str, Any]) -> None:
        for cells in message.get("events", ()):
            if "leaves" in cells and cells["leaves"] not in self._requests:
                continue  # it ended before its client went away
            event = event_from(cells, self._requests)
            if event.arrives:
                request = event.request
                self._requests[request.id] = request
                self._prompts[request.id] = prompt_token_ids(request, vocab_size=self._vocab_size, seed=self._seed)
            self._events.append((message["us"], event))
        self._is_over = self._is_over or bool(message.get("over"))
        self.company.num_calls = max(self.company.num_calls, message.get("calls", 0))

    def _done(self) -> dict[str, Any]:
        """What was done since it was said last."""
        said = self.reporter.take(self.scheduler)
        if self._took:
            said["took"] = self._took
            self._took = []
        return said

    def _load(self, as_of_us: int) -> dict[str, Any]:
        index = {} if self._index is None else self._index.take(self.scheduler)
        return {"load": load_cells(self.scheduler, as_of_us), **index}


class LockstepPace(Pace):
    """Virtual time, which the router has, too.

    What the engine tells of its load is as it was when its step was planned: so it stays until the step is over.
    """

    def __init__(self, channel: Channel, *, start_us: int, timer: str, **others: Any) -> None:
        super().__init__(channel, **others)
        self.start_us = start_us
        self._timer = timer
        self._known_until_us = start_us - 1
        self._seen: dict[str, Any] = {}

    def open_clock(self) -> Clock:
        self._clock = VirtualClock(self._timer)
        self._clock.wait_until(self.start_us)
        return self._clock

    def planned(self, step: Step) -> None:
        with self._clock.standing_still():
            self._see(step.start_us)

    def rest(self, copies: EngineCopies | None = None) -> int:
        until_us = None if copies is None else copies.next_us
        with self._clock.standing_still():
            self._see(self._known_until_us)
            answer = self._ask({"rests": True, "us": self._known_until_us, "until_us": until_us})
        return int(answer["us"])

    def _look(self, now_us: int) -> None:
        if now_us > self._known_until_us and not self.is_over:
            with self._clock.standing_still():
                self._ask({"us": now_us})
                self._known_until_us = now_us

    def _ask(self, message: dict[str, Any]) -> Mapping[str, Any]:
        self._channel.tell({**message, **self._done(), **self._seen})
        self._seen = {}
        answer = self._channel.hear()
        assert answer is not None, "it waits for ever"
        self._hear(answer)
        return answer

    def _see(self, now_us: int) -> None:
        assert not self._seen, "two plans between two reports"
        self._seen = self._load(now_us)


class WallPace(Pace):
    """Real time, by the clock that all processes of the machine share.

    Args:
        heartbeat_us: how often it tells its load, between two steps; 0 is after each.
    """

    def __init__(self, channel: Channel, *, heartbeat_us: int, **others: Any) -> None:
        super().__init__(channel, **others)
        self._heartbeat_us = heartbeat_us
        self._looked_us = self._next_beat_us = -1

    def open_clock(self) -> Clock:
        self._channel.tell({"warm": True})
        answer = self._channel.hear()
        assert answer is not None, "it waits for ever"
        self._clock = WallClock(int(answer["start_ns"]))
        self.start_us = max(0, self._clock.now_us())
        return self._clock

    def planned(self, step: Step) -> None:
        """Nobody waits for it."""

    def rest(self, copies: EngineCopies | None = None) -> int:
        while not self._events and not self.is_over and not (copies is not None and copies.is_any_over):
            if self.company.is_needed:
                break
            now_us = self._clock.now_us()
            self._tell(now_us)
            left_s = math.inf if not self._heartbeat_us else max(0.0, (self._next_beat_us - now_us) / 1e6)
            if copies is not None and copies.is_copying:
                left_s = min(left_s, _COPIES_S)
            message = self._channel.hear(None if math.isinf(left_s) else left_s)
            if message is not None:
                self._hear(message)
        # Strictly after it was looked last: events of one look have one time.
        while (now_us := self._clock.now_us()) <= self._looked_us:
            pass
        return now_us

    def _look(self, now_us: int) -> None:
        if now_us <= self._looked_us:
            return
        self._looked_us = now_us
        self._tell(now_us)
        for message in self._channel.heard():
            self._hear(message)

    def _tell(self, now_us: int) -> None:
        """What was done, if anything was; and the load, if it is time."""
        said = self._done()
        beats = now_us >= self._next_beat_us and (self._heartbeat_us or said)
        if beats:
            said |= self._load(now_us)
            self._next_beat_us = now_us + self._heartbeat_us
        if said:
            self._channel.tell({"us": now_us, **said})
