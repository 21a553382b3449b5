"""What a router decided, and on what view: one row a decision, whole enough to ask the policy again.

decisions.parquet       a routing decision names the instance that takes the request, a failover decision what
                        becomes of a request whose instance failed
deliveries.parquet      what each instance of an engine's fleet met, and when it looked: it came up or went down,
                        a request arrived, a client went away
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from xllm_lab.policies.api import RequestId
from xllm_lab.policies.failover import FailoverPlan
from xllm_lab.policies.routing import ById, InstanceId, RoutePlan
from xllm_lab.router import FailoverQuestion, Known, OnDecision, RequestInHand, RouteQuestion

NOT_LOOKED_UP = -1
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
)
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
_INSTANCE, _REQUEST = pa.struct(_INSTANCE_FIELDS), pa.struct(_REQUEST_FIELDS)
DECISION_SCHEMA = pa.schema(
    [
        pa.field("now_us", pa.int64(), nullable=False),
        pa.field("request", _REQUEST, nullable=False),
        pa.field("num_routed", pa.int64()),
        pa.field("block_size", pa.int32()),
        pa.field("instances", pa.list_(_INSTANCE)),
        pa.field("num_up_instances", pa.int32(), nullable=False),
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
    """An `InstanceView`, as a policy saw it; `num_matched_tokens` is `NOT_LOOKED_UP` where nobody asks for it."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetDecision:
    """One decision of a router.

    Attributes:
        num_routed, block_size, instances: of a routing decision; None of a failover decision.
        chosen: the instance's id, or the action.
    """

    now_us: int
    request: SeenRequest
    num_routed: int | None
    block_size: int | None
    instances: tuple[SeenInstance, ...] | None
    num_up_instances: int
    chosen: str
    reason: str


class Delivery(NamedTuple):
    """What an instance met: "up", "down", "arrives" or "leaves", of a request or of itself."""

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
        return OnDecision(self._route, self._failover)

    def _route(self, view: RouteQuestion, plan: RoutePlan) -> None:
        seen = tuple([_seen_instance(i, sees_index=self.sees_index) for i in view.instances])
        request, chosen = _seen_request(view.request), str(plan.instance)
        self.decisions.append(
            FleetDecision(
                now_us=view.now_us,
                request=request,
                num_routed=view.num_routed,
                block_size=view.block_size,
                instances=seen,
                num_up_instances=len(seen),
                chosen=chosen,
                reason=plan.reason,
            )
        )

    def _failover(self, view: FailoverQuestion, plan: FailoverPlan) -> None:
        self.decisions.append(
            FleetDecision(
                now_us=view.now_us,
                request=_seen_request(view.request),
                num_routed=None,
                block_size=None,
                instances=None,
                num_up_instances=view.num_up_instances,
                chosen=plan.action,
                reason=plan.reason,
            )
        )


class SeenRoute(NamedTuple):
    """A `RouteView` that was recorded."""

    now_us: int
    request: SeenRequest
    num_routed: int
    block_size: int
    instances: ById[SeenInstance]


class SeenFailover(NamedTuple):
    """A `FailoverView` that was recorded."""

    now_us: int
    request: SeenRequest
    num_up_instances: int


def decision_table(decisions: Sequence[FleetDecision]) -> pa.Table:
    """In the order given."""
    rows = [
        {
            "now_us": d.now_us,
            "request": {name: getattr(d.request, name) for name, _ in _REQUEST_FIELDS},
            "num_routed": d.num_routed,
            "block_size": d.block_size,
            "instances": None
            if d.instances is None
            else [{name: getattr(i, name) for name, _ in _INSTANCE_FIELDS} for i in d.instances],
            "num_up_instances": d.num_up_instances,
            "chosen": d.chosen,
            "reason": d.reason,
        }
        for d in decisions
    ]
    return pa.Table.from_pylist(rows, schema=DECISION_SCHEMA)


def decisions_from(table: pa.Table) -> list[FleetDecision]:
    """Inverse of `decision_table`."""
    return [
        FleetDecision(
            **{
                **row,
                "request": SeenRequest(**row["request"]),
                "instances": None if row["instances"] is None else tuple([SeenInstance(**i) for i in row["instances"]]),
            }
        )
        for row in table.to_pylist()
    ]


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
