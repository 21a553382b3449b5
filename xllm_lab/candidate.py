"""One full configuration of an instance: what a host runs, a tuner searches, and an export translates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import configured, values_of
from xllm_lab.policies.of_instance import Policies, policies_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One full configuration of an instance."""

    instance: InstanceConfig
    policies: Policies

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `candidate` turns it back."""
        return {"instance": values_of(self.instance), "policies": self.policies.as_dict()}


def candidate(value: dict[str, Any]) -> Candidate:
    """Inverse of `Candidate.as_dict`; ConfigError for unknown fields or values."""
    return Candidate(
        instance=configured(InstanceConfig, value["instance"]),
        policies=policies_from(value["policies"]),
    )


def num_changes(one: Candidate, other: Candidate) -> int:
    """Fields in which two configurations differ; another policy counts as one."""
    a, b = one.as_dict(), other.as_dict()
    parts = [(a["instance"], b["instance"]), *((mine, b["policies"][d]) for d, mine in a["policies"].items())]
    return sum(sum(x[k] != y[k] for k in x) if x.get("name") == y.get("name") else 1 for x, y in parts)
