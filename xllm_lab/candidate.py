"""One full configuration, of an instance or a fleet: what a host runs, a tuner searches, and an export translates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xllm_lab.fleet_config import FLEET_DECISIONS, FleetConfig, fleet_config
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import configured, policy_name, values_of
from xllm_lab.policies.of_instance import Policies, policies_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One full configuration.

    Attributes:
        instance, policies: of each instance.
        fleet: None is a single instance, without a router.
    """

    instance: InstanceConfig
    policies: Policies
    fleet: FleetConfig | None = None

    def decided(self) -> Iterator[tuple[str, Any]]:
        """Each decision's name with its policy: an instance's, and then its fleet's."""
        yield from self.policies
        if self.fleet is not None:
            yield from self.fleet.decided()

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `candidate` turns it back. Without a fleet it says nothing of one."""
        told = {"instance": values_of(self.instance), "policies": self.policies.as_dict()}
        return told if self.fleet is None else {**told, "fleet": self.fleet.as_dict()}


def candidate(value: Mapping[str, Any]) -> Candidate:
    """Inverse of `Candidate.as_dict`; ConfigError for unknown fields or values."""
    return Candidate(
        instance=configured(InstanceConfig, value["instance"]),
        policies=policies_from(value["policies"]),
        fleet=fleet_config(value["fleet"]) if "fleet" in value else None,
    )


def num_changes(one: Candidate, other: Candidate) -> int:
    """Fields in which two configurations differ; another policy counts as one, and so does a router where none is."""
    mine, others = _parts(one), _parts(other)
    return sum(_num_differing(mine.get(part), others.get(part)) for part in dict.fromkeys((*mine, *others)))


def _parts(one: Candidate) -> dict[str, dict[str, Any]]:
    parts = {"instance": values_of(one.instance)}
    if one.fleet is not None:
        parts["fleet"] = {name: value for name, value in one.fleet.as_dict().items() if name not in FLEET_DECISIONS}
    return parts | {decides: {"name": policy_name(own), **values_of(own)} for decides, own in one.decided()}


def _num_differing(one: dict[str, Any] | None, other: dict[str, Any] | None) -> int:
    if one is None or other is None or one.get("name") != other.get("name"):
        return 1
    return sum(value != other[field] for field, value in one.items())
