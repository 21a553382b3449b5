"""One full configuration of an instance: what a host runs, a tuner searches, and an export translates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.catalog import configured, make_batch_policy, make_shapes_policy, policy_name, values_of
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One full configuration of an instance."""

    instance: InstanceConfig
    policy: BatchPolicy
    shapes: ShapesPolicy = field(default_factory=lambda: EAGER)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `candidate` turns it back."""
        return {
            "instance": values_of(self.instance),
            "policy": {"name": policy_name(self.policy), **values_of(self.policy)},
            "shapes": {"name": policy_name(self.shapes), **values_of(self.shapes)},
        }


def candidate(value: dict[str, Any]) -> Candidate:
    """Inverse of `Candidate.as_dict`; ConfigError for unknown fields or values."""
    policy, shapes = dict(value["policy"]), dict(value.get("shapes", {"name": "eager"}))
    return Candidate(
        instance=configured(InstanceConfig, value["instance"]),
        policy=make_batch_policy(policy.pop("name"), policy),
        shapes=make_shapes_policy(shapes.pop("name"), shapes),
    )


def num_changes(one: Candidate, other: Candidate) -> int:
    """Fields in which two configurations differ; another policy counts as one."""
    a, b = one.as_dict(), other.as_dict()
    differing = sum(int(a["instance"][k] != b["instance"][k]) for k in a["instance"])
    for x, y in ((a["policy"], b["policy"]), (a["shapes"], b["shapes"])):
        differing += sum(int(x[k] != y[k]) for k in x) if x["name"] == y["name"] else 1
    return differing
