"""Views of a fleet, drawn by number for `contract`: small and adversarial, what a fleet's policies may meet.

As unkind as `drawn_views`: equal loads and equal matches, fleets of one, full pools, stale heartbeats, prompts shorter
than a block, prompts cached whole, instances of unequal size. Mutable and hashed by identity, for the same reason.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from xllm_lab.policies.api import RequestId
from xllm_lab.policies.roles import ROLES, Role
from xllm_lab.policies.routing import STAGES, InstanceId, Stage

NOW_US = 10_000_000
MAX_INSTANCES = 6


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnFleetRequest:
    """An `ArrivedRequest`, and a `FailedRequest`."""

    id: RequestId
    arrival_us: int
    priority: int
    ttft_slo_us: int | None
    tpot_slo_us: int | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_failovers: int


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnInstance:
    """An `InstanceView`, and a `RoleInstance`."""

    id: InstanceId
    as_of_us: int
    num_running: int
    num_waiting: int
    num_outstanding_tokens: int
    kv_used_frac: float
    num_matched_tokens: int
    max_seqs_per_batch: int
    num_sent_since: int
    num_sent_tokens_since: int
    role: Role = "mixed"
    since_us: int = 0
    is_up: bool = True


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnHeard:
    """A `Heard`."""

    since_us: int
    num_first_tokens: int
    num_in_time: int
    num_overdue: int
    num_ends: int
    num_steady: int


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnRolesView:
    """A `RolesView`, and its number."""

    number: int
    now_us: int
    instances: list[DrawnInstance]
    heard: DrawnHeard


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnRouteView:
    """A `RouteView`, and its number."""

    number: int
    now_us: int
    request: DrawnFleetRequest
    num_routed: int
    block_size: int
    instances: list[DrawnInstance]
    stage: Stage = "whole"


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnFailoverView:
    """A `FailoverView`, and its number."""

    number: int
    now_us: int
    request: DrawnFleetRequest
    num_up_instances: int


def drawn_route_view(number: int) -> DrawnRouteView:
    """The view of that number, at least 0: always the same one, in new objects."""
    rng = random.Random(f"route view {number}")
    block_size = rng.choice((1, 16, 128))
    request = _request(rng)
    num_full_blocks = request.num_prompt_tokens // block_size
    ids = rng.sample(range(50), rng.choice((1, 2, 3, 4, MAX_INSTANCES)))
    nothing_cached = rng.random() < 0.3
    return DrawnRouteView(
        number=number,
        now_us=NOW_US,
        request=request,
        stage=rng.choice(STAGES),
        num_routed=rng.choice((0, rng.randint(1, 5), rng.randint(1, 10**6))),
        block_size=block_size,
        instances=[
            _instance(rng, InstanceId(i), block_size * (0 if nothing_cached else _drawn_blocks(rng, num_full_blocks)))
            for i in ids
        ],
    )


def drawn_failover_view(number: int) -> DrawnFailoverView:
    """The view of that number, at least 0: always the same one, in new objects."""
    rng = random.Random(f"failover view {number}")
    return DrawnFailoverView(
        number=number, now_us=NOW_US, request=_request(rng), num_up_instances=rng.choice((0, 1, rng.randint(2, 64)))
    )


def drawn_roles_view(number: int) -> DrawnRolesView:
    """The view of that number, at least 0: always the same one, in new objects."""
    rng = random.Random(f"roles view {number}")
    ids = rng.sample(range(50), rng.choice((1, 2, 3, 4, MAX_INSTANCES)))
    instances = [_instance(rng, InstanceId(i), 0) for i in ids]
    roles = _drawn_roles(rng, len(ids))
    changed_us = rng.choice((0, NOW_US - 1, NOW_US - 6_000_000))
    for instance, role in zip(instances, roles, strict=True):
        instance.role = role
        instance.since_us = rng.choice((0, changed_us))
        instance.is_up = rng.random() < 0.8
    return DrawnRolesView(number=number, now_us=NOW_US, instances=instances, heard=_heard(rng, changed_us))


def _drawn_roles(rng: random.Random, num: int) -> list[Role]:
    """With somebody for each stage."""
    if num == 1 or rng.random() < 0.2:
        return ["mixed"] * num
    roles: list[Role] = ["prefill", "decode", *(rng.choice(ROLES[rng.random() < 0.7 :]) for _ in range(num - 2))]
    rng.shuffle(roles)
    return roles


def _heard(rng: random.Random, since_us: int) -> DrawnHeard:
    num_first_tokens, num_ends = (rng.choice((0, 1, rng.randint(2, 200))) for _ in range(2))
    return DrawnHeard(
        since_us=since_us,
        num_first_tokens=num_first_tokens,
        num_in_time=rng.choice((0, num_first_tokens, rng.randint(0, num_first_tokens))),
        num_overdue=rng.choice((0, 0, 1, 50)),
        num_ends=num_ends,
        num_steady=rng.choice((0, num_ends, rng.randint(0, num_ends))),
    )


def _request(rng: random.Random) -> DrawnFleetRequest:
    return DrawnFleetRequest(
        id=RequestId(rng.randint(0, 50)),
        arrival_us=rng.choice((NOW_US, NOW_US - 1, 0)),
        priority=rng.choice((1, 2, 2, 3)),
        ttft_slo_us=rng.choice((None, 1_000_000)),
        tpot_slo_us=rng.choice((None, 50_000)),
        num_prompt_tokens=rng.choice((1, 100, 128, 512, rng.randint(1, 5000))),
        num_output_tokens=rng.choice((0, 1, rng.randint(2, 500))),
        num_failovers=rng.choice((0, 0, 1, 3, 9)),
    )


def _instance(rng: random.Random, instance_id: InstanceId, num_matched_tokens: int) -> DrawnInstance:
    max_seqs_per_batch = rng.choice((8, 8, 32))
    num_running = rng.choice((0, 2, max_seqs_per_batch))
    num_waiting = rng.choice((0, 0, 1, 40))
    num_sent_since = rng.choice((0, 0, 1, 3))
    return DrawnInstance(
        id=instance_id,
        as_of_us=NOW_US - rng.choice((0, 1, 500_000)),
        num_running=num_running,
        num_waiting=num_waiting,
        num_outstanding_tokens=num_running + num_waiting * rng.choice((1, 100)),
        kv_used_frac=rng.choice((0.0, 0.5, 1.0)) if num_running else 0.0,
        num_matched_tokens=num_matched_tokens,
        max_seqs_per_batch=max_seqs_per_batch,
        num_sent_since=num_sent_since,
        num_sent_tokens_since=num_sent_since * rng.choice((1, 100)),
    )


def _drawn_blocks(rng: random.Random, most: int) -> int:
    return rng.choice((0, most, rng.randint(0, most)))
