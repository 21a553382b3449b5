"""What a router decided, and on what view: one row a decision, whole enough to ask the policy again.

decisions.parquet       a routing decision names the instance that takes the request, a failover decision what
                        becomes of a request whose instance failed, a decision on roles who changes to what
deliveries.parquet      what each instance of an engine's fleet met, and when it looked: it came up or went down,
                        a request arrived, to its end or to be handed over, a client went away
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from xllm_lab.heard import HeardLately
from xllm_lab.policies.api import RequestId
from xllm_lab.policies.failover import FailoverPlan
from xllm_lab.policies.roles import Role, RolesPlan
from xllm_lab.policies.routing import ById, InstanceId, RoutePlan, Stage
from xllm_lab.router import FailoverQuestion, Known, OnDecision, RequestInHand, RolesQuestion, RouteQuestion

NOT_LOOKED_UP = -1
# Kinds of a `Delivery`.
UP, DOWN, ARRIVES, PREFILLS, LEAVES = "up", "down", "arrives", "prefills", "leaves"
DECISIONS_FILE, DELIVERIES_FILE = "decisions.parquet", "deliveries.parquet"
_INSTANCE_FIELDS = (
    ("id", pa.int32()),
    ("as_of_us", pa.int64()),
    ("num_running", pa.int32()),
    ("num_waiting", pa.int32()),
    ("num_outstanding_tokens", pa.int64()),
    ("kv_used_frac", pa.float64()),
    ("num_matched_tokens", pa.int32()),
    ("max_seqs_per_batch", pa.int32()),
    ("num_sent_since", pa.int32()),
    ("num_sent_tokens_since", pa.int64()),
    ("role", pa.string()),
    ("since_us", pa.int64()),
    ("is_up", pa.bool_()),
)
_HEARD_FIELDS = (("since_us", pa.int64()), *((name, pa.int32()) for name in HeardLately._fields[1:]))
_REQUEST_FIELDS = (
    ("id", pa.int64()),
    ("arrival_us", pa.int64()),
    ("priority", pa.int8()),
    ("ttft_slo_us", pa.int64()),
    ("tpot_slo_us", pa.int64()),
    ("num_prompt_tokens", pa.int32()),
    ("num_output_tokens", pa.int32()),
    ("num_failovers", pa.int32()),
)
_INSTANCE, _REQUEST, _HEARD = map(pa.struct, (_INSTANCE_FIELDS, _REQUEST_FIELDS, _HEARD_FIELDS))
DECISION_SCHEMA = pa.schema(
    [
        pa.field("now_us", pa.int64(), nullable=False),
        pa.field("request", _REQUEST),
        pa.field("stage", pa.string()),
        pa.field("num_routed", pa.int64()),
        pa.field("block_size", pa.int32()),
        pa.field("instances", pa.list_(_INSTANCE)),
        pa.field("heard", _HEARD),
        pa.field("num_up_instances", pa.int32(), nullable=False),
        pa.field("out_of_role", pa.string()),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
DELIVERY_SCHEMA = pa.schema(
    [
        pa.field("us", pa.int64(), nullable=False),
        pa.field("instance", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("request", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRequest:
    """An `ArrivedRequest` and a `FailedRequest`, as a policy saw it."""

    id: RequestId
    arrival_us: int
    priority: int
    ttft_slo_us: int | None
    tpot_slo_us: int | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_failovers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenInstance:
    """An `InstanceView` and a `RoleInstance`, as a policy saw it.

    `num_matched_tokens` is `NOT_LOOKED_UP` where nobody asks for it.
    """

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
    role: Role
    since_us: int
    is_up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetDecision:
    """One decision of a router; what its kind does not have is None.

    Attributes:
        request: of a decision on routing or failover.
        stage, num_routed, block_size: of one on routing.
        instances: of one on routing or roles.
        heard: of one on roles.
        out_of_role: why an instance was to take a request that its role does not take, if one was.
        chosen: the instance's id, the action, or `roles_text`.
    """

    now_us: int
    request: SeenRequest | None = None
    stage: Stage | None = None
    num_routed: int | None = None
    block_size: int | None = None
    instances: tuple[SeenInstance, ...] | None = None
    heard: HeardLately | None = None
    num_up_instances: int
    out_of_role: str | None = None
    chosen: str
    reason: str


class Delivery(NamedTuple):
    """What an instance met, `UP` to `LEAVES`, of a request or of itself."""

    us: int
    instance: InstanceId
    kind: str
    request: RequestId | None = None


class DecisionLog:
    """Every decision of a router, in order.

    Attributes:
        sees_index: whether the routing policy asks for cached prefixes; if not, they are not looked up for the log.
    """

    def __init__(self) -> None:
        self.decisions: list[FleetDecision] = []
        self.sees_index = True

    def listener(self) -> OnDecision:
        """What a router tells."""
        return OnDecision(self._route, self._failover, self._roles)

    def _route(self, view: RouteQuestion, plan: RoutePlan, out_of_role: str | None) -> None:
        seen = tuple([_seen_instance(i, sees_index=self.sees_index) for i in view.instances])
        request, chosen = _seen_request(view.request), str(plan.instance)
        self.decisions.append(
            FleetDecision(
                now_us=view.now_us,
                request=request,
                stage=view.stage,
                num_routed=view.num_routed,
                block_size=view.block_size,
                instances=seen,
                num_up_instances=len(seen),
                out_of_role=out_of_role,
                chosen=chosen,
                reason=plan.reason,
            )
        )

    def _failover(self, view: FailoverQuestion, plan: FailoverPlan) -> None:
        self.decisions.append(
            FleetDecision(
                now_us=view.now_us,
                request=_seen_request(view.request),
                num_up_instances=view.num_up_instances,
                chosen=plan.action,
                reason=plan.reason,
            )
        )

    def _roles(self, view: RolesQuestion, plan: RolesPlan) -> None:
        self.decisions.append(
            FleetDecision(
                now_us=view.now_us,
                instances=tuple([_seen_instance(i, sees_index=False) for i in view.instances]),
                heard=view.heard,
                num_up_instances=sum(i.is_up for i in view.instances),
                chosen=roles_text(plan),
                reason=plan.reason,
            )
        )


class SeenRoute(NamedTuple):
    """A `RouteView` that was recorded."""

    now_us: int
    request: SeenRequest
    stage: Stage
    num_routed: int
    block_size: int
    instances: ById[SeenInstance]


class SeenFailover(NamedTuple):
    """A `FailoverView` that was recorded."""

    now_us: int
    request: SeenRequest
    num_up_instances: int


class SeenRoles(NamedTuple):
    """A `RolesView` that was recorded."""

    now_us: int
    instances: ById[SeenInstance]
    heard: HeardLately


def roles_text(plan: RolesPlan) -> str:
    """Who changes to what, as "0 prefill, 2 decode"; nothing if nobody does."""
    return ", ".join(f"{instance} {role}" for instance, role in sorted(plan.roles.items()))


def decision_table(decisions: Sequence[FleetDecision]) -> pa.Table:
    """In the order given."""
    return pa.Table.from_pylist([_row(d) for d in decisions], schema=DECISION_SCHEMA)


def _row(decision: FleetDecision) -> dict[str, Any]:
    row = {name: getattr(decision, name) for name in DECISION_SCHEMA.names}
    if decision.request is not None:
        row["request"] = {name: getattr(decision.request, name) for name, _ in _REQUEST_FIELDS}
    if decision.instances is not None:
        row["instances"] = [{name: getattr(i, name) for name, _ in _INSTANCE_FIELDS} for i in decision.instances]
    if decision.heard is not None:
        row["heard"] = decision.heard._asdict()
    return row


def decisions_from(table: pa.Table) -> list[FleetDecision]:
    """Inverse of `decision_table`."""
    return [FleetDecision(**_seen(row)) for row in table.to_pylist()]


def _seen(row: dict[str, Any]) -> dict[str, Any]:
    request, instances, heard = row["request"], row["instances"], row["heard"]
    return {
        **row,
        "request": None if request is None else SeenRequest(**request),
        "instances": None if instances is None else tuple([SeenInstance(**i) for i in instances]),
        "heard": None if heard is None else HeardLately(**heard),
    }


def delivery_table(deliveries: Sequence[Delivery]) -> pa.Table:
    """In the order given."""
    return pa.Table.from_pylist([d._asdict() for d in deliveries], schema=DELIVERY_SCHEMA)


def deliveries_from(table: pa.Table) -> list[Delivery]:
    """Inverse of `delivery_table`."""
    return [Delivery(**row) for row in table.to_pylist()]


def _seen_request(request: RequestInHand) -> SeenRequest:
    return SeenRequest(**{name: getattr(request, name) for name, _ in _REQUEST_FIELDS})


def _seen_instance(instance: Known, *, sees_index: bool) -> SeenInstance:
    asked = {
        name: getattr(instance, name) for name, _ in _INSTANCE_FIELDS if sees_index or name != "num_matched_tokens"
    }
    return SeenInstance(**{"num_matched_tokens": NOT_LOOKED_UP, **asked})
