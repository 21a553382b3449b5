"""Drafts by a smaller model of the same vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from xllm_lab.engine.device import Device
from xllm_lab.engine.drafts.layer_skip import PREFIX, kept_layers, skip_layers
from xllm_lab.engine.drafts.memory import draft_pool, most_logits, most_tokens
from xllm_lab.engine.drafts.model_proposer import Draw, ModelProposer
from xllm_lab.engine.models import LoadedModel, load_model
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig


def open_draft_model(
    spec: str, target: LoadedModel, *, device: Device, group_size: int = 1, without: Sequence[str] = ()
) -> LoadedModel:
    """The model that a user names to draft for `target`.

    Args:
        spec: "layers:0-9,28-29", some of the target's own layers, which it shares; or a model as `load_model` takes it,
            loaded in the target's dtype.
        group_size: ranks that the target is divided over; a model of its own is whole on the rank that drafts.
        without: implementations of operators not to use.

    Raises:
        ConfigError: layers that the target does not have, or has only a part of; or another vocabulary.
        ModelError: the model cannot be loaded.
    """
    if spec.startswith(PREFIX):
        if group_size > 1:
            raise ConfigError(
                f"draft_model is {spec!r}, and each of {group_size} ranks has a part of the layers; accepted: "
                "tensor_parallel 1, or a draft model of its own"
            )
        model = skip_layers(target.model, kept_layers(spec, target.config.num_layers))
        return dataclasses.replace(target, name=f"{target.name}[{spec}]", config=model.config, model=model)
    loaded = load_model(spec, device=device, dtype=target.model.dtype, without=without)
    if loaded.config.vocab_size != target.config.vocab_size:
        raise ConfigError(
            f"draft model {spec} has a vocabulary of {loaded.config.vocab_size} tokens, {target.name} one of "
            f"{target.config.vocab_size}; accepted: a draft model of the same vocabulary"
        )
    return loaded


class DraftModel:
    """A `Drafter`: a whole model, with a KV pool and a workspace of its own. It runs eagerly.

    Where the device has streams, all that it does is on one beside the target's, from the memory it takes to the drafts
    it makes: prompts that it follows are computed while the target computes them, and in order with all else. Nothing
    has to be waited for but the drafts.
    """

    reads_target = False

    def __init__(self, loaded: LoadedModel, config: InstanceConfig, device: Device) -> None:
        """Raises: ConfigError if its KV does not fit."""
        self._ops, self.max_rows = loaded.model.ops, loaded.config.max_position
        self._streams = device.streams
        with self._beside():
            pool = draft_pool(f"draft model {loaded.name}", loaded.model.config, loaded.model.dtype, config, device)
            self._runner = Runner(loaded.model, pool, device)
            self._runner.workspace.reserve(tokens=most_tokens(config), logits=most_logits(config))
        # On a CPU, a thread of its own would take the core from the target (benchmarks/LOG.md).
        self.fill: Callable[[Sequence[SequenceChunk]], None] | None = None if device.is_host else self._fill

    def run(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        with self._beside():
            return self._runner.run(chunks)

    def argmax(self, logits_RV: Tensor) -> list[int]:
        with self._beside():
            return self._ops.argmax(logits_RV)

    def _fill(self, chunks: Sequence[SequenceChunk]) -> None:
        with self._beside():
            self._runner.fill(chunks)

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._streams is None else self._streams.beside()


def draft_model_proposer(loaded: LoadedModel, config: InstanceConfig, device: Device, draw: Draw) -> ModelProposer:
    """A `Proposer` by "draft_model" for one run.

    Raises:
        ConfigError: its KV does not fit.
    """
    drafter = DraftModel(loaded, config, device)
    return ModelProposer(
        "draft_model", drafter, block_size=config.block_size, draw=draw, max_tokens_per_run=most_tokens(config)
    )
