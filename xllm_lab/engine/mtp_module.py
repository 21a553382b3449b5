"""A model's own multi-token prediction module (DeepSeek-V3 technical report, arXiv 2412.19437, section 2.2): read from
the checkpoint, of a decoder of our family.

    h'  = M [norm_h(h of token t); norm_e(embedding of token t + 1)]        M: "projection", of 2 D columns
    h'' = one decoder layer over h', with KV of its own
    token t + 2 by the target's head over norm(h'')

Which h is meant differs, and so do names and the order of the halves of M. Ours are those of vLLM (`mimo_mtp.py`,
`deepseek_mtp.py`, `qwen3_next_mtp.py` and the models that feed them, 2025-11), but for two things: vLLM zeroes the
embedding beside token 0, which neither the report nor MiMo's own code does; and deeper drafts read h'' of the module as
the report's next module would, where vLLM's DeepSeek path reads h of the target again.
"""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: D hidden size

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops.linear import Linear
from xllm_lab.engine.weights import Shape, layer_shapes, of_shapes, refuse_tensors
from xllm_lab.errors import ModelError


class Style(NamedTuple):
    """How checkpoints write modules.

    Attributes:
        prefix: of the first module's names; "{layers}" is the number of the model's layers, where it is one more.
        numbered: how the names of modules begin, as a pattern with the module's number.
        layer: what the decoder layer's names have behind the prefix.
        token_norm, hidden_norm, projection, norm: names behind the prefix.
        hidden_first: the order of the projection's halves.
        reads_normed: h of the target is what its last norm returns; else what that norm reads.
        chains_normed: so is the module's own.
    """

    prefix: str
    numbered: str
    layer: str
    token_norm: str
    hidden_norm: str
    projection: str
    norm: str
    hidden_first: bool
    reads_normed: bool
    chains_normed: bool


STYLES = {
    "deepseek": Style(
        prefix="model.layers.{layers}.",
        numbered=r"model\.layers\.(\d+)\.",
        layer="",
        token_norm="enorm",
        hidden_norm="hnorm",
        projection="eh_proj",
        norm="shared_head.norm",
        hidden_first=False,
        reads_normed=True,
        chains_normed=False,
    ),
    "mimo": Style(
        prefix="model.mtp_layers.0.",
        numbered=r"model\.mtp_layers\.(\d+)\.",
        layer="",
        token_norm="token_layernorm",
        hidden_norm="hidden_layernorm",
        projection="input_proj",
        norm="final_layernorm",
        hidden_first=True,
        reads_normed=False,
        chains_normed=True,
    ),
    "qwen": Style(
        prefix="mtp.",
        numbered=r"mtp\.layers\.(\d+)\.",
        layer="layers.0.",
        token_norm="pre_fc_norm_embedding",
        hidden_norm="pre_fc_norm_hidden",
        projection="fc",
        norm="norm",
        hidden_first=False,
        reads_normed=True,
        chains_normed=True,
    ),
}
# The shared embedding and head, which exporters may write again.
_COPIES = ("embed_tokens.weight", "head.weight")


class MtpWeights(NamedTuple):
    """The first module of a checkpoint.

    Attributes:
        style: a name of `STYLES`.
        weights: by their names behind the style's prefix.
        num_unused: tensors of further modules, which we do not run: deeper drafts use the first one again, as vLLM's
            and xLLM's do.
    """

    style: str
    weights: dict[str, Tensor]
    num_unused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpModule:
    """A module in memory, whose embedding and head are the target's.

    Its `projection` has the hidden state's half first. `from_target` and `from_own` make that half of what comes out of
    the last norm of the target and of the module.

    Attributes:
        style: a name of `STYLES`.
        body: one layer and the norm behind it.
        token_norm_D: of the embedding.
        num_unused: as `MtpWeights`.
    """

    style: str
    body: DecoderModel
    projection: Linear
    token_norm_D: Tensor
    from_target: Rescaled | Normed
    from_own: Rescaled | Normed
    num_unused: int


class Normed(NamedTuple):
    """The hidden state is what comes out of that last norm, and is normed once more by `weight_D`."""

    weight_D: Tensor


class Rescaled(NamedTuple):
    """The hidden state is what that last norm read, whose root mean square is gone already: only the weights differ."""

    gain_D: Tensor


def take_mtp(weights: dict[str, Tensor], config: ModelConfig, *, source: str) -> MtpWeights | None:
    """Takes prediction modules out of a checkpoint's tensors; None if it has none.

    Raises:
        ModelError: a tensor of the first module is missing, unexpected or of the wrong shape.
    """
    for name, style in STYLES.items():
        prefix = style.prefix.format(layers=config.num_layers)
        if f"{prefix}{style.projection}.weight" in weights:
            return _take(weights, config, name, prefix, source)
    return None


def _take(weights: dict[str, Tensor], config: ModelConfig, style: str, prefix: str, source: str) -> MtpWeights:
    first = config.num_layers if style == "deepseek" else 0
    numbers = {name: _number(STYLES[style], name) for name in weights}
    taken = {name: weights.pop(name) for name, i in numbers.items() if name.startswith(prefix) or i >= first}
    shapes = {prefix + name: shape for name, shape in module_shapes(config, style).items()}
    others = {n for n in taken if numbers[n] > first}
    strangers = [n for n in taken if n not in shapes and n not in others and not n.endswith(_COPIES)]
    refuse_tensors(source, "is not part of a prediction module that we run", strangers)
    own = of_shapes(taken, shapes, source=source)
    return MtpWeights(style, {n.removeprefix(prefix): w for n, w in own.items()}, len(others))


def _number(style: Style, name: str) -> int:
    found = re.match(style.numbered, name)
    return -1 if found is None else int(found[1])


def module_shapes(config: ModelConfig, style: str) -> dict[str, Shape]:
    """Every tensor of a module, by its name behind the style's prefix. Its layer has experts if the model's have."""
    s, D = STYLES[style], config.hidden_size
    return {
        f"{s.token_norm}.weight": (D,),
        f"{s.hidden_norm}.weight": (D,),
        f"{s.projection}.weight": (D, 2 * D),
        f"{s.norm}.weight": (D,),
        **{s.layer + name: shape for name, shape in layer_shapes(config, is_sparse=config.mixture is not None).items()},
    }


def mtp_module(taken: MtpWeights, target: DecoderModel, *, source: str) -> MtpModule:
    """The module beside its target, which lends it embedding and head. Takes over the weights.

    Raises:
        ModelError: a norm before the hidden state has a weight of 0, so that its input cannot be told from its output.
    """
    style, weights = STYLES[taken.style], taken.weights

    def take(name: str) -> Tensor:
        return weights.pop(f"{name}.weight")

    token_norm_D, hidden_norm_D = take(style.token_norm).to(target.device), take(style.hidden_norm).to(target.device)
    norm_D = take(style.norm).to(target.device)
    projection_D2D = take(style.projection)
    if not style.hidden_first:
        projection_D2D = projection_D2D.roll(target.config.hidden_size, 1)
    layer = target.take_layer(weights, style.layer)
    assert not weights, f"weights nobody took: {sorted(weights)}"

    def after(last_norm_D: Tensor, is_normed: bool) -> Rescaled | Normed:
        if is_normed:
            return Normed(hidden_norm_D)
        if not bool(last_norm_D.all()):
            raise ModelError(f"{source}: a norm whose input the prediction module reads has a weight of 0")
        return Rescaled((hidden_norm_D.float() / last_norm_D.float()).to(target.dtype))

    return MtpModule(
        style=taken.style,
        body=target.around([layer], norm_D),
        projection=target.ops.linear(projection_D2D.to(target.device)),
        token_norm_D=token_norm_D,
        from_target=after(target.norm_D, style.reads_normed),
        from_own=after(norm_D, style.chains_normed),
        num_unused=taken.num_unused,
    )
