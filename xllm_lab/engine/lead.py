"""What rank 0 tells the others: the same steps, in the same order, over pools and graphs of the same size.

    open     a run's limits and graphs: make a pool, a workspace and, if steps are captured, graphs
    step     compute these chunks, in a graph or eagerly; then, perhaps, take the tokens that rank 0 draws
    warm     capture the decoding graphs

The scheduler, the policies, the clock and the sampler are rank 0's alone. The others know of a request no more than the
step needs; of a token that was drawn they need the value only if the next step may be planned before it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from xllm_lab.engine.ranks import Ranks
from xllm_lab.engine.runner import SequenceChunk
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import make_policy, policy_name, values_of
from xllm_lab.policies.shapes import ShapesPolicy


class Lead:
    """Rank 0's word to the others; alone, it is silent."""

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks

    def open(self, config: InstanceConfig, shapes: ShapesPolicy) -> None:
        """A run begins, or its step times are measured."""
        if self._ranks is not None:
            described = {"name": policy_name(shapes), "values": values_of(shapes)}
            self._ranks.tell({"do": "open", "config": asdict(config), "shapes": described})

    def step(
        self,
        chunks: Sequence[SequenceChunk],
        graph_tokens: int | None = None,
        *,
        draws: bool = False,
        tells: bool = True,
    ) -> None:
        """A step was launched. `draws`: it goes by `Runner.draw`, not by `Runner.run`; `tells` as there."""
        if self._ranks is not None:
            packed = [[list(c.token_ids), c.num_computed_tokens, list(c.block_table), c.num_logits] for c in chunks]
            how = {"graph_tokens": graph_tokens, "draws": draws, "tells": tells}
            self._ranks.tell({"do": "step", "chunks": packed, **how})

    def warm(self) -> None:
        """The graphs are captured."""
        if self._ranks is not None:
            self._ranks.tell({"do": "warm"})


def opened(message: Mapping[str, Any]) -> tuple[InstanceConfig, ShapesPolicy]:
    """What `Lead.open` told."""
    shapes = message["shapes"]
    return InstanceConfig(**message["config"]), make_policy("shapes", shapes["name"], shapes["values"])


def chunks_of(message: Mapping[str, Any]) -> list[SequenceChunk]:
    """What `Lead.step` told."""
    return [SequenceChunk(*packed) for packed in message["chunks"]]
