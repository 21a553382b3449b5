"""A data-parallel group in simulated time: instances that share their experts, and so step together.

    seat 0   |--- 1 ---|--- 2 ---|--- 3 ---|         each with a scheduler, a KV ledger and requests of its own
    seat 1   |--- 1 ---|  nothing|--- 3 ---|         who has nothing to do computes an empty batch
                   ^ an arrival at seat 1: it is in the next step that is planned, of which all wait for the slowest

The exchange before and after the experts is one of all devices, so vLLM runs such a group in lockstep, and who has no
request takes part with a dummy batch (`DPEngineCoreProc.run_busy_loop` of 0.19). All replay one graph or none
(`coordinate_batch_across_dp`): here the one for the largest batch.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy

from xllm_lab.dispatch import FIRST_INSTANCE
from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.of_instance import Policies, refuse_drafts, refuse_tiers
from xllm_lab.policies.roles.colocated import Colocated
from xllm_lab.policies.route.vllm import Vllm
from xllm_lab.serving import Completion, Conversation, Idle, Woke
from xllm_lab.sim.cost import GroupCost
from xllm_lab.sim.instance import Stretch, Timing, at, batch_of_step
from xllm_lab.step import Step
from xllm_lab.step_shape import Shapes, decide_shape, shape_of

# vLLM tells its front end that often how many requests wait and run (`DPCoordinator`, stats_update_interval_ms).
HEARTBEAT_US = 100_000


@dataclass(slots=True)
class Waves:
    """What groups did.

    Attributes:
        num_waves: steps of all groups.
        num_dummies: of instances that had nothing to compute in one.
    """

    num_waves: int = 0
    num_dummies: int = 0


@dataclass(frozen=True, slots=True)
class GroupTiming:
    """How groups of so many instances step.

    Attributes:
        size: of each group; instances 0 to size - 1 are the first one.
        waves: counted as they are run.
    """

    size: int
    cost: GroupCost
    waves: Waves


def fleet_of_group(size: int) -> FleetConfig:
    """One group behind the router that vLLM puts before it."""
    return FleetConfig(num_instances=size, heartbeat_us=HEARTBEAT_US, route=Vllm())


def refuse_group(size: int, fleet: FleetConfig, policies: Policies, config: InstanceConfig) -> None:
    """Raise ConfigError for what instances that step together cannot have, or a fleet that is no whole groups."""
    refuse_drafts(policies)
    refuse_tiers(policies)
    if fleet.num_instances % size:
        raise ConfigError(
            f"data_parallel is {size} and num_instances {fleet.num_instances}; a multiple of it is accepted"
        )
    if fleet.outages:
        raise ConfigError(
            f"data_parallel is {size}: an outage of one instance ends its group, which is not modelled; accepted: none"
        )
    if not isinstance(fleet.roles, Colocated):
        raise ConfigError(f"data_parallel is {size}: instances of one group have one role; accepted: roles colocated")
    if config.kv_layout != "paged":
        raise ConfigError(f"data_parallel is {size} and kv_layout {config.kv_layout!r}; accepted: 'paged'")


class Member:
    """One instance of a group, as a seat has it; see `Instance`.

    Attributes:
        stretch: the step under way; None between steps, and in one for which it has nothing.
    """

    def __init__(self, group: Group, conversation: Conversation) -> None:
        self._group = group
        self.conversation = conversation
        self.command: Step | Idle | None = None
        self.stretch: Stretch | None = None

    def notice(self) -> None:
        """Something has come: wake the group, if it rests; a step under way goes on to its end."""
        self._group.wake()

    @property
    def started_us(self) -> int:
        """Start of the step under way, or now."""
        return self._group.started_us

    def num_steps_over(self) -> int:
        """Of the step under way, none."""
        return 0

    def stop(self) -> None:
        raise AssertionError("an instance of a group fails")

    def answer(self, answer: Completion | Woke | None) -> None:
        """Take what it does next; None if all is over."""
        self.stretch = None
        try:
            self.command = next(self.conversation) if answer is None else self.conversation.send(answer)
        except StopIteration:
            self.command = None


class Group:
    """The process of a group: one event for each step that it takes, and for each rest.

    Args:
        shapes: the shapes policy at work; None: every step is eager.
        first: its first instance, which orders its steps among those of others at one time.
    """

    def __init__(
        self,
        env: simpy.Environment,
        timing: Timing,
        group: GroupTiming,
        config: InstanceConfig,
        *,
        shapes: Shapes | None,
        first: int,
    ) -> None:
        self._env, self._timing, self._group, self._config = env, timing, group, config
        self._shapes, self._priority = shapes, FIRST_INSTANCE + first
        self._members: list[Member] = []
        self._wake: simpy.Event | None = None
        self._start_us: int | None = None

    def join(self, conversation: Conversation) -> Member:
        """An instance comes up; with the last of them the group begins."""
        member = Member(self, conversation)
        self._members.append(member)
        if len(self._members) == self._group.size:
            self._env.process(self._run())
        return member

    def wake(self) -> None:
        """Something has come to an instance."""
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    @property
    def started_us(self) -> int:
        """Start of the step under way, or now."""
        return int(self._env.now) if self._start_us is None else self._start_us

    def _run(self) -> Generator[simpy.Event, Any, None]:
        env = self._env
        for member in self._members:
            member.answer(None)
        while any(member.command is not None for member in self._members):
            stepping = [m for m in self._members if isinstance(m.command, Step)]
            if stepping:
                end = self._begin(stepping)
                yield at(env, end.ends_us[-1], self._priority)
                self._start_us = None
            else:
                self._wake = env.event()
                yield self._wake
            for member in self._members:
                self._answer(member, int(env.now))

    def _begin(self, stepping: list[Member]) -> Stretch:
        """All begin a step; when it ends."""
        steps = [m.command for m in stepping if isinstance(m.command, Step)]
        graph_tokens = self._place(steps)
        batches = [batch_of_step(step)._replace(graph_tokens=graph_tokens) for step in steps]
        price = self._group.cost.together(batches)
        self._start_us = now_us = int(self._env.now)
        end = Stretch((now_us + max(1, round(price.us)),), (price.is_extrapolated,))
        for member in stepping:
            member.stretch = end
        self._group.waves.num_waves += 1
        self._group.waves.num_dummies += len(self._members) - len(stepping)
        return end

    def _place(self, steps: list[Step]) -> int | None:
        """The graph that all of them replay."""
        if self._shapes is None:
            return None
        largest = max((shape_of(s, self._config) for s in steps), key=lambda shape: shape.num_tokens)
        plan = decide_shape(self._shapes.policy, largest)
        for step in steps:
            step.shape = plan
        return plan.num_tokens

    def _answer(self, member: Member, now_us: int) -> None:
        command, stretch = member.command, member.stretch
        if isinstance(command, Step):
            assert stretch is not None, "a step that was not begun"
            self._timing.ran(stretch)
            if self._shapes is not None:
                self._shapes.count(command, 1)
            member.answer(Completion(stretch.ends_us, None))
        elif command is not None:
            member.answer(Woke(now_us))
