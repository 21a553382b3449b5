"""Cost models: `Step -> microseconds`."""

from __future__ import annotations

from typing import Protocol

from xllm_lab.scheduler import Step


class CostModel(Protocol):
    def step_us(self, step: Step) -> float:
        """Predicted time of a step, microseconds; more than 0, or the simulated clock would stall."""
        ...
