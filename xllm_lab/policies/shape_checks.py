"""What a plan of a shapes policy must obey before a host acts on it; used by the hosts and by the contract suite."""

from __future__ import annotations

from xllm_lab.policies.shapes import ShapePlan, ShapeView, most_tokens


def shape_violations(view: ShapeView, plan: ShapePlan) -> list[str]:
    """Every rule the plan breaks, one sentence each; none if the step runs eagerly, or in a graph that holds it."""
    size = plan.num_tokens
    if size is None:
        return []
    what = f"a step of {view.num_tokens} tokens, {view.num_seqs} sequences"
    if size < view.num_tokens:
        return [f"runs {what}, in a graph of {size}"]
    if size > most_tokens(view):
        limits = f"max_tokens_per_batch {view.max_tokens_per_batch}, max_seqs_per_batch {view.max_seqs_per_batch}"
        return [f"pads {what}, to {size}, more than {limits} have use for"]
    return []
