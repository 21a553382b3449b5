"""No tier below the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.cache import CachePlan, CacheView


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOnly:
    """Nothing is copied: what the device evicts is computed again."""

    decides: ClassVar[str] = "cache"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {}

    def decide(self, view: CacheView) -> CachePlan:
        return CachePlan(reason="device only")


DEVICE_ONLY = DeviceOnly()
