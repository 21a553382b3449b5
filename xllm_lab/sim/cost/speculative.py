"""Multi-token prediction: a draft layer proposes tokens, the model verifies them in one step.

As xLLM's `mtp_worker_impl.cpp` runs it: the draft catches up with what was accepted, proposes further tokens one at a
time, and the model computes all of them and one more. A prefill runs through the draft too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from xllm_lab.errors import ConfigError
from xllm_lab.model_spec import Matmul, ModelSpec
from xllm_lab.sim.cost import Batch, CostModel, Price, Prices


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """How many tokens are proposed a step, and the probability that the model agrees with each after the last."""

    num_tokens: int = 1
    acceptance_frac: float = 0.7

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or not 0 <= self.acceptance_frac <= 1:
            raise ConfigError(
                f"drafts: num_tokens is {self.num_tokens} and acceptance_frac {self.acceptance_frac}; at least 1, and "
                f"0 to 1, are accepted"
            )

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens that a step adds to a sequence: all that agree up to the first that does not, and one."""
        return math.fsum(self.acceptance_frac**i for i in range(self.num_tokens + 1))


class Speculative:
    """Prices a decode step per token it yields, so that a host that adds one token a step keeps its clock right.

    Args:
        target: verifies `drafts.num_tokens + 1` rows a sequence.
        catch_up: the draft layer on two rows a sequence.
        propose: the draft layer on one.
    """

    def __init__(self, target: CostModel, catch_up: CostModel, propose: CostModel, drafts: Drafts) -> None:
        self._target, self._catch_up, self._propose = target, catch_up, propose
        self._again = drafts.num_tokens - 1
        self._yield = drafts.tokens_per_step

    def step(self, batch: Batch) -> Price:
        target, catch_up = self._target.step(batch), self._catch_up.step(batch)
        is_extrapolated = target.is_extrapolated or catch_up.is_extrapolated
        if batch.prefills:
            return Price(target.us + catch_up.us, is_extrapolated)
        return Price(self._per_token(target.us, catch_up.us, self._propose.step(batch).us), is_extrapolated)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        target, catch_up, propose = (
            cost.decode_steps(batch, num_steps) for cost in (self._target, self._catch_up, self._propose)
        )
        us = self._per_token(target.us, catch_up.us, propose.us)
        return Prices(us, target.is_extrapolated | catch_up.is_extrapolated)

    def _per_token(self, target_us: Any, catch_up_us: Any, propose_us: Any) -> Any:
        return (target_us + catch_up_us + self._again * propose_us) / self._yield


def draft_spec(spec: ModelSpec) -> ModelSpec:
    """DeepSeek's prediction module: one more layer, after a projection of hidden state and embedding, and the head.

    DeepSeek-V3 technical report, arXiv 2412.19437, section 2.2.
    """
    num_sparse = spec.experts.num_layers if spec.experts else 0
    counts = {spec.num_layers: 1, num_sparse: 1} if num_sparse else {spec.num_layers: 1}
    *body, head = spec.matmuls
    layer = tuple(replace(m, count=1) for m in body if m.count in counts)
    join = Matmul("eh_proj", 2 * spec.hidden_size, spec.hidden_size, 1, "none")
    return replace(
        spec,
        num_layers=1,
        experts=spec.experts._replace(num_layers=1) if spec.experts else None,
        matmuls=(join, *layer, head),
        vector_params=spec.vector_params // spec.num_layers,
        num_dense_layers=0 if num_sparse else 1,
    )
