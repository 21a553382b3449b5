"""What a shapes policy is asked of a step, and its checked answer. The same in engine and simulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xllm_lab.errors import PolicyError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.shape_checks import shape_violations
from xllm_lab.policies.shapes import ShapePlan, ShapesPolicy, most_tokens
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


def shape_of(step: Step, config: InstanceConfig) -> StepShape:
    """A step's shape. Repeats of a step that only decodes have the same, but for the context, which grows."""
    others = step.others
    contexts = [c.num_computed_tokens + c.num_tokens for c in others]
    if step.decodes.ids:
        contexts.append(step.decodes.max_kv_tokens + 1)
    return StepShape(
        num_tokens=len(step.decodes.ids) + sum(c.num_tokens for c in others),
        num_seqs=len(step.decodes.ids) + len(others),
        is_decode=all(c.num_tokens == 1 for c in others),
        max_context_tokens=max(contexts),
        **_limits(config),
    )


def decide_shape(policy: ShapesPolicy, shape: StepShape) -> ShapePlan:
    """The policy's plan. PolicyError if it is illegal."""
    plan = policy.decide(shape)
    if broken := shape_violations(shape, plan):
        raise PolicyError(f"shapes policy {policy_name(policy)} {'; '.join(broken)}")
    return plan


def graph_sizes(policy: ShapesPolicy, config: InstanceConfig, *, is_decode: bool) -> list[int]:
    """Every size of graph that the policy has use for, found by asking, the largest first.

    Args:
        is_decode: asks for steps that only decode, of sequences with one token in KV each; otherwise for one prompt.
    """
    return sorted({*_sizes(policy, config, is_decode=is_decode)}, reverse=True)


def _sizes(policy: ShapesPolicy, config: InstanceConfig, *, is_decode: bool) -> Iterator[int]:
    def shape(num_tokens: int) -> StepShape:
        return StepShape(
            num_tokens=num_tokens,
            num_seqs=num_tokens if is_decode else 1,
            is_decode=is_decode,
            max_context_tokens=2 if is_decode else num_tokens,
            **_limits(config),
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
