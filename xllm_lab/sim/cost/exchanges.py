"""What the devices of an instance, and of a group of instances, exchange in a step: activations of 2 bytes a number.

Dense layers sum over the devices of tensor parallelism, after attention and after the feed-forward. A group's
instances meet in the layers with experts, as vLLM's default backend does it (`all2all_backend`
allgather_reducescatter):

    tensor 1              gather over the group, experts, reduce and scatter over it
    tensor, experts whole  each device gives its part of the tokens, gathers over all of them, reduces and scatters
                          over all, and its instance gathers the parts (`use_sequence_parallel_moe`)
    tensor, experts cut    gather over the group, experts, reduce and scatter over it, sum over the instance
    no group              sum over the instance: every device has all of its tokens already
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xllm_lab.model_spec import ModelSpec
from xllm_lab.sim.cost.collectives import Collectives

# Of so many devices.
Links = Callable[[int], Collectives]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanges:
    """Of a model on `tensor` devices an instance and `data` instances.

    Attributes:
        expert: devices over which whole experts are spread; 1 if each is cut over all of them.
    """

    model: ModelSpec
    links: Links
    tensor: int = 1
    data: int = 1
    expert: int = 1

    def us(self, tokens: float) -> float:
        """All of a step, each instance having so many tokens, or the mean of them."""
        num_bytes, layers = 2.0 * tokens * self.model.hidden_size, self.model.num_layers
        num_experts = 0 if self.model.experts is None else self.model.experts.num_layers
        us = num_experts * self._in_experts_us(num_bytes)
        if self.tensor > 1:
            us += (layers + layers - num_experts) * self.links(self.tensor).all_reduce_us(num_bytes)
        return us

    def _in_experts_us(self, num_bytes: float) -> float:
        tensor, data = self.tensor, self.data
        if data == 1:
            return self.links(tensor).all_reduce_us(num_bytes) if tensor > 1 else 0.0
        if tensor > 1 and self.expert > 1:
            part, everyone = num_bytes / tensor, self.links(tensor * data)
            us = everyone.all_gather_us(part) + everyone.reduce_scatter_us(part)
            return us + self.links(tensor).all_gather_us(part)
        group = self.links(data)
        us = group.all_gather_us(num_bytes) + group.reduce_scatter_us(num_bytes)
        return us + self.links(tensor).all_reduce_us(num_bytes) if tensor > 1 else us
