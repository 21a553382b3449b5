"""What a plan must obey before a host acts on it. One list, used by both hosts and by the contract suite."""

from __future__ import annotations

from xllm_lab.policies.api import BatchPlan, BatchView, RequestId, RequestView, blocks_to_take, num_missing_tokens


def batch_violations(view: BatchView, plan: BatchPlan) -> list[str]:
    """Every rule the plan breaks, one sentence each; none if it is legal.

    A legal plan schedules known requests only, each at least one token and at most its missing ones; preempts only
    running requests and schedules none of those; and keeps the step's tokens, sequences and KV blocks.
    """
    running = {r.id: r for r in view.running}
    known = {r.id: r for r in (*view.running, *view.waiting)}
    broken: list[str] = []
    for request_id, num_tokens in plan.tokens.items():
        request = known.get(request_id)
        if request is None:
            broken.append(f"schedules request {request_id}, which is neither running nor waiting")
        elif not 1 <= num_tokens <= num_missing_tokens(request):
            missing = num_missing_tokens(request)
            broken.append(f"gives request {request_id} {num_tokens} tokens, 1 to {missing} can be computed")
    for request_id in plan.preempt:
        if request_id not in running:
            broken.append(f"preempts request {request_id}, which is not running")
        if request_id in plan.tokens:
            broken.append(f"both preempts and schedules request {request_id}")
    if len(set(plan.preempt)) != len(plan.preempt):
        broken.append(f"preempts a request twice: {plan.preempt}")
    return broken or _over_budget(view, plan, known)


def _over_budget(view: BatchView, plan: BatchPlan, known: dict[RequestId, RequestView]) -> list[str]:
    blocks = sum(blocks_to_take(view, known[i], n) for i, n in plan.tokens.items())
    free_blocks = view.num_free_blocks + sum(known[i].num_private_blocks for i in plan.preempt)
    amounts = (
        ("tokens", sum(plan.tokens.values()), view.max_tokens_per_batch),
        ("sequences", len(plan.tokens), view.max_seqs_per_batch),
        ("KV blocks", blocks, free_blocks),
    )
    return [f"takes {taken} {what}, {left} are left" for what, taken, left in amounts if taken > left]
