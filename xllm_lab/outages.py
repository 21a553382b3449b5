"""When instances are down: outages as they are given, or drawn from a failure process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xllm_lab.errors import ConfigError
from xllm_lab.policies.routing import InstanceId
from xllm_lab.workload import LONGEST_US, stream

# Each becomes an object and an event. A fleet that fails more often has not been thought of.
MOST_OUTAGES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """An instance is down in [start_us, end_us): it loses its requests and its KV, and comes back empty."""

    instance: InstanceId
    start_us: int
    end_us: int

    def __post_init__(self) -> None:
        if not 0 <= self.start_us <= LONGEST_US:
            raise ConfigError(f"start_us is {self.start_us}, 0 to {LONGEST_US} is accepted")
        if not self.start_us < self.end_us <= LONGEST_US:
            raise ConfigError(f"end_us is {self.end_us}, {self.start_us + 1} to {LONGEST_US} is accepted")


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureProcess:
    """Instances fail and are repaired independently, after exponential times.

    The long-run fraction of time an instance is up is `mean_up_us / (mean_up_us + mean_repair_us)`.

    Attributes:
        mean_up_us: from a repair to the next failure (MTTF). The mean time between failures is this and the repair.
        mean_repair_us: from a failure to its repair (MTTR).
        horizon_us: no outage begins later. One that has begun is repaired, however late.
        seed: of the streams, one for each instance, so that a larger fleet keeps the outages of a smaller one.
    """

    mean_up_us: int
    mean_repair_us: int
    horizon_us: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("mean_up_us", 1), ("mean_repair_us", 1), ("horizon_us", 1), ("seed", 0)):
            if not least <= getattr(self, name) <= LONGEST_US:
                raise ConfigError(f"{name} is {getattr(self, name)}, {least} to {LONGEST_US} is accepted")

    def outages(self, num_instances: int) -> tuple[Outage, ...]:
        """Outages of instances 0 to `num_instances - 1`, in order of (start_us, instance).

        Raises:
            ConfigError: more than `MOST_OUTAGES` would have to be expected.
        """
        expected = num_instances * self.horizon_us // (self.mean_up_us + self.mean_repair_us)
        if expected > MOST_OUTAGES:
            raise ConfigError(f"about {expected} outages within horizon_us, at most {MOST_OUTAGES} is accepted")
        return in_order(o for i in range(num_instances) for o in self._outages_of(InstanceId(i)))

    def _outages_of(self, instance: InstanceId) -> list[Outage]:
        rng = stream(self.seed, f"outages of instance {instance}")
        found: list[Outage] = []
        start_us = 0
        while (start_us := start_us + max(1, round(rng.exponential(self.mean_up_us)))) < self.horizon_us:
            end_us = start_us + max(1, round(rng.exponential(self.mean_repair_us)))
            found.append(Outage(instance=instance, start_us=start_us, end_us=min(end_us, LONGEST_US)))
            start_us = end_us
        return found


def in_order(outages: Iterable[Outage]) -> tuple[Outage, ...]:
    """Sorted by (start_us, instance)."""
    return tuple(sorted(outages, key=lambda o: (o.start_us, o.instance)))


def refuse_impossible(outages: Iterable[Outage], num_instances: int) -> None:
    """ConfigError for an outage of an instance that is not there, or is down already or until that very moment."""
    last: dict[InstanceId, Outage] = {}
    for outage in in_order(outages):
        if not 0 <= outage.instance < num_instances:
            raise ConfigError(f"outage of instance {outage.instance}, 0 to {num_instances - 1} is accepted")
        before = last.get(outage.instance)
        if before is not None and outage.start_us <= before.end_us:
            raise ConfigError(
                f"outage of instance {outage.instance}: start_us is {outage.start_us}, "
                f"more than {before.end_us}, the end of the one before, is accepted"
            )
        last[outage.instance] = outage
