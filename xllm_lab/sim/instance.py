"""One serving instance as a SimPy process: it answers the serving loop with simulated time and placeholder tokens."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Protocol

import simpy

from xllm_lab.scheduler import Sampled, Step
from xllm_lab.serving import Completion, Conversation, Idle, Woke
from xllm_lab.sim.cost import CostModel, batch_of
from xllm_lab.step_time import Chunk
from xllm_lab.workload import RequestId


class Timing(Protocol):
    """What a simulated host answers."""

    def wake_us(self, until_us: int) -> int:
        """When an instance that has nothing to do before `until_us` looks again."""
        ...

    def end_us(self, step: Step) -> int:
        """When the step is over; after its start."""
        ...

    def sampled(self, step: Step) -> Mapping[RequestId, Sampled]:
        """A token for each chunk that samples."""
        ...


class Predicted:
    """A cost model's times. Tokens are placeholders that no other request shares, so no output is a prefix hit.

    Attributes:
        num_steps: steps priced so far.
        num_extrapolated: those outside what the cost model was calibrated on.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self.num_steps = 0
        self.num_extrapolated = 0

    @property
    def extrapolated_frac(self) -> float:
        return self.num_extrapolated / self.num_steps if self.num_steps else 0.0

    def wake_us(self, until_us: int) -> int:
        return until_us

    def end_us(self, step: Step) -> int:
        chunks = (Chunk(c.num_tokens, c.num_computed_tokens) for c in step.chunks)
        price = self._cost.step(batch_of(chunks, sum(c.samples for c in step.chunks)))
        self.num_steps += 1
        self.num_extrapolated += price.is_extrapolated
        return step.start_us + max(1, round(price.us))

    def sampled(self, step: Step) -> Mapping[RequestId, Sampled]:
        return {c.id: Sampled(-1 - c.id) for c in step.chunks if c.samples}


def instance(env: simpy.Environment, conversation: Conversation, timing: Timing) -> Generator[simpy.Event, Any, None]:
    """The process. One event per step and one per idle gap; `env.now` is in integer microseconds."""
    try:
        command = next(conversation)
        while True:
            if isinstance(command, Idle):
                yield env.timeout(timing.wake_us(command.until_us) - env.now)
                command = conversation.send(Woke(int(env.now)))
            else:
                end_us = timing.end_us(command)
                yield env.timeout(end_us - env.now)
                command = conversation.send(Completion(end_us, timing.sampled(command)))
    except StopIteration:
        return
