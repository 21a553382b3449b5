"""No graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.shapes import ShapePlan, ShapeView, eagerly


@dataclass(frozen=True, slots=True, kw_only=True)
class Eager:
    """Every step runs kernel by kernel, and none is padded."""

    decides: ClassVar[str] = "shapes"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {"enable_graph": False}

    def decide(self, view: ShapeView) -> ShapePlan:
        return eagerly("no graphs")


EAGER = Eager()
