"""Every instance does both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.roles import RolesPlan, RolesView, changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Colocated:
    """Prompts and decodes share every instance: a request is served where it was sent, to its end."""

    decides: ClassVar[str] = "roles"

    def decide(self, view: RolesView) -> RolesPlan:
        return changes(view, {i.id: "mixed" for i in view.instances}, "everyone serves to the end")
