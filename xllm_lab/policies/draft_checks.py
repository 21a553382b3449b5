"""What a plan of a draft policy must obey before a host acts on it; used by the hosts and by the contract suite."""

from __future__ import annotations

from xllm_lab.policies.draft import DraftPlan, DraftView, blocks_for


def draft_violations(view: DraftView, plan: DraftPlan) -> list[str]:
    """Every rule the plan breaks, one sentence each; none if it is legal.

    A legal plan asks for requests that decode, each for at least one draft and no more than can be kept, by methods
    that the host has, and keeps the step's tokens and KV blocks.
    """
    broken: list[str] = []
    decoding = {r.id: r for r in view.decoding} if plan.asks else {}
    tokens = blocks = 0
    for request_id, (method, depth) in plan.asks.items():
        request = decoding.get(request_id)
        if request is None:
            broken.append(f"drafts for request {request_id}, which does not decode")
        elif method not in view.methods:
            broken.append(f"drafts by {method!r} for request {request_id}, accepted: {', '.join(view.methods)}")
        elif not 1 <= depth <= request.most_drafts:
            broken.append(f"drafts {depth} tokens for request {request_id}, 1 to {request.most_drafts} can be kept")
        else:
            tokens += depth
            blocks += blocks_for(request, depth, view.block_size)
    amounts = (("tokens", tokens, view.tokens_left), ("KV blocks", blocks, view.blocks_left))
    return broken or [f"drafts take {taken} {what}, {left} are left" for what, taken, left in amounts if taken > left]
