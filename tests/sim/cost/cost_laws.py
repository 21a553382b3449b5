"""What any cost model owes: decode steps priced together are the steps priced one by one, to the last bit."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.sim.cost import Batch, CostModel
from xllm_lab.step_shape import decide_shape, decode_shape
from xllm_lab.step_time import Chunk

chunks = st.builds(Chunk, num_tokens=st.integers(2, 9000), num_computed_tokens=st.integers(0, 40_000))


def graphs_for(num_tokens: int) -> st.SearchStrategy[int | None]:
    """None, or a size that holds so many."""
    return st.none() | st.integers(num_tokens, num_tokens + 50)


def in_graph(batch: Batch, policy: ShapesPolicy) -> Batch:
    """A batch of decodes in the graph that the policy has for it, of an instance for 600."""
    where = InstanceConfig(max_seqs_per_batch=600, max_tokens_per_batch=2048)
    return batch._replace(graph_tokens=decide_shape(policy, decode_shape(batch.num_decodes, where)).num_tokens)


@st.composite
def decode_batches(draw: st.DrawFn, max_seqs: int = 600) -> Batch:
    """One or more decodes."""
    num_decodes = draw(st.integers(1, max_seqs))
    longest = draw(st.integers(1, 40_000))
    rest = draw(st.integers(num_decodes - 1, (num_decodes - 1) * longest))
    return Batch((), num_decodes, longest + rest, longest, num_decodes, draw(graphs_for(num_decodes)))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Decodes, prefills, or both; in a graph or not."""
    prefills = tuple(draw(st.lists(chunks, max_size=4)))
    decodes = draw(decode_batches() | st.just(Batch((), 0, 0, 0, 0)) if prefills else decode_batches())
    num_logits = decodes.num_decodes + draw(st.integers(0, len(prefills)))
    made = decodes._replace(prefills=prefills, num_logits=num_logits)
    return made._replace(graph_tokens=draw(graphs_for(made.num_tokens))) if prefills else made


def check_decode_steps(cost: CostModel, batch: Batch, num_steps: int) -> None:
    """`decode_steps` says bit for bit what `step` says of each step."""
    together = cost.decode_steps(batch, num_steps)
    alone = [cost.step(batch.later(i)) for i in range(num_steps)]
    assert together.us.dtype == np.float64
    assert together.is_extrapolated.dtype == np.bool_
    assert together.us.shape == together.is_extrapolated.shape == (num_steps,)
    assert together.us.tolist() == [price.us for price in alone]
    assert together.is_extrapolated.tolist() == [price.is_extrapolated for price in alone]
