"""One full configuration of an instance: what a host runs, a tuner searches, and an export translates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.catalog import configured, make_batch_policy, policy_name, values_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One full configuration of an instance."""

    instance: InstanceConfig
    policy: BatchPolicy

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `candidate` turns it back."""
        return {
            "instance": values_of(self.instance),
            "policy": {"name": policy_name(self.policy), **values_of(self.policy)},
        }


def candidate(value: dict[str, Any]) -> Candidate:
    """Inverse of `Candidate.as_dict`; ConfigError for unknown fields or values."""
    policy = dict(value["policy"])
    return Candidate(
        instance=configured(InstanceConfig, value["instance"]),
        policy=make_batch_policy(policy.pop("name"), policy),
    )


def num_changes(one: Candidate, other: Candidate) -> int:
    """Fields in which two configurations differ; another policy counts as one."""
    a, b = one.as_dict(), other.as_dict()
    parts = [(a["instance"], b["instance"])]
    if a["policy"]["name"] == b["policy"]["name"]:
        parts.append((a["policy"], b["policy"]))
    differing = sum(int(x[k] != y[k]) for x, y in parts for k in x)
    return differing + int(len(parts) == 1)
