"""Cost models: what a step computes -> microseconds.

A cost model prices a whole batch, never a sum of single requests: matrix multiplications see all tokens at once,
attention sees each sequence. It sees the batch as sums, so that its price does not depend on how a host keeps its
requests, and so that many steps of one decoding batch can be priced at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from xllm_lab.step_time import Chunk


class Batch(NamedTuple):
    """What one step computes. A chunk of one token is a decode: kernels do not ask why it is one.

    Attributes:
        prefills: chunks of two tokens or more, in packing order.
        num_decodes: chunks of one token.
        decode_kv_tokens: sum over the decodes of their tokens in KV before the step.
        max_decode_kv_tokens: the largest of these; 0 without decodes.
        num_logits: rows the model's head is asked for.
        graph_tokens: size of the captured graph that runs it, in decodes if it has nothing else; None: it runs eagerly.
    """

    prefills: tuple[Chunk, ...]
    num_decodes: int
    decode_kv_tokens: int
    max_decode_kv_tokens: int
    num_logits: int
    graph_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + sum(c.num_tokens for c in self.prefills)

    @property
    def num_seqs(self) -> int:
        return self.num_decodes + len(self.prefills)

    def later(self, num_steps: int) -> Batch:
        """The same requests after `num_steps` more steps that computed as many tokens of each."""
        prefills, num_decodes, kv_tokens, longest, num_logits, graph_tokens = self
        later = tuple([Chunk(n, computed + n * num_steps) for n, computed in prefills])
        kv_tokens += num_decodes * num_steps
        return Batch(later, num_decodes, kv_tokens, longest + num_steps, num_logits, graph_tokens)


def batch_of(chunks: Iterable[Chunk], num_logits: int) -> Batch:
    """The batch that these chunks make."""
    prefills: list[Chunk] = []
    num_decodes = kv = longest = 0
    for chunk in chunks:
        if chunk.num_tokens > 1:
            prefills.append(chunk)
        else:
            num_decodes += 1
            kv += chunk.num_computed_tokens
            longest = max(longest, chunk.num_computed_tokens)
    return Batch(tuple(prefills), num_decodes, kv, longest, num_logits)


class Price(NamedTuple):
    """Predicted time of a step.

    Attributes:
        us: the mean over steps like this one.
        is_extrapolated: the batch lies outside what the model was calibrated on.
        std_us: standard error of `us`, which grows away from what was calibrated; 0 from a model that knows none. Not
            the scatter of single steps around their mean: that averages out over a run, and this does not.
    """

    us: float
    is_extrapolated: bool = False
    std_us: float = 0.0


class Prices(NamedTuple):
    """Predicted times of consecutive steps, as `Price` has them; arrays of shape [steps]."""

    us: npt.NDArray[np.float64]
    is_extrapolated: npt.NDArray[np.bool_]
    std_us: npt.NDArray[np.float64] | float = 0.0


class CostModel(Protocol):
    def step(self, batch: Batch) -> Price:
        """Predicted time of a step, more than 0, or the simulated clock would stall."""
        ...

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        """Prices of `batch.later(0), ... batch.later(num_steps - 1)`, a batch of decodes only.

        Bit for bit what `step` says of each: use the same additions, multiplications, divisions, minima and maxima in
        the same order, and nothing else that numpy may round its own way (no sums over an axis, no exp, no powers;
        square roots are exact enough everywhere).
        """
        ...


class GroupCost(CostModel, Protocol):
    """Of instances that share their experts, and so step together."""

    def together(self, batches: Sequence[Batch]) -> Price:
        """Predicted time of a step of all of them: that of the slowest.

        Args:
            batches: of those that have one, at least one, all with the same `graph_tokens`; the others compute nothing.
        """
        ...
