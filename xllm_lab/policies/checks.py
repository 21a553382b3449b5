"""What a plan must obey before a host acts on it. One list, used by both hosts and by the contract suite."""

from __future__ import annotations

from xllm_lab.policies.api import (
    BatchPlan,
    BatchView,
    RequestId,
    RequestView,
    blocks_to_take,
    is_decoding,
    num_missing_tokens,
)


def batch_violations(view: BatchView, plan: BatchPlan) -> list[str]:
    """Every rule the plan breaks, one sentence each; none if it is legal.

    A legal plan schedules known requests only, each once, at least one token and at most its missing ones; preempts
    only running or draining requests and schedules none of those; keeps the step's tokens, sequences and KV blocks; and
    holds for further steps only if it does nothing but decode everything, and compute chunks of one prompt that do not
    finish it.
    """
    broken: list[str] = []
    blocks = 0
    for request_id, num_tokens in plan.tokens.items():
        request = view.find(request_id)
        if request is None:
            broken.append(f"schedules request {request_id}, which is neither running nor waiting")
        elif not (missing := num_missing_tokens(request)) >= num_tokens >= 1:
            broken.append(f"gives request {request_id} {num_tokens} tokens, 1 to {missing} can be computed")
        elif plan.decode_all and missing == 1 and request.is_running and is_decoding(request):
            broken.append(f"schedules request {request_id} twice, it is decoding")
        else:
            blocks += blocks_to_take(view, request, num_tokens)
    if plan.preempt:
        broken += _bad_preemptions(view, plan)
    if plan.holds_for < 0 or (plan.holds_for and not _may_hold(view, plan)):
        broken.append(
            f"holds for {plan.holds_for} more steps, only a plan that just decodes everything may, or one that besides "
            "computes one prompt's chunks up to the one before its last"
        )
    return broken or _over_budget(view, plan, blocks)


def _may_hold(view: BatchView, plan: BatchPlan) -> bool:
    if plan.preempt or not plan.decode_all or len(plan.tokens) > 1:
        return False
    for request_id, num_tokens in plan.tokens.items():
        request = view.find(request_id)
        return request is not None and num_missing_tokens(request) > num_tokens * (plan.holds_for + 1)
    return True


def _bad_preemptions(view: BatchView, plan: BatchPlan) -> list[str]:
    broken: list[str] = []
    for request_id in plan.preempt:
        request = view.find(request_id)
        if request is None and _draining(view, request_id) is not None:
            continue
        if request is None or not request.is_running:
            broken.append(f"preempts request {request_id}, which is not running")
        elif request_id in plan.tokens or (plan.decode_all and is_decoding(request)):
            broken.append(f"both preempts and schedules request {request_id}")
    if len(set(plan.preempt)) != len(plan.preempt):
        broken.append(f"preempts a request twice: {plan.preempt}")
    return broken


def _draining(view: BatchView, request_id: RequestId) -> RequestView | None:
    return next((r for r in view.draining if r.id == request_id), None)


def _over_budget(view: BatchView, plan: BatchPlan, blocks: int) -> list[str]:
    tokens, seqs, free_blocks = sum(plan.tokens.values()), len(plan.tokens), view.num_free_blocks
    if plan.decode_all:
        tokens += len(view.decoding)
        seqs += len(view.decoding)
        blocks += view.num_decode_blocks
    for request_id in plan.preempt:
        request = view.find(request_id) or _draining(view, request_id)
        assert request is not None, "checked before"
        free_blocks += request.num_private_blocks
    # Three comparisons on every step of every simulation: sentences are made only for the guilty.
    if tokens <= view.max_tokens_per_batch and seqs <= view.max_seqs_per_batch and blocks <= free_blocks:
        return []
    amounts = (
        ("tokens", tokens, view.max_tokens_per_batch),
        ("sequences", seqs, view.max_seqs_per_batch),
        ("KV blocks", blocks, free_blocks),
    )
    return [f"takes {taken} {what}, {left} are left" for what, taken, left in amounts if taken > left]
