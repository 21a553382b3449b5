"""Several instances behind a router, in simulated time: SimPy's calendar, and a seat for each simulated instance.

What happens to a fleet, and in which order, is `dispatch`; what its router knows and decides is `router`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import simpy

from xllm_lab.copy_time import CopyTime
from xllm_lab.dispatch import Dispatch, Lost
from xllm_lab.draft_time import DraftTime
from xllm_lab.errors import PolicyError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Recorder, RequestRecord, RoleChange
from xllm_lab.router import Load, OnDecision
from xllm_lab.scheduler import Scheduler
from xllm_lab.scheduler_of import scheduler_of
from xllm_lab.serving import Conversation, Event, serve
from xllm_lab.sim.collector import seldom_collecting
from xllm_lab.sim.copies import SimulatedCopies
from xllm_lab.sim.group import Group, GroupTiming, Member, refuse_group
from xllm_lab.sim.instance import Instance, Timing, at
from xllm_lab.sim.links import Transfer
from xllm_lab.step_shape import shapes_of
from xllm_lab.step_time import StepTime
from xllm_lab.workload import Request, RequestId, Workload


class Inbox:
    """What the router sent to one instance: a `Feed` whose next event nobody knows."""

    def __init__(self, dispatch: Dispatch) -> None:
        self.events: deque[Event] = deque()
        self._dispatch = dispatch

    @property
    def next_us(self) -> int | None:
        return None

    @property
    def is_over(self) -> bool:
        """Whether no instance has anything to do; nor need it look at copies that its policy goes on asking for."""
        return not self._dispatch.num_open

    @property
    def num_arrivals(self) -> int:
        """Requests that have arrived and were not looked at yet."""
        return sum(event.arrives for event in self.events)

    def pop_due(self, now_us: int) -> Event | None:
        return self.events.popleft() if self.events else None

    def on_end(self, request: RequestId, now_us: int) -> None:
        self._dispatch.on_end(request, now_us)

    def on_handover(self, request: Request, record: RequestRecord, now_us: int) -> None:
        self._dispatch.on_handover(request, record, now_us)


class SimulatedCalendar:
    """A `Calendar` of SimPy's events."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env

    @property
    def now_us(self) -> int:
        return int(self._env.now)

    @property
    def has_more(self) -> bool:
        return self._env.peek() < math.inf

    def call(self, when_us: int, priority: int, action: Callable[[], None]) -> None:
        event = at(self._env, when_us, priority)
        assert event.callbacks is not None, "an event that is new"
        event.callbacks.append(lambda _: action())


class SimulatedSeat:
    """A `Seat`: an instance's scheduler, and while it is up, its process and what it has not looked at."""

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: Scheduler,
        timing: Timing,
        dispatch: Dispatch,
        *,
        copies: SimulatedCopies,
        group: Group | None = None,
    ) -> None:
        scheduler.is_index_watched = dispatch.router.needs_index
        self.scheduler = scheduler
        self.inbox = Inbox(dispatch)
        self.instance: Instance | Member | None = None
        self._env, self._timing, self._dispatch, self._copies = env, timing, dispatch, copies
        self._group = group

    @property
    def is_up(self) -> bool:
        return self.instance is not None

    @property
    def is_at_rest(self) -> bool:
        return self.instance is not None and self.instance.stretch is None

    def begin(self) -> None:
        if self._group is not None:
            self.instance = self._group.join(self._conversation())
            return
        self.instance = Instance(
            *(self._env, self._conversation(), self._timing, self.inbox),
            copies=self._copies,
            index=self.scheduler.instance,
        )

    def fail(self) -> Lost:
        assert self.instance is not None, "an instance fails that is down"
        # What came during the step under way was never looked at.
        events = list(self.inbox.events)
        self.inbox.events.clear()
        self.instance.stop()
        self.instance = None
        lost = [(state.request, state.record) for state in self.scheduler.fail()]
        lost += [(e.request, e.record) for e in events if e.arrives and e.record is not None]
        return lost

    def put(self, event: Event) -> None:
        assert self.instance is not None, "something arrives at an instance that is down"
        self.inbox.events.append(event)
        self.instance.notice()

    def load(self) -> Load:
        scheduler = self.scheduler
        num_over = 0 if self.instance is None else self.instance.num_steps_over()
        return Load(
            as_of_us=int(self._env.now),
            num_running=scheduler.num_live - scheduler.num_waiting,
            num_waiting=scheduler.num_waiting + self.inbox.num_arrivals,
            num_outstanding_tokens=scheduler.num_outstanding_tokens_after(num_over),
            kv_used_frac=scheduler.num_used_blocks_after(num_over) / scheduler.config.num_kv_blocks,
            cached_keys=scheduler.ledger.keys() if self._dispatch.router.needs_index else None,
        )

    def _conversation(self) -> Conversation:
        return serve(self.scheduler, self.inbox, self._dispatch.prompt_ids, start_us=int(self._env.now))


class Fleet:
    """`run` serves the workload to its end.

    Args:
        group: instances step together in groups of so many; None: each by itself.

    Attributes:
        shapes: the shapes policy at work, which counts for all instances; None if every step is eager.
    """

    def __init__(
        self,
        workload: Workload,
        config: FleetConfig,
        instance: InstanceConfig,
        policies: Policies,
        timing: Timing,
        *,
        recorder: Recorder,
        vocab_size: int,
        step_time: StepTime | None = None,
        draft_time: DraftTime | None = None,
        copy_time: CopyTime | None = None,
        on_transfer: Callable[[Transfer], None] | None = None,
        on_role: Callable[[RoleChange], None] | None = None,
        on_decision: OnDecision | None = None,
        group: GroupTiming | None = None,
    ) -> None:
        if group is not None:
            refuse_group(group.size, config, policies, instance)
        self.shapes = shapes_of(policies.shapes, instance)
        self._env = simpy.Environment(initial_time=0)
        self._dispatch = Dispatch(
            workload,
            config,
            instance,
            SimulatedCalendar(self._env),
            recorder=recorder,
            vocab_size=vocab_size,
            on_transfer=on_transfer,
            on_role=on_role,
            on_decision=on_decision,
        )
        self._seats: list[SimulatedSeat] = []
        groups: list[Group] = []
        for k in range(config.num_instances):
            copies = SimulatedCopies(self._env, timing.links(instance.block_size), has_store=timing.has_store)
            scheduler = scheduler_of(
                *(instance, policies, recorder),
                proposer=timing.proposer,
                copier=copies,
                mover=timing.mover(),
                step_time=step_time,
                draft_time=draft_time,
                copy_time=copy_time,
                shapes=self.shapes,
                instance=k,
            )
            if group is not None:
                scheduler.shapes = None  # all of a group run in one
                if k % group.size == 0:
                    groups.append(Group(self._env, timing, group, instance, shapes=self.shapes, first=k))
            seat_group = groups[-1] if groups else None
            self._seats.append(
                SimulatedSeat(self._env, scheduler, timing, self._dispatch, copies=copies, group=seat_group)
            )

    @property
    def now_us(self) -> int:
        return int(self._env.now)

    def low_water_us(self) -> int:
        """No step will be recorded that ended at or before this."""
        return min((s.instance.started_us for s in self._seats if s.instance is not None), default=self.now_us)

    def run(self) -> None:
        """Serve.

        Raises:
            PolicyError: a policy planned something illegal, or starves a request.
        """
        self._dispatch.begin(self._seats)
        with seldom_collecting():
            self._env.run()
        for seat in self._seats:
            if seat.scheduler.experts is not None:
                seat.scheduler.experts.finish()
        starved = sum(s.scheduler.num_live for s in self._seats)
        if starved:
            name = policy_name(self._seats[0].scheduler.policy)
            raise PolicyError(f"policy {name} leaves {starved} requests waiting for ever at {self.now_us} us")
