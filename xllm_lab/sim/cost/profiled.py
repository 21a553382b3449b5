"""A cost model that adds up measured operator times; it knows where they were measured.

    step = layers * (norms + projections + attention + feed-forward) + embedding + final norm + head + sampler

What acts on single tokens sees all tokens of the batch at once, padded to the captured graph that is replayed;
attention sees the batch as it is; head and sampler see one row for each sequence, as vLLM asks the head for a row of
every request in a batch, finished prompt or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from xllm_lab.errors import ConfigError, ProfileError
from xllm_lab.model_spec import ModelSpec
from xllm_lab.sim.cost import Batch, Price, Prices
from xllm_lab.sim.cost.collectives import Collectives
from xllm_lab.sim.cost.graphs import GraphBuckets
from xllm_lab.sim.cost.interpolation import Line, bracket
from xllm_lab.sim.cost.profile_bundle import ProfileBundle
from xllm_lab.sim.cost.profiled_attention import Attention, DecodeTime

# How often a layer calls an operator that acts on tokens; a row of the table is one call. Norms: before attention and
# before the feed-forward; of queries and of keys.
CALLS_PER_LAYER = {
    "layernorm": 2,
    "qkv_proj": 1,
    "qk_norm": 2,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
ONCE_PER_STEP = ("embedding", "final_layernorm")
PER_SEQUENCE = ("lm_head", "sampler")
_ALWAYS = ("embedding", "layernorm", "qkv_proj", "o_proj", "final_layernorm")
EAGER = GraphBuckets()
_FEED_FORWARD = ("gate_up_proj", "act_fn", "down_proj")


class _Decoding(NamedTuple):
    """Everything about a batch of so many decodes that does not depend on their lengths."""

    other_us: float
    attention: DecodeTime
    is_extrapolated: bool


class ProfiledCost:
    """Operator times of a bundle, for one instance of a model.

    Args:
        graphs: sizes to which the operators on tokens are padded.
        collectives: joins the devices of tensor parallelism; the bundle has no time for that.

    Raises:
        ProfileError: an operator that the model has is missing, or one is there that we do not know.
        ConfigError: tensor parallelism without `collectives`.
    """

    def __init__(
        self,
        bundle: ProfileBundle,
        model: ModelSpec,
        *,
        graphs: GraphBuckets = EAGER,
        collectives: Collectives | None = None,
    ) -> None:
        if bundle.tensor_parallel > 1 and collectives is None:
            raise ConfigError(
                f"{bundle.folder}: tensor parallelism of {bundle.tensor_parallel} needs the link between the devices"
            )
        _refuse_operators(bundle, model)
        self._model = model
        self._graphs = graphs
        self._collectives = collectives
        self._layers = model.num_layers
        self._on_tokens = [
            (calls * self._layers, _line(bundle.dense[name]))
            for name, calls in CALLS_PER_LAYER.items()
            if name in bundle.dense
        ] + [(1, _line(bundle.dense[name])) for name in ONCE_PER_STEP]
        self._on_rows = [_line(bundle.per_sequence[name]) for name in PER_SEQUENCE]
        self._experts = _by_tokens(bundle.moe)
        self._attention = Attention(bundle.attention, bundle.skew)
        self._most_tokens = min(line.knots[-1] for _, line in self._on_tokens)
        self._most_rows = min(line.knots[-1] for line in self._on_rows)
        self._tokens_us: dict[int, float] = {}
        self._rows_us: dict[int, float] = {}
        self._decoding: dict[int, _Decoding] = {}

    def step(self, batch: Batch) -> Price:
        decodes = batch.num_decodes
        if not batch.prefills:
            at = self._decoding.get(decodes) or self._decode(decodes)
            mean_kv = batch.decode_kv_tokens / decodes
            us = at.other_us + self._layers * at.attention.us(mean_kv, batch.max_decode_kv_tokens)
            return Price(us, at.is_extrapolated or mean_kv > at.attention.line.knots[-1])
        tokens, rows = batch.num_tokens, batch.num_seqs
        mean_kv = batch.decode_kv_tokens / decodes if decodes else 0.0
        attention_us, is_outside = self._attention.mixed(batch.prefills, decodes, mean_kv, batch.max_decode_kv_tokens)
        us = self._other_us(tokens, rows) + self._layers * attention_us
        return Price(us, is_outside or tokens > self._most_tokens or rows > self._most_rows)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        assert not batch.prefills, "only decodes repeat themselves"
        at = self._decoding.get(batch.num_decodes) or self._decode(batch.num_decodes)
        steps = np.arange(num_steps)
        mean_kv = (batch.decode_kv_tokens + batch.num_decodes * steps) / batch.num_decodes
        max_kv = (batch.max_decode_kv_tokens + steps).astype(np.float64)
        us = at.other_us + self._layers * at.attention.us_at(mean_kv, max_kv)
        return Prices(us, (mean_kv > at.attention.line.knots[-1]) | at.is_extrapolated)

    def _decode(self, decodes: int) -> _Decoding:
        attention = self._attention.decodes(decodes)
        is_outside = attention.is_extrapolated or decodes > self._most_tokens or decodes > self._most_rows
        self._decoding[decodes] = _Decoding(self._other_us(decodes, decodes), attention, is_outside)
        return self._decoding[decodes]

    def _other_us(self, tokens: int, rows: int) -> float:
        """All but attention."""
        padded = self._graphs.padded(tokens)
        on_tokens = self._tokens_us.get(padded)
        if on_tokens is None:
            on_tokens = sum(calls * line(padded) for calls, line in self._on_tokens)
            on_tokens += self._experts_us(padded) + self._exchange_us(padded)
            self._tokens_us[padded] = on_tokens
        on_rows = self._rows_us.get(rows)
        if on_rows is None:
            on_rows = self._rows_us[rows] = sum(line(rows) for line in self._on_rows)
        return on_tokens + on_rows

    def _experts_us(self, tokens: int) -> float:
        """Feed-forward of the layers with experts, when tokens choose theirs evenly."""
        experts = self._model.experts
        if experts is None:
            return 0.0
        activated = experts.num_activated(tokens)
        shares = bracket(list(self._experts), tokens, extrapolate=True)
        return experts.num_layers * sum(share * self._experts[size](activated) for size, share in shares)

    def _exchange_us(self, tokens: int) -> float:
        """Sums over devices after attention and after the feed-forward, of one activation of 2 bytes a number."""
        if self._collectives is None:
            return 0.0
        return 2 * self._layers * self._collectives.all_reduce_us(2.0 * tokens * self._model.hidden_size)


def _line(times: Mapping[int, float]) -> Line:
    return Line(*zip(*sorted(times.items()), strict=True))


def _by_tokens(moe: Mapping[tuple[int, ...], float]) -> dict[int, Line]:
    """tokens -> line over activated experts."""
    rows: dict[int, dict[int, float]] = {}
    for (tokens, activated), us in sorted(moe.items()):
        rows.setdefault(tokens, {})[activated] = us
    return {tokens: _line(times) for tokens, times in rows.items()}


def _refuse_operators(bundle: ProfileBundle, model: ModelSpec) -> None:
    tables = bundle.folder / f"tp{bundle.tensor_parallel}"
    needed = [*_ALWAYS, *(() if model.experts else _FEED_FORWARD), *(("qk_norm",) if model.is_qk_normed else ())]
    if missing := [name for name in needed if name not in bundle.dense]:
        raise ProfileError(f"{tables / 'dense.csv'}: no rows of {', '.join(missing)}, which {model.name} has")
    if missing := [name for name in PER_SEQUENCE if name not in bundle.per_sequence]:
        raise ProfileError(f"{tables / 'per_sequence.csv'}: no rows of {', '.join(missing)}, which every model has")
    if model.experts and not bundle.moe:
        raise ProfileError(f"{tables / 'moe.csv'}: no such file, and {model.name} has experts")
    for name, known in (("dense", (*CALLS_PER_LAYER, *ONCE_PER_STEP)), ("per_sequence", PER_SEQUENCE)):
        if unknown := sorted(set(getattr(bundle, name)) - set(known)):
            raise ProfileError(f"{tables / name}.csv: layer {unknown[0]!r} is not known; known are {', '.join(known)}")
