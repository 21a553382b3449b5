"""What a shapes policy is asked of a step, and its checked answer. The same in engine and simulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from xllm_lab.errors import PolicyError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.shape_checks import shape_violations
from xllm_lab.policies.shapes import ShapePlan, ShapesPolicy, most_tokens
from xllm_lab.policies.shapes.eager import Eager
from xllm_lab.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """A `ShapeView`."""

    num_tokens: int
    num_seqs: int
    is_decode: bool
    max_context_tokens: int
    max_tokens_per_batch: int
    max_seqs_per_batch: int
    max_model_len: int


def shape_of(step: Step, config: InstanceConfig, num_repeats: int = 0) -> StepShape:
    """The shape of a step that is repeated so often: each time its contexts grow by what it computes."""
    others, num_times = step.others, num_repeats + 1
    contexts = [c.num_computed_tokens + c.num_tokens * num_times for c in others]
    if step.decodes.ids:
        contexts.append(step.decodes.max_kv_tokens + num_times)
    num_tokens = len(step.decodes.ids) + sum(c.num_tokens for c in others)
    is_decode = all(c.num_tokens == 1 for c in others) or decodes_row_by_row(step, num_tokens, config)
    return StepShape(
        num_tokens=num_tokens,
        num_seqs=num_tokens if is_decode else len(step.decodes.ids) + len(others),
        is_decode=is_decode,
        max_context_tokens=max(contexts),
        **_limits(config),
    )


def decodes_row_by_row(step: Step, num_tokens: int, config: InstanceConfig) -> bool:
    """Whether each row of a step with drafts may be a sequence of its own, so that a decoding graph holds it.

    xLLM's (`adaptive_speculative_controller.cpp` and its callers): rows of drafts are decoding rows over one KV.
    """
    drafting = {d.id for d in step.drafts if d.token_ids}
    if not drafting or num_tokens > min(config.max_seqs_per_batch, config.max_tokens_per_batch):
        return False
    return all(c.num_tokens == 1 or c.id in drafting for c in step.others)


def decide_shape(policy: ShapesPolicy, shape: StepShape) -> ShapePlan:
    """The policy's plan. PolicyError if it is illegal."""
    plan = policy.decide(shape)
    if broken := shape_violations(shape, plan):
        raise PolicyError(f"shapes policy {policy_name(policy)} {'; '.join(broken)}")
    return plan


def decode_shape(num_seqs: int, config: InstanceConfig) -> StepShape:
    """The shape of a step that decodes so many sequences of one token in KV each."""
    return StepShape(num_tokens=num_seqs, num_seqs=num_seqs, is_decode=True, max_context_tokens=2, **_limits(config))


@dataclass(slots=True)
class ShapeCounts:
    """What became of steps.

    Attributes:
        replays: of graphs.
        eager: steps that ran in none, by the policy's reason.
        padded_tokens: computed for nobody.
    """

    replays: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    padded_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"replays": self.replays, "eager": dict(sorted(self.eager.items())), "padded_tokens": self.padded_tokens}


class Shapes:
    """A shapes policy at work for instances of one configuration.

    Attributes:
        policy: what decides.
        counts: of steps that are over.
    """

    def __init__(self, policy: ShapesPolicy, config: InstanceConfig) -> None:
        self.policy, self._config = policy, config
        self.counts = ShapeCounts()

    def place(self, step: Step) -> None:
        """Say of a planned step where it runs. PolicyError if the policy plans something illegal."""
        shape = shape_of(step, self._config)
        step.shape = decide_shape(self.policy, shape)
        step.rows_apart = shape.is_decode and bool(step.drafts) and step.shape.num_tokens is not None

    def num_alike(self, step: Step, most: int) -> int:
        """How many repeats of a step, up to `most`, run where it does: their contexts grow.

        Found by halves: contexts between two that a policy treats alike are treated so, too (a law of the contract).
        """
        alike, other = 0, most + 1
        while other - alike > 1:
            asked = most if other > most else (alike + other) // 2
            if decide_shape(self.policy, shape_of(step, self._config, asked)) == step.shape:
                alike = asked
            else:
                other = asked
        return alike

    def count(self, step: Step, num_steps: int) -> None:
        """A step and its repeats are over."""
        plan = step.shape
        if plan.num_tokens is None:
            self.counts.eager[plan.reason] += num_steps
        else:
            num_tokens = len(step.decodes.ids) + sum(c.num_tokens for c in step.others)
            self.counts.replays += num_steps
            self.counts.padded_tokens += (plan.num_tokens - num_tokens) * num_steps


def shapes_of(policy: ShapesPolicy, config: InstanceConfig) -> Shapes | None:
    """The policy at work; None where every step is eager, and nobody needs to ask."""
    return None if isinstance(policy, Eager) else Shapes(policy, config)


def graph_sizes(policy: ShapesPolicy, config: InstanceConfig, *, is_decode: bool) -> list[int]:
    """Every size of graph that the policy has use for, found by asking, the largest first.

    Args:
        is_decode: asks for steps that only decode, of sequences with one token in KV each; otherwise for one prompt.
    """
    return sorted({*_sizes(policy, config, is_decode=is_decode)}, reverse=True)


def _sizes(policy: ShapesPolicy, config: InstanceConfig, *, is_decode: bool) -> Iterator[int]:
    def shape(num_tokens: int) -> StepShape:
        if is_decode:
            return decode_shape(num_tokens, config)
        return StepShape(
            num_tokens=num_tokens, num_seqs=1, is_decode=False, max_context_tokens=num_tokens, **_limits(config)
        )

    for num_tokens in range(1 if is_decode else 2, most_tokens(shape(1)) + 1):
        plan = decide_shape(policy, shape(num_tokens))
        if plan.num_tokens is not None:
            yield plan.num_tokens


def _limits(config: InstanceConfig) -> dict[str, int]:
    return {
        "max_tokens_per_batch": config.max_tokens_per_batch,
        "max_seqs_per_batch": config.max_seqs_per_batch,
        "max_model_len": config.max_model_len,
    }
