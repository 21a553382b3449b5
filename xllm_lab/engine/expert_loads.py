"""How many rows each expert of each layer computed, counted over steps."""

# Shapes: L layers, E experts

from __future__ import annotations

from torch import Tensor

from xllm_lab.engine.layer_config import Mixture


class ExpertLoads:
    """A `Runner.expert_observer` that adds up. Layers without experts have none.

    Attributes:
        layers: numbers of the layers with experts, in order: rows of the lists below.
        num_steps, num_tokens: counted so far; what only pads a step is not.
        last: of the last step, a row a layer, a number an expert. Each row adds up to the step's tokens times the
            experts of a token.
        total: of all steps.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.layers = tuple(sorted(mixture.layers))
        self.num_steps = self.num_tokens = 0
        self.last = [[0] * mixture.routing.num_experts for _ in self.layers]
        self.total = [list(row) for row in self.last]

    def __call__(self, num_tokens: int, rows_LE: Tensor) -> None:
        """Reads the step's counters, for which the host waits."""
        every: list[list[int]] = rows_LE.tolist()
        self.last = [every[layer] for layer in self.layers]
        for total, row in zip(self.total, self.last, strict=True):
            total[:] = [a + b for a, b in zip(total, row, strict=True)]
        self.num_steps += 1
        self.num_tokens += num_tokens
