"""What a fleet has: instances, links to them, heartbeats, outages, and who decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xllm_lab.errors import ConfigError
from xllm_lab.outages import Outage, in_order, refuse_impossible
from xllm_lab.policies.catalog import configured, make_policy, policy_name, values_of
from xllm_lab.policies.failover import FailoverPolicy
from xllm_lab.policies.failover.cancel import Cancel
from xllm_lab.policies.roles import RolesPolicy
from xllm_lab.policies.roles.colocated import Colocated
from xllm_lab.policies.route.round_robin import RoundRobin
from xllm_lab.policies.routing import RoutePolicy
from xllm_lab.workload import LONGEST_US

# Each has a scheduler and a KV ledger in memory.
MOST_INSTANCES = 2**16
# A token id travels as an int32.
TOKEN_ID_BYTES = 4
# What a router decides; each is a field of `FleetConfig`.
FLEET_DECISIONS = ("route", "failover", "roles")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """A link: how long a byte is under way, and how many enter in a second.

    Attributes:
        latency_us: from the moment in which the last byte is sent to its arrival; it occupies nobody.
        bytes_per_s: `None` is a link that sends at once, however much.
    """

    latency_us: int = 0
    bytes_per_s: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.latency_us <= LONGEST_US:
            raise ConfigError(f"latency_us is {self.latency_us}, 0 to {LONGEST_US} is accepted")
        if self.bytes_per_s is not None and self.bytes_per_s < 1:
            raise ConfigError(f"bytes_per_s is {self.bytes_per_s}, at least 1 is accepted")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """Equal instances behind one router. Defaults are xllm-service's: in turn, and lost with the instance.

    Attributes:
        num_instances: their ids are 0 to `num_instances - 1`.
        heartbeat_us: how often an instance tells the router its load and what it caches; 0 is always. The default is
            xLLM's `heart_beat_interval`.
        link: of the router to each instance; every instance has one of its own.
        outages: in any order; kept in order of (start_us, instance). Those of one instance neither meet nor overlap.
        route: which instance takes a request.
        failover: what becomes of a request whose instance failed.
        roles: which instances compute prompts, and which go on from there.
        role_interval_us: how often roles are decided anew.
        role_window_us: over which time back latencies count in that.
    """

    num_instances: int
    heartbeat_us: int = 500_000
    link: LinkConfig = LinkConfig()
    outages: tuple[Outage, ...] = ()
    route: RoutePolicy = field(default_factory=RoundRobin)
    failover: FailoverPolicy = field(default_factory=Cancel)
    roles: RolesPolicy = field(default_factory=Colocated)
    role_interval_us: int = 1_000_000
    role_window_us: int = 10_000_000

    def __post_init__(self) -> None:
        if not 1 <= self.num_instances <= MOST_INSTANCES:
            raise ConfigError(f"num_instances is {self.num_instances}, 1 to {MOST_INSTANCES} is accepted")
        if not 0 <= self.heartbeat_us <= LONGEST_US:
            raise ConfigError(f"heartbeat_us is {self.heartbeat_us}, 0 to {LONGEST_US} is accepted")
        for name in ("role_interval_us", "role_window_us"):
            if not 1 <= getattr(self, name) <= LONGEST_US:
                raise ConfigError(f"{name} is {getattr(self, name)}, 1 to {LONGEST_US} is accepted")
        refuse_impossible(self.outages, self.num_instances)
        object.__setattr__(self, "outages", in_order(self.outages))

    def decided(self) -> Iterator[tuple[str, Any]]:
        """Each decision's name with its policy."""
        return ((decides, getattr(self, decides)) for decides in FLEET_DECISIONS)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `fleet_config` turns it back."""
        return {
            "num_instances": self.num_instances,
            "heartbeat_us": self.heartbeat_us,
            "link": values_of(self.link),
            "outages": [values_of(o) for o in self.outages],
            "route": {"policy": policy_name(self.route), **values_of(self.route)},
            "failover": {"policy": policy_name(self.failover), **values_of(self.failover)},
            "roles": {"policy": policy_name(self.roles), **values_of(self.roles)},
            "role_interval_us": self.role_interval_us,
            "role_window_us": self.role_window_us,
        }


def fleet_config(value: Mapping[str, Any]) -> FleetConfig:
    """Inverse of `FleetConfig.as_dict`; ConfigError for unknown fields or values."""
    route, failover, roles = (dict(value[decides]) for decides in FLEET_DECISIONS)
    return FleetConfig(
        num_instances=value["num_instances"],
        heartbeat_us=value["heartbeat_us"],
        link=configured(LinkConfig, value["link"]),
        outages=tuple(configured(Outage, o) for o in value["outages"]),
        route=make_policy("route", route.pop("policy"), route),
        failover=make_policy("failover", failover.pop("policy"), failover),
        roles=make_policy("roles", roles.pop("policy"), roles),
        role_interval_us=value["role_interval_us"],
        role_window_us=value["role_window_us"],
    )
