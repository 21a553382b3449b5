"""The policies of one instance, one for each decision that it takes; whoever lists decisions reads the fields here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from xllm_lab.errors import ConfigError
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.cache.device_only import DEVICE_ONLY
from xllm_lab.policies.catalog import make_policy, policy_name, values_of
from xllm_lab.policies.draft import DraftPolicy
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.experts import ExpertsPolicy
from xllm_lab.policies.experts.static import STATIC
from xllm_lab.policies.pages import PagesPolicy
from xllm_lab.policies.pages.on_demand import ON_DEMAND
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER


@dataclass(frozen=True, slots=True)
class Policies:
    """One policy for each decision, in a field of the decision's name. The defaults do nothing.

    Raises:
        ConfigError: a policy in the place of another decision.
    """

    batch: BatchPolicy
    _: KW_ONLY
    shapes: ShapesPolicy = EAGER
    draft: DraftPolicy = OFF
    pages: PagesPolicy = ON_DEMAND
    cache: CachePolicy = DEVICE_ONLY
    experts: ExpertsPolicy = STATIC

    def __post_init__(self) -> None:
        for decides, policy in self:
            if policy.decides != decides:
                raise ConfigError(f"{policy_name(policy)} decides {policy.decides!r}; accepted here: {decides!r}")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Each decision's name with its policy."""
        return ((decides, getattr(self, decides)) for decides in DECISIONS)

    @property
    def drafts(self) -> bool:
        """Whether anything is ever drafted."""
        return self.draft != OFF

    @property
    def copies(self) -> bool:
        """Whether KV ever leaves the device."""
        return self.cache != DEVICE_ONLY

    @property
    def captured_by(self) -> ShapesPolicy:
        """Which steps an engine captures before it serves."""
        return self.shapes

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data; `policies_from` turns it back."""
        return {decides: {"name": policy_name(policy), **values_of(policy)} for decides, policy in self}


DECISIONS = tuple(f.name for f in fields(Policies))
# What need not be said: every decision but the first has a policy that does nothing.
BESIDE = DECISIONS[1:]


def policies_from(value: Mapping[str, Mapping[str, Any]]) -> Policies:
    """Inverse of `Policies.as_dict`; a decision that is missing has the policy that does nothing.

    Raises:
        ConfigError: an unknown decision, policy or knob, a value that is not accepted, or no batch policy.
    """
    refuse_other_decisions(value)
    if "batch" not in value:
        raise ConfigError("there is no batch policy; accepted: one")
    made = {}
    for decides, described in value.items():
        knobs = dict(described)
        made[decides] = make_policy(decides, knobs.pop("name"), knobs)
    return Policies(**made)


def refuse_other_decisions(named: Iterable[str], accepted: Sequence[str] = DECISIONS) -> None:
    """ConfigError for a name that is none of these decisions."""
    for decides in named:
        if decides not in accepted:
            raise ConfigError(f"unknown decision {decides!r} of an instance; accepted: {', '.join(accepted)}")


def not_asked(kv_layout: str) -> dict[str, Any]:
    """What nobody decides where KV lies so, and the policy that does nothing."""
    return {} if kv_layout == "virtual" else {ON_DEMAND.decides: ON_DEMAND}


def refuse_tiers(policies: Policies) -> None:
    """ConfigError where a host that copies nothing is given a cache policy."""
    if policies.cache != DEVICE_ONLY:
        raise ConfigError(f"cache policy {policy_name(policies.cache)} is not served here; accepted: device-only")


def refuse_drafts(policies: Policies) -> None:
    """ConfigError where a host that cannot speculate is given a draft policy."""
    if policies.draft != OFF:
        raise ConfigError(f"draft policy {policy_name(policies.draft)} is not served here; accepted: off")
