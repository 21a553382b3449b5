"""Multi-token prediction on a machine that is known by its cost model: what a draft layer takes.

As xLLM's `mtp_worker_impl.cpp` runs it: the layer catches up with what was accepted, two rows of each sequence, and
proposes further tokens one at a time. The model's own pass over all of them is a step like any other.
"""

from __future__ import annotations

from dataclasses import replace

from xllm_lab.draft_time import Drafted, DraftLoad, DraftTime, fit_draft_time
from xllm_lab.model_spec import Matmul, ModelSpec
from xllm_lab.sim.cost import CostModel, batch_of
from xllm_lab.step_time import Chunk

METHOD = "mtp"
# One layer's attention is a small part of what it takes, so one context stands for all.
_CONTEXT_TOKENS = 2048
_NUM_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128)
_DEPTHS = (1, 2, 4)


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


def drafting_us(layer: CostModel, num_requests: int, depth: int, context: int = _CONTEXT_TOKENS) -> float:
    """Of catching up and `depth - 1` further passes. `layer` prices steps of `draft_spec`."""
    catch_up, propose = (
        layer.step(batch_of([Chunk(rows, context)] * num_requests, rows * num_requests)).us for rows in (2, 1)
    )
    return catch_up + (depth - 1) * propose


def mtp_draft_time(layer: CostModel) -> DraftTime:
    """`drafting_us` as the sum of terms that policies and simulations know."""
    return fit_draft_time(
        Drafted((DraftLoad(METHOD, num, depth),), drafting_us(layer, num, depth))
        for num in _NUM_REQUESTS
        for depth in _DEPTHS
    )
