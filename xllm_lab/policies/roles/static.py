"""Roles that never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import FewerThan, Knob, refuse_below
from xllm_lab.policies.roles import RolesPlan, RolesView, changes, first_split


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """The first instances compute prompts, all others go on from there, whoever is up.

    Attributes:
        num_prefill: how many compute prompts; at least one instance of each kind stays, and a fleet of one does both.
    """

    decides: ClassVar[str] = "roles"

    num_prefill: Annotated[int, Knob(1, 16), FewerThan("instances")] = 1

    def __post_init__(self) -> None:
        refuse_below(1, num_prefill=self.num_prefill)

    def decide(self, view: RolesView) -> RolesPlan:
        return changes(view, first_split(view, self.num_prefill), "as configured")
