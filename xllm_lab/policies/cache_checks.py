"""What makes a cache plan illegal. Hosts check every plan before they act on it."""

from __future__ import annotations

from collections import Counter

from xllm_lab.policies.cache import CachePlan, CacheView


def cache_violations(view: CacheView, plan: CachePlan) -> list[str]:
    """What is wrong with a plan, one sentence each; nothing if it is legal."""
    return [*_offloads(view, plan), *_host_room(view, plan), *_restores(view, plan), *_stores(view, plan)]


def _offloads(view: CacheView, plan: CachePlan) -> list[str]:
    broken = [
        f"{what} block {block} {count} times"
        for what, blocks in (("offloads", plan.offload), ("evicts host", plan.evict), ("saves host", plan.save))
        for block, count in Counter(blocks).items()
        if count > 1
    ]
    if unknown := [b for b in plan.offload if not view.is_idle(b)]:
        broken.append(f"offloads blocks {unknown}, which are not idle, not cached, or in the host already")
    if unknown := [b for b in plan.evict if not view.is_hosted(b)]:
        broken.append(f"evicts host blocks {unknown}, which hold nothing or are in a copy")
    return broken


def _host_room(view: CacheView, plan: CachePlan) -> list[str]:
    num_free, num_evicted = view.num_free_host_blocks, len(plan.evict)
    taken = len(plan.offload) + sum(plan.prefetch.values())
    what = f"offloads {len(plan.offload)} blocks"
    if plan.prefetch:
        what += f" and prefetches {sum(plan.prefetch.values())}"
    if taken > num_free + num_evicted:
        return [f"{what}, the host has room for {num_free + num_evicted}"]
    if num_evicted and taken < num_free + num_evicted:
        return [f"evicts {num_evicted} host blocks for {taken} that take {max(0, taken - num_free)}"]
    return []


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


def _stores(view: CacheView, plan: CachePlan) -> list[str]:
    broken = []
    if unknown := [b for b in plan.save if not view.is_unsaved(b)]:
        broken.append(f"saves host blocks {unknown}, which hold nothing, are in a copy, or were saved")
    if both := sorted({*plan.save} & {*plan.evict}):
        broken.append(f"saves and evicts host blocks {both}")
    waiting = {r.id: r for r in view.waiting}
    for request_id, num_blocks in plan.prefetch.items():
        if request_id not in waiting:
            broken.append(f"prefetches blocks of request {request_id}, which does not wait for any")
            continue
        num_unasked = waiting[request_id].num_unasked_blocks
        if not 1 <= num_blocks <= num_unasked:
            broken.append(f"prefetches {num_blocks} blocks of request {request_id}, which has {num_unasked} to ask for")
        if request_id in plan.restore:
            broken.append(f"prefetches and restores blocks of request {request_id}")
    if plan.prefetch and plan.prefetch_timeout_us < 1:
        broken.append(f"prefetches for {plan.prefetch_timeout_us} us")
    return broken
