"""What makes a cache plan illegal. Hosts check every plan before they act on it."""

from __future__ import annotations

from collections import Counter

from xllm_lab.policies.cache import CachePlan, CacheView


def cache_violations(view: CacheView, plan: CachePlan) -> list[str]:
    """What is wrong with a plan, one sentence each; nothing if it is legal."""
    return [*_offloads(view, plan), *_restores(view, plan)]


def _offloads(view: CacheView, plan: CachePlan) -> list[str]:
    broken = [
        f"{what} block {block} {count} times"
        for what, blocks in (("offloads", plan.offload), ("evicts host", plan.evict))
        for block, count in Counter(blocks).items()
        if count > 1
    ]
    if unknown := [b for b in plan.offload if not view.is_idle(b)]:
        broken.append(f"offloads blocks {unknown}, which are not idle, not cached, or in the host already")
    if unknown := [b for b in plan.evict if not view.is_hosted(b)]:
        broken.append(f"evicts host blocks {unknown}, which hold nothing or are in a copy")
    room = view.num_free_host_blocks + len(plan.evict)
    if len(plan.offload) > room:
        broken.append(f"offloads {len(plan.offload)} blocks, the host has room for {room}")
    elif plan.evict and len(plan.offload) < room:
        needed = max(0, len(plan.offload) - view.num_free_host_blocks)
        broken.append(f"evicts {len(plan.evict)} host blocks for {len(plan.offload)} that take {needed}")
    return broken


def _restores(view: CacheView, plan: CachePlan) -> list[str]:
    broken = []
    waiting = {r.id: r for r in view.waiting}
    total = len(plan.offload)
    for request_id, num_blocks in plan.restore.items():
        if request_id not in waiting:
            broken.append(f"restores blocks of request {request_id}, which does not wait for any")
            continue
        have = waiting[request_id].num_host_blocks
        if not 1 <= num_blocks <= have:
            broken.append(f"restores {num_blocks} blocks of request {request_id}, the host has {have}")
        total += num_blocks + waiting[request_id].num_idle_blocks
    if plan.restore and total > view.num_free_blocks:
        broken.append(f"takes {total} blocks to offload and restore, {view.num_free_blocks} are free on the device")
    return broken
