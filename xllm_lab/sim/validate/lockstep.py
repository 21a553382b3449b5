"""A data-parallel group with its experts spread over the instances: all step together, each with its own batch.

vLLM runs such a group in waves, as the exchange before and after the experts is one of all devices; who has nothing
to do takes part with an empty batch (`DPEngineCoreProc.run_busy_loop` of vLLM 0.19).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.of_instance import Policies, refuse_drafts, refuse_tiers
from xllm_lab.records import Records
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import Completion, Conversation, Idle, Woke, WorkloadFeed, serve
from xllm_lab.sim.cost import Batch, Price
from xllm_lab.sim.instance import batch_of_step
from xllm_lab.step import Step
from xllm_lab.step_shape import decide_shape, shape_of
from xllm_lab.workload import Request, TokenIds, Workload


class GroupCost(Protocol):
    def together(self, batches: Sequence[Batch]) -> Price:
        """Time of a step that computes these batches, each on an instance of its own."""
        ...


def run_lockstep(
    workloads: Sequence[Workload],
    config: InstanceConfig,
    policies: Policies,
    cost: GroupCost,
    prompt_ids: Callable[[Request], TokenIds],
) -> tuple[list[Records], float]:
    """Records of each instance, which serves its workload, and the fraction of steps outside the cost model's range.

    All step in the graph that holds the largest batch of them, or eagerly.
    """
    refuse_drafts(policies)
    refuse_tiers(policies)
    records = [Records() for _ in workloads]
    feeds = [WorkloadFeed(w) for w in workloads]
    schedulers = [Scheduler(config, policies.batch, r) for r in records]
    talks = [serve(s, f, prompt_ids) for s, f in zip(schedulers, feeds, strict=True)]
    commands = [_answer(talk, None) for talk in talks]
    now_us = num_steps = num_extrapolated = 0
    while any(commands):
        steps = [c for c in commands if isinstance(c, Step)]
        if steps:
            largest = max((shape_of(s, config) for s in steps), key=lambda shape: shape.num_tokens)
            graph_tokens = decide_shape(policies.shapes, largest).num_tokens
            price = cost.together([batch_of_step(s)._replace(graph_tokens=graph_tokens) for s in steps])
            now_us += max(1, round(price.us))
            num_steps += 1
            num_extrapolated += price.is_extrapolated
        else:
            now_us = max(now_us, min(c.until_us for c in commands if isinstance(c, Idle) and c.until_us is not None))
        for i, (talk, command) in enumerate(zip(talks, commands, strict=True)):
            if command is not None:
                done = Completion((now_us,), None) if isinstance(command, Step) else Woke(now_us)
                commands[i] = _answer(talk, done)
    return [r.sort() for r in records], num_extrapolated / max(num_steps, 1)


def _answer(talk: Conversation, answer: Completion | Woke | None) -> Step | Idle | None:
    """What the instance does next; None if it is done."""
    try:
        return next(talk) if answer is None else talk.send(answer)
    except StopIteration:
        return None
