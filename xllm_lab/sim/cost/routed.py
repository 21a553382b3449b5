"""Which routings of tokens to experts a cost model takes."""

from __future__ import annotations

from xllm_lab.errors import ConfigError
from xllm_lab.model_spec import ModelSpec
from xllm_lab.sim.cost.sharding import Sharding
from xllm_lab.sim.experts.routing import Routing


def refuse_routing(routing: Routing | None, model: ModelSpec, sharding: Sharding) -> None:
    """Raise ConfigError unless it is of this model's experts, spread so."""
    if routing is None:
        return
    if model.experts is None:
        raise ConfigError(f"a routing to experts is given, and {model.name} has none")
    if sharding.expert == 1:
        raise ConfigError(
            "a routing to experts is given, and none of them is whole on a device; accepted: with expert parallelism"
        )
    if routing.num_devices != sharding.expert:
        raise ConfigError(
            f"a routing to experts on {routing.num_devices} devices, and expert_parallel is {sharding.expert}; "
            "the same number is accepted"
        )
