"""What the laws of `contract` need to know of a kind of policy: what it may meet, what it must obey, what it says.

A new kind of decision is a new entry of `KINDS`; the laws themselves stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from xllm_lab.drawn_cache_views import DrawnCacheView, drawn_cache_view
from xllm_lab.drawn_draft_views import DrawnDraftView, drawn_draft_view
from xllm_lab.drawn_experts_views import DrawnExpertsView, drawn_experts_view
from xllm_lab.drawn_fleet_views import (
    DrawnFailoverView,
    DrawnRolesView,
    DrawnRouteView,
    drawn_failover_view,
    drawn_roles_view,
    drawn_route_view,
)
from xllm_lab.drawn_pages_views import DrawnPagesView, drawn_pages_view
from xllm_lab.drawn_shape_views import DrawnShapeView, drawn_shape_view
from xllm_lab.drawn_views import DrawnView, drawn_view
from xllm_lab.policies.api import (
    BatchPlan,
    admission_key,
    arrival_key,
    blocks_to_take,
    by_admission,
)
from xllm_lab.policies.cache import CachePlan
from xllm_lab.policies.cache_checks import cache_violations
from xllm_lab.policies.checks import batch_violations
from xllm_lab.policies.draft import DraftPlan
from xllm_lab.policies.draft_checks import draft_violations
from xllm_lab.policies.experts import ExpertsPlan
from xllm_lab.policies.experts_checks import experts_violations
from xllm_lab.policies.failover import FailoverPlan
from xllm_lab.policies.fleet_checks import failover_violations, roles_violations, route_violations
from xllm_lab.policies.ordered import ByAdmission, ByArrival
from xllm_lab.policies.pages import PagePlan
from xllm_lab.policies.pages_checks import pages_violations
from xllm_lab.policies.roles import RolesPlan
from xllm_lab.policies.routing import ById, RoutePlan
from xllm_lab.policies.shape_checks import shape_violations
from xllm_lab.policies.shapes import ShapePlan

# Other ids in the same order.
Rename = Callable[[int], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of decision.

    Attributes:
        drawn_view: the view of a number, always the same one, in new objects.
        violations: what is wrong with a plan, one sentence each.
        answer: what a plan says of a view, as a value: two plans are equal only if these are.
        relisted: the same view with its sequences in other orders, and marked as hosts mark them.
        rename: gives everyone in a view another id.
        renamed: the answer expected then.
    """

    drawn_view: Callable[[int], Any]
    violations: Callable[[Any, Any], list[str]]
    answer: Callable[[Any, Any], Any]
    relisted: Callable[[Any], list[Any]]
    rename: Callable[[Any, Rename], None]
    renamed: Callable[[Any, Rename], Any]


# The packing order is part of the answer.
_BatchAnswer = tuple[tuple[tuple[int, int], ...], tuple[int, ...]]


def _batch_violations(view: DrawnView, plan: BatchPlan) -> list[str]:
    """And idling while a request could run, unless it may wait for those that drain."""
    if broken := batch_violations(view, plan):
        return broken
    could_run = [r.id for r in (*view.running, *view.waiting) if blocks_to_take(view, r, 1) <= view.num_free_blocks]
    if could_run and plan.is_empty and not plan.preempt and not view.draining:
        return [f"plans nothing while requests {could_run} could run"]
    return []


def _batch_answer(view: DrawnView, plan: BatchPlan) -> _BatchAnswer:
    decodes = ((r.id, 1) for r in by_admission(view.decoding)) if plan.decode_all else ()
    return (*decodes, *plan.tokens.items()), plan.preempt


def _relisted_batch(view: DrawnView) -> list[DrawnView]:
    shuffled = replace(view, running=view.running[::-1], waiting=view.waiting[::-1], draining=view.draining[::-1])
    random.Random(view.number).shuffle(shuffled.waiting)
    by_host = replace(
        view,
        running=ByAdmission(sorted(view.running, key=admission_key)),
        waiting=ByArrival(sorted(view.waiting, key=arrival_key)),
        draining=ByAdmission(sorted(view.draining, key=admission_key)),
    )
    return [shuffled, by_host]


def _rename_batch(view: DrawnView, rename: Rename) -> None:
    for request in (*view.running, *view.waiting, *view.draining):
        request.id = rename(request.id)


def _renamed_batch(answer: _BatchAnswer, rename: Rename) -> _BatchAnswer:
    tokens, preempt = answer
    return tuple((rename(i), n) for i, n in tokens), tuple(map(rename, preempt))


# Offloads and evictions are paired and queued in order; restores are begun in the order in which requests wait.
# Blocks to offload, to evict and to save; requests whose blocks are restored, and prefetched, and how many.
_CacheAnswer = tuple[tuple[tuple[int, ...], ...], tuple[tuple[tuple[int, int], ...], ...], int]


def _cache_answer(view: DrawnCacheView, plan: CachePlan) -> _CacheAnswer:
    by_request = tuple(tuple(sorted(counts.items())) for counts in (plan.restore, plan.prefetch))
    return (plan.offload, plan.evict, plan.save), by_request, plan.prefetch_timeout_us


def _relisted_cache(view: DrawnCacheView) -> list[DrawnCacheView]:
    shuffled = replace(view, waiting=view.waiting[::-1])
    random.Random(view.number).shuffle(shuffled.waiting)
    by_host = replace(view, waiting=ByArrival(sorted(view.waiting, key=lambda r: (r.arrival_us, r.id))))
    return [shuffled, by_host]  # blocks are listed by recency, which is promised


def _rename_cache(view: DrawnCacheView, rename: Rename) -> None:
    for request in view.waiting:
        request.id = rename(request.id)
    view.idle_blocks = [b._replace(id=rename(b.id)) for b in view.idle_blocks]
    view.hosted_blocks = [b._replace(id=rename(b.id)) for b in view.hosted_blocks]
    view.unsaved_blocks = [b._replace(id=rename(b.id)) for b in view.unsaved_blocks]


def _renamed_cache(answer: _CacheAnswer, rename: Rename) -> _CacheAnswer:
    blocks, by_request, timeout_us = answer
    renamed = tuple(tuple((rename(i), n) for i, n in counts) for counts in by_request)
    return tuple(tuple(map(rename, some)) for some in blocks), renamed, timeout_us


# Hosts draft in an order of their own.
_DraftAnswer = tuple[tuple[int, str, int], ...]


def _draft_answer(view: DrawnDraftView, plan: DraftPlan) -> _DraftAnswer:
    return tuple(sorted((i, method, depth) for i, (method, depth) in plan.asks.items()))


def _relisted_draft(view: DrawnDraftView) -> list[DrawnDraftView]:
    shuffled = replace(view, decoding=view.decoding[::-1], methods=view.methods[::-1])
    random.Random(view.number).shuffle(shuffled.decoding)
    return [shuffled]


def _rename_draft(view: DrawnDraftView, rename: Rename) -> None:
    for request in view.decoding:
        request.id = rename(request.id)


def _renamed_draft(answer: _DraftAnswer, rename: Rename) -> _DraftAnswer:
    return tuple((rename(i), method, depth) for i, method, depth in answer)


def _route_answer(view: DrawnRouteView, plan: RoutePlan) -> int:
    return plan.instance


def _relisted_route(view: DrawnRouteView) -> list[DrawnRouteView]:
    shuffled = replace(view, instances=view.instances[::-1])
    by_host = replace(view, instances=ById(sorted(view.instances, key=lambda i: i.id)))
    return [shuffled, by_host]


def _rename_route(view: DrawnRouteView, rename: Rename) -> None:
    view.request.id = rename(view.request.id)
    for instance in view.instances:
        instance.id = rename(instance.id)


def _renamed_route(answer: int, rename: Rename) -> int:
    name: int = rename(answer)
    return name


def _failover_answer(view: DrawnFailoverView, plan: FailoverPlan) -> str:
    return plan.action


def _relisted_failover(view: DrawnFailoverView) -> list[DrawnFailoverView]:
    return []  # it lists nothing


def _rename_failover(view: DrawnFailoverView, rename: Rename) -> None:
    view.request.id = rename(view.request.id)


def _renamed_failover(answer: str, rename: Rename) -> str:
    return answer


# Nobody asks in which order instances change.
_RolesAnswer = tuple[tuple[int, str], ...]


def _roles_answer(view: DrawnRolesView, plan: RolesPlan) -> _RolesAnswer:
    return tuple(sorted(plan.roles.items()))


def _relisted_roles(view: DrawnRolesView) -> list[DrawnRolesView]:
    shuffled = replace(view, instances=view.instances[::-1])
    by_host = replace(view, instances=ById(sorted(view.instances, key=lambda i: i.id)))
    return [shuffled, by_host]


def _rename_roles(view: DrawnRolesView, rename: Rename) -> None:
    for instance in view.instances:
        instance.id = rename(instance.id)


def _renamed_roles(answer: _RolesAnswer, rename: Rename) -> _RolesAnswer:
    return tuple((rename(i), role) for i, role in answer)


def _shapes_answer(view: DrawnShapeView, plan: ShapePlan) -> int | None:
    return plan.num_tokens


def _relisted_shapes(view: DrawnShapeView) -> list[DrawnShapeView]:
    return []  # it lists nothing


def _rename_shapes(view: DrawnShapeView, rename: Rename) -> None:
    """It names nobody."""


def _renamed_shapes(answer: int | None, rename: Rename) -> int | None:
    return answer


# Nobody asks in which order slots are reclaimed.
_PagesAnswer = tuple[int, tuple[tuple[int, int], ...], int]


def _pages_answer(view: DrawnPagesView, plan: PagePlan) -> _PagesAnswer:
    return plan.num_ahead, tuple(sorted(plan.reclaim.items())), plan.holds_for


def _relisted_pages(view: DrawnPagesView) -> list[DrawnPagesView]:
    shuffled = replace(view, free_slots=view.free_slots[::-1])
    random.Random(view.number).shuffle(shuffled.free_slots)
    return [shuffled]


def _rename_pages(view: DrawnPagesView, rename: Rename) -> None:
    for slot in view.free_slots:
        slot.id = rename(slot.id)


def _renamed_pages(answer: _PagesAnswer, rename: Rename) -> _PagesAnswer:
    num_ahead, reclaim, holds_for = answer
    return num_ahead, tuple((rename(slot), kept) for slot, kept in reclaim), holds_for


# Nobody asks in which order layers change. Experts and devices are places, not ids.
_ExpertsAnswer = tuple[tuple[int, tuple[int, ...]], ...]


def _experts_answer(view: DrawnExpertsView, plan: ExpertsPlan) -> _ExpertsAnswer:
    return tuple(sorted(plan.slots.items()))


def _relisted_experts(view: DrawnExpertsView) -> list[DrawnExpertsView]:
    shuffled = replace(view, layers=view.layers[::-1])
    random.Random(view.number).shuffle(shuffled.layers)
    return [shuffled]


def _rename_experts(view: DrawnExpertsView, rename: Rename) -> None:
    for layer in view.layers:
        layer.id = rename(layer.id)


def _renamed_experts(answer: _ExpertsAnswer, rename: Rename) -> _ExpertsAnswer:
    return tuple((rename(layer), slots) for layer, slots in answer)


KINDS = {
    "batch": Kind(
        drawn_view=drawn_view,
        violations=_batch_violations,
        answer=_batch_answer,
        relisted=_relisted_batch,
        rename=_rename_batch,
        renamed=_renamed_batch,
    ),
    "cache": Kind(
        drawn_view=drawn_cache_view,
        violations=cache_violations,
        answer=_cache_answer,
        relisted=_relisted_cache,
        rename=_rename_cache,
        renamed=_renamed_cache,
    ),
    "draft": Kind(
        drawn_view=drawn_draft_view,
        violations=draft_violations,
        answer=_draft_answer,
        relisted=_relisted_draft,
        rename=_rename_draft,
        renamed=_renamed_draft,
    ),
    "experts": Kind(
        drawn_view=drawn_experts_view,
        violations=experts_violations,
        answer=_experts_answer,
        relisted=_relisted_experts,
        rename=_rename_experts,
        renamed=_renamed_experts,
    ),
    "failover": Kind(
        drawn_view=drawn_failover_view,
        violations=failover_violations,
        answer=_failover_answer,
        relisted=_relisted_failover,
        rename=_rename_failover,
        renamed=_renamed_failover,
    ),
    "pages": Kind(
        drawn_view=drawn_pages_view,
        violations=pages_violations,
        answer=_pages_answer,
        relisted=_relisted_pages,
        rename=_rename_pages,
        renamed=_renamed_pages,
    ),
    "roles": Kind(
        drawn_view=drawn_roles_view,
        violations=roles_violations,
        answer=_roles_answer,
        relisted=_relisted_roles,
        rename=_rename_roles,
        renamed=_renamed_roles,
    ),
    "route": Kind(
        drawn_view=drawn_route_view,
        violations=route_violations,
        answer=_route_answer,
        relisted=_relisted_route,
        rename=_rename_route,
        renamed=_renamed_route,
    ),
    "shapes": Kind(
        drawn_view=drawn_shape_view,
        violations=shape_violations,
        answer=_shapes_answer,
        relisted=_relisted_shapes,
        rename=_rename_shapes,
        renamed=_renamed_shapes,
    ),
}
