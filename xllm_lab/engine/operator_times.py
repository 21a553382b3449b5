"""How long each operator of a model takes, inside real steps.

A step is cut into laps: each operator's lasts from the end of the one before it to its own end, so that nothing of the
step is lost between them. Called alone and again and again, an operator would find its weights in the cache, where no
step finds them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

from xllm_lab.engine.clock import timer_ns
from xllm_lab.engine.device import Device
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.mixture import MixtureLayer
from xllm_lab.engine.model import DecoderModel, HeadAttention, Mlp
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.timed_experts import Activation, TimedMixture
from xllm_lab.errors import ConfigError

# Our operators as rows of a profile bundle (`sim/cost/profile_bundle.py`). What a step does before its first layer is
# counted with the embedding, and writing keys and values with the attention that reads them.
ROWS: Mapping[str, str] = {
    "embed": "embedding",
    "rope_angles": "embedding",
    "rms_norm": "layernorm",
    "add_rms_norm": "layernorm",
    "qkv": "qkv_proj",
    "head_norm": "qk_norm",
    "rope": "rotary_emb",
    "reshape_and_cache": "attention",
    "paged_attention": "attention",
    "out": "o_proj",
    "gate_up": "gate_up_proj",
    "swiglu": "act_fn",
    "down": "down_proj",
    "mixture": "moe",
    "head": "lm_head",
    "argmax": "sampler",
}
# A row is one call, and each of these is called so often in a layer; queries' and keys' norms are one call of ours.
_CALLS_PER_LAYER = {
    "layernorm": 2,
    "qkv_proj": 1,
    "qk_norm": 2,
    "rotary_emb": 1,
    "attention": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
    "moe": 1,
}


class TimedSteps:
    """Steps of a model, or of its first layers, with the time of each operator.

    Args:
        num_layers: as many of the model's layers; their times are alike.
        timer: "wall" or "cpu", as in `clock`.

    Attributes:
        activation: of the model's experts.

    Raises:
        ConfigError: attention is latent, or only some of the layers have experts; a bundle has no tables of these.
    """

    def __init__(
        self, model: DecoderModel, device: Device, *, num_layers: int, num_blocks: int, block_size: int, timer: str
    ) -> None:
        self._device, self._num_layers = device, num_layers
        self._read_ns = timer_ns(timer)
        self._laps: list[tuple[str, int]] = []
        self.activation = Activation()
        pool = KvPool(
            replace(model.config, num_layers=num_layers),
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=model.dtype,
            device=device,
        )
        self._argmax = self._watched("argmax", model.ops.argmax)
        self._runner = Runner(_with_each_operator(model, num_layers, self.activation, self._watched), pool, device)

    def run(self, chunks: Sequence[SequenceChunk]) -> dict[str, float]:
        """Microseconds of one call of each row, in one step."""
        self._laps = []
        self._device.synchronize()
        start_ns = self._read_ns()
        self._argmax(self._runner.run(chunks))
        return self._rows(start_ns)

    def _watched(self, operator: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            result = work(*given, **named)
            self._device.synchronize()
            self._laps.append((ROWS[operator], self._read_ns()))
            return result

        return watched

    def _rows(self, start_ns: int) -> dict[str, float]:
        sums: Counter[str] = Counter()
        norms = [i for i, (row, _) in enumerate(self._laps) if row == "layernorm"]
        for i, (row, end_ns) in enumerate(self._laps):
            # The last norm comes before the head, and is no layer's.
            sums["final_layernorm" if i == norms[-1] else row] += end_ns - start_ns
            start_ns = end_ns
        return {row: ns / 1e3 / (_CALLS_PER_LAYER.get(row, 0) * self._num_layers or 1) for row, ns in sums.items()}


def profile_fails(model: DecoderModel) -> str | None:
    """Why a bundle has no tables for a model, or None."""
    sparse = sum(isinstance(layer.mlp, MixtureLayer) for layer in model.layers)
    if sparse not in (0, len(model.layers)):
        return f"{sparse} of {len(model.layers)} layers have experts; accepted for a profile: all or none"
    if not isinstance(model.layers[0].attention, HeadAttention):
        return "the model's attention is latent; accepted for a profile: grouped-query attention"
    return None


def _with_each_operator(
    model: DecoderModel,
    num_layers: int,
    activation: Activation,
    watched: Callable[[str, Callable[..., Any]], Callable[..., Any]],
) -> DecoderModel:
    """The model's first layers over the same weights, every operator replaced by `watched(name, operator)`."""
    ops: dict[str, Any] = {
        f.name: watched(f.name, getattr(model.ops, f.name)) for f in fields(model.ops) if f.name in ROWS
    }
    if (reason := profile_fails(model)) is not None:
        raise ConfigError(reason)
    layers: list[Any] = []
    for layer in model.layers[:num_layers]:
        attention: Any = layer.attention
        mlp: Any = layer.mlp
        attention = attention._replace(qkv=watched("qkv", attention.qkv), out=watched("out", attention.out))
        if isinstance(layer.mlp, Mlp):
            mlp = mlp._replace(gate_up=watched("gate_up", mlp.gate_up), down=watched("down", mlp.down))
        else:
            mlp = TimedMixture(mlp, model.ops, activation, watched)
        layers.append(layer._replace(attention=attention, mlp=mlp))
    other: Any = copy.copy(model)
    other.ops = replace(model.ops, **ops)
    other.layers = layers
    other._embed = watched("embed", model._embed)
    other._head = watched("head", model._head)
    return cast("DecoderModel", other)
