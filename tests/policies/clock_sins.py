"""Bad policies that look at a clock or throw dice. Apart from the other sins, whose module must be clean of imports."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tests.policies.fleet_sins import either, to
from tests.policies.sins import everyone, packed
from xllm_lab.policies.api import BatchPlan, BatchView
from xllm_lab.policies.failover import FailoverPlan, FailoverView
from xllm_lab.policies.routing import RoutePlan, RouteView, by_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadsTheClock:
    """Asks what time it is, and ignores the answer. Broken law: clockless."""

    decides: ClassVar[str] = "batch"

    def decide(self, view: BatchView) -> BatchPlan:
        assert time.monotonic_ns() > 0
        return packed(view, everyone(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrowsDice:
    """Draws from the global stream, and ignores what it drew. Broken law: clockless."""

    decides: ClassVar[str] = "batch"

    def decide(self, view: BatchView) -> BatchPlan:
        assert random.random() < 1
        return packed(view, everyone(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrowsNumpyDice:
    """As `ThrowsDice`, where no watch on the standard library sees it. Broken law: clockless."""

    decides: ClassVar[str] = "batch"

    def decide(self, view: BatchView) -> BatchPlan:
        assert np.random.default_rng(0).random() < 1
        return packed(view, everyone(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutesByDice:
    """Draws from the global stream, and ignores what it drew. Broken law: clockless."""

    decides: ClassVar[str] = "route"

    def decide(self, view: RouteView) -> RoutePlan:
        assert random.choice((0, 1)) < 2
        return to(by_id(view.instances)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class FailsOverByTheClock:
    """Asks what time it is, and ignores the answer. Broken law: clockless."""

    decides: ClassVar[str] = "failover"

    def decide(self, view: FailoverView) -> FailoverPlan:
        assert time.time() > 0
        return either(cancels=False)
