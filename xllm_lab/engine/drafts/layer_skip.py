"""A draft model out of the target itself: some of its layers, and all weights shared (Zhang et al., 2023,
arXiv 2309.08168)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xllm_lab.engine.model import DecoderModel
from xllm_lab.errors import ConfigError

PREFIX = "layers:"


def kept_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """Layers that "layers:0-9,28-29" names, in their order, both ends included.

    Raises:
        ConfigError: it is none of that form, or names layers twice, backwards, or that the model does not have.
    """
    accepted = f"accepted: rising layers of 0 to {num_layers - 1}, as in '{PREFIX}0-{num_layers // 2},{num_layers - 1}'"
    kept: list[int] = []
    for part in spec.removeprefix(PREFIX).split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if found is None:
            raise ConfigError(f"draft_model is {spec!r}, {part!r} names no layers; {accepted}")
        first, last = int(found[1]), int(found[2] or found[1])
        if not (kept[-1] if kept else -1) < first <= last < num_layers:
            raise ConfigError(f"draft_model is {spec!r}, {part!r} is out of place; {accepted}")
        kept += range(first, last + 1)
    return tuple(kept)


def skip_layers(model: DecoderModel, keep: Sequence[int]) -> DecoderModel:
    """The model with the layers of `keep` alone. It has no weights of its own."""
    return model.around([model.layers[i] for i in keep], model.norm_D)
