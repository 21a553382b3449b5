"""What a router knows and decides. The simulated fleet and the engine's drive this one.

It knows each instance by its last heartbeat and by what it sent there since; it knows where every live request is; it
gives instances their roles, and asks routing and failover policies; it checks plans, and says what was decided on what
view. It has no clock: `dispatch` brings it time, clients, links and instances.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from xllm_lab.errors import PolicyError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.heard import HeardLately, Hearing
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import BlockKey
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.failover import FailoverPlan
from xllm_lab.policies.fleet_checks import failover_violations, roles_violations, route_violations
from xllm_lab.policies.roles import TAKE_OVER, TAKE_PROMPTS, Role, RolesPlan
from xllm_lab.policies.roles.colocated import Colocated
from xllm_lab.policies.routing import ById, InstanceId, RoutePlan, Stage
from xllm_lab.records import RequestRecord, RoleChange
from xllm_lab.workload import Request, RequestId


class Load(NamedTuple):
    """What an instance tells the router of itself.

    Attributes:
        cached_keys: of its prefix cache; None if nobody asks for them.
        num_unseen, num_unseen_tokens: requests that had been sent there and had not been looked at, and their prompt
            tokens, if the other figures do not count them.
    """

    as_of_us: int
    num_running: int
    num_waiting: int
    num_outstanding_tokens: int
    kv_used_frac: float
    cached_keys: AbstractSet[BlockKey] | None
    num_unseen: int = 0
    num_unseen_tokens: int = 0


class RequestInHand:
    """An `ArrivedRequest`, and a `FailedRequest`."""

    __slots__ = (
        "arrival_us",
        "id",
        "num_failovers",
        "num_output_tokens",
        "num_prompt_tokens",
        "priority",
        "tpot_slo_us",
        "ttft_slo_us",
    )

    def __init__(self, record: RequestRecord) -> None:
        self.id = record.id
        self.arrival_us = record.arrival_us
        self.priority = record.priority
        self.ttft_slo_us = record.ttft_slo_us
        self.tpot_slo_us = record.tpot_slo_us
        self.num_prompt_tokens = record.prompt_tokens
        self.num_output_tokens = record.output_tokens
        self.num_failovers = record.num_failovers


class Known:
    """One instance as the router knows it: an `InstanceView`, and a `RoleInstance`.

    Attributes:
        role, since_us: what it is sent, and since when.
        num_under_way, num_tokens_under_way: requests that were sent and have not arrived, and their prompt tokens.
        num_sent, num_sent_tokens: those sent since the last heartbeat, and those that were under way then.
    """

    def __init__(self, router: Router, instance: InstanceId) -> None:
        self._router = router
        self.id = instance
        self.role: Role = "mixed"
        self.since_us = 0
        self.is_up = True
        self.max_seqs_per_batch = router.instance.max_seqs_per_batch
        self.num_under_way = self.num_tokens_under_way = 0
        self._num_sent = self._num_sent_tokens = 0
        self._last = Load(0, 0, 0, 0, 0.0, frozenset())
        self._seen_for = -1

    @property
    def as_of_us(self) -> int:
        return self._seen.as_of_us

    @property
    def num_running(self) -> int:
        return self._seen.num_running

    @property
    def num_waiting(self) -> int:
        return self._seen.num_waiting

    @property
    def num_outstanding_tokens(self) -> int:
        return self._seen.num_outstanding_tokens

    @property
    def kv_used_frac(self) -> float:
        return self._seen.kv_used_frac

    @property
    def num_matched_tokens(self) -> int:
        config = self._router.instance
        if not config.enable_prefix_cache:
            return 0
        cached = self._seen.cached_keys
        assert cached is not None, "a policy asks for prefixes and says that it does not need them"
        keys = self._router.keys_of_the_request_in_hand
        num_blocks = next((n for n, key in enumerate(keys) if key not in cached), len(keys))
        return num_blocks * config.block_size

    @property
    def num_sent_since(self) -> int:
        return self._num_sent if self._router.config.heartbeat_us else self.num_under_way

    @property
    def num_sent_tokens_since(self) -> int:
        return self._num_sent_tokens if self._router.config.heartbeat_us else self.num_tokens_under_way

    @property
    def _seen(self) -> Load:
        router = self._router
        if not router.config.heartbeat_us and self._seen_for != router.num_looks and self.is_up:
            self._last, self._seen_for = router.load_now(self.id), router.num_looks
        return self._last

    def send(self, request: Request) -> None:
        """Count a request that leaves the router."""
        self._num_sent += 1
        self._num_sent_tokens += request.prompt.num_tokens
        self.num_under_way += 1
        self.num_tokens_under_way += request.prompt.num_tokens

    def arrive(self, request: Request) -> None:
        """Count a request that arrives at the instance."""
        self.num_under_way -= 1
        self.num_tokens_under_way -= request.prompt.num_tokens

    def beat(self, load: Load) -> None:
        """A heartbeat arrives at the router."""
        self._last = load
        self._num_sent = self.num_under_way + load.num_unseen
        self._num_sent_tokens = self.num_tokens_under_way + load.num_unseen_tokens


class RouteQuestion(NamedTuple):
    """A `RouteView`."""

    now_us: int
    request: RequestInHand
    stage: Stage
    num_routed: int
    block_size: int
    instances: ById[Known]


class FailoverQuestion(NamedTuple):
    """A `FailoverView`."""

    now_us: int
    request: RequestInHand
    num_up_instances: int


class RolesQuestion(NamedTuple):
    """A `RolesView`."""

    now_us: int
    instances: ById[Known]
    heard: HeardLately


class OnDecision(NamedTuple):
    """Who is told of decisions, while what the view shows is as the policy saw it.

    Of a routing decision, why an instance of another role was to take the request, if one was.
    """

    route: Callable[[RouteQuestion, RoutePlan, str | None], None]
    failover: Callable[[FailoverQuestion, FailoverPlan], None]
    roles: Callable[[RolesQuestion, RolesPlan], None]


# Of a request that is sent to an instance of another role.
OUT_OF_ROLE: dict[Stage, str] = {
    "prefill": "nobody is up who computes prompts",
    "decode": "nobody is up who takes over",
}


class Router:
    """Which instance takes a request, and what becomes of one whose instance failed.

    Attributes:
        known: all instances, by id.
        up: those that are, sorted by id.
        has_roles: whether not everybody is to serve requests to their ends.
        num_looks: decisions so far that looked at loads.
        load_now: what an instance would tell at this moment.
        needs_index: whether the routing policy asks for cached prefixes.
        keys_of_the_request_in_hand: keys of its prompt's full blocks, but for the last token, which is always computed.
    """

    def __init__(
        self,
        config: FleetConfig,
        instance: InstanceConfig,
        load_now: Callable[[InstanceId], Load],
        keys_of: Callable[[Request], list[BlockKey]],
        on_decision: OnDecision | None = None,
    ) -> None:
        self.config = config
        self.instance = instance
        self.has_roles = type(config.roles) is not Colocated
        self.hearing = Hearing(config.role_window_us) if self.has_roles else None
        self.num_looks = 0
        self._num_routed: Counter[Stage] = Counter()
        self.needs_index = instance.enable_prefix_cache and getattr(config.route, "needs_prefix_index", True)
        self.keys_of_the_request_in_hand: list[BlockKey] = []
        self.load_now = load_now
        self._keys_of = keys_of
        self._on_decision = on_decision
        self.known = tuple([Known(self, InstanceId(k)) for k in range(config.num_instances)])
        self.up: ById[Known] = ById(self.known)
        # Where a live request is; its record while it is on its way, or no instance is up.
        self._where: dict[RequestId, Known | RequestRecord] = {}
        self._held: deque[tuple[Request, RequestRecord]] = deque()

    def route(self, request: Request, record: RequestRecord, now_us: int) -> Known | None:
        """Who takes a request; None if no instance is up, and then it is held.

        Raises:
            PolicyError: the policy named an instance that is not up.
        """
        self._where[request.id] = record
        if self.hearing is not None:
            self.hearing.begins(record)
        if not self.up:
            self._held.append((request, record))
            return None
        self.keys_of_the_request_in_hand = self._keys_of(request) if self.needs_index else []
        policy = self.config.route
        stage: Stage = "whole" if not self.has_roles else "decode" if record.output_tokens else "prefill"
        takers = self._takers(stage)
        view = RouteQuestion(
            now_us, RequestInHand(record), stage, self._num_routed[stage], self.instance.block_size, takers or self.up
        )
        self.num_looks += 1
        plan = policy.decide(view)
        if broken := route_violations(view, plan):
            raise PolicyError(f"policy {policy_name(policy)} at {now_us} us: {'; '.join(broken)}")
        if self._on_decision is not None:
            self._on_decision.route(view, plan, None if takers else OUT_OF_ROLE[stage])
        self._num_routed[stage] += 1
        chosen = self.known[plan.instance]
        chosen.send(request)
        return chosen

    def requeues(self, record: RequestRecord, now_us: int) -> bool:
        """Whether a request outlives its instance, which failed, or was down when it came.

        Raises:
            PolicyError: the policy wants something that there is not.
        """
        policy = self.config.failover
        view = FailoverQuestion(now_us, RequestInHand(record), len(self.up))
        plan = policy.decide(view)
        if broken := failover_violations(view, plan):
            raise PolicyError(f"policy {policy_name(policy)} at {now_us} us: {'; '.join(broken)}")
        if self._on_decision is not None:
            self._on_decision.failover(view, plan)
        return plan.action == "requeue"

    def _takers(self, stage: Stage) -> ById[Known]:
        """Who is up and has a role for a stage."""
        if stage == "whole":
            return self.up
        roles = TAKE_PROMPTS if stage == "prefill" else TAKE_OVER
        return ById([k for k in self.up if k.role in roles])

    def decide_roles(self, now_us: int) -> list[RoleChange]:
        """Give instances their roles; returns who got another one.

        Raises:
            PolicyError: the policy left nobody for a stage, or named what there is not.
        """
        assert self.hearing is not None, "roles are decided, and there are none"
        self.num_looks += 1
        policy = self.config.roles
        view = RolesQuestion(now_us, ById(self.known), self.hearing.lately(now_us))
        plan = policy.decide(view)
        if broken := roles_violations(view, plan):
            raise PolicyError(f"policy {policy_name(policy)} at {now_us} us: {'; '.join(broken)}")
        if self._on_decision is not None:
            self._on_decision.roles(view, plan)
        changes = []
        for known in self.known:
            role = plan.roles.get(known.id, known.role)
            if role != known.role:
                known.role, known.since_us = role, now_us
                changes.append(RoleChange(now_us, known.id, role, plan.reason))
        if changes:
            self.hearing.begin_anew(now_us)
        return changes

    def is_on_its_way(self, record: RequestRecord) -> bool:
        """Whether a request that was sent is still wanted: its client may have gone away meanwhile."""
        return self._where.get(record.id) is record

    def place(self, request: RequestId, where: Known | RequestRecord) -> None:
        """A request is on an instance now; or, as its record, on none any more."""
        self._where[request] = where

    def where(self, request: RequestId) -> Known | RequestRecord | None:
        """None if it has ended, or never came."""
        return self._where.get(request)

    def hand_over(self, record: RequestRecord, now_us: int) -> None:
        """A request has its first token, and left its instance to go on elsewhere."""
        assert self.hearing is not None, f"request {record.id} is handed over, and nobody has a role"
        self.hearing.first_token(record, now_us)
        self._where[record.id] = record

    def forget(self, request: RequestId, now_us: int) -> None:
        """A request ended."""
        if self.hearing is not None:
            self.hearing.ends(request, now_us)
        self._where.pop(request, None)

    def drop(self, record: RequestRecord) -> None:
        """A request is held no longer, if it was: its client went away."""
        self._held = deque(held for held in self._held if held[1] is not record)

    def goes_down(self, known: Known) -> None:
        """Nothing is sent there any more."""
        known.is_up = False
        self.up.remove(known)

    def comes_up(self, known: Known, load: Load) -> Sequence[tuple[Request, RequestRecord]]:
        """An instance comes, or comes back; returns the requests that were held, in order, to be routed."""
        known.is_up = True
        self.up = ById(sorted([*self.up, known], key=lambda k: k.id))
        known.beat(load)
        return self.release()

    def release(self) -> Sequence[tuple[Request, RequestRecord]]:
        """The requests that were held; they are no longer."""
        held, self._held = self._held, deque()
        return held
