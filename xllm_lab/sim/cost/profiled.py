"""A cost model that adds up measured operator times; it knows where they were measured.

    step = layers * (norms + projections + attention + feed-forward) + embedding + final norm + head + sampler

What acts on single tokens sees all tokens of the batch at once, padded to the captured graph that is replayed;
attention sees the batch as it is; head and sampler see one row for each sequence, as vLLM asks the head for a row of
every request in a batch, finished prompt or not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xllm_lab.errors import ConfigError, ProfileError
from xllm_lab.model_spec import ModelSpec
from xllm_lab.sim.cost import Batch, Price, Prices
from xllm_lab.sim.cost.exchanges import Exchanges, Links
from xllm_lab.sim.cost.interpolation import Floats, Line, bracket
from xllm_lab.sim.cost.profile_bundle import ProfileBundle
from xllm_lab.sim.cost.profiled_attention import Attention, DecodeTime
from xllm_lab.sim.cost.routed import refuse_routing
from xllm_lab.sim.cost.sharding import Sharding
from xllm_lab.sim.experts.routing import Routing

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
# Every tile of a tensor core's matrix product has a multiple of so many rows: PTX ISA, `mma.m16n8k16` (bf16).
TILE_TOKENS = 16
_FEED_FORWARD = ("gate_up_proj", "act_fn", "down_proj")


class _Decoding(NamedTuple):
    """Everything about a batch of so many decodes that does not depend on their lengths."""

    other_us: float
    attention: DecodeTime
    is_extrapolated: bool


class ProfiledCost:
    """Operator times of a bundle, for one instance of a model.

    Experts are divided over all devices of all instances: whole ones with expert parallelism, else each is cut, which
    moves and computes as much where tokens choose evenly. Their table is of one device: a token in it is as many rows
    as it has experts.

    Args:
        links: what joins so many devices; the bundle has no time for that.
        data_parallel: instances that share the experts, each with batches of its own; see `together`.
        expert_parallel: devices over which whole experts are spread: all, or 1.

    Raises:
        ProfileError: an operator that the model has is missing, or one is there that we do not know.
        ConfigError: several devices without `links`; or parallelism that the model cannot have.
    """

    def __init__(
        self,
        bundle: ProfileBundle,
        model: ModelSpec,
        *,
        links: Links | None = None,
        data_parallel: int = 1,
        expert_parallel: int = 1,
    ) -> None:
        sharding = Sharding(tensor=bundle.tensor_parallel, data=data_parallel, expert=expert_parallel)
        sharding.refuse_if_impossible(model)
        if data_parallel > 1 and model.experts is None:
            raise ConfigError(
                f"data_parallel is {data_parallel}; instances of {model.name}, which has no experts, share nothing, so "
                "1 is accepted, and any number of instances"
            )
        if bundle.tensor_parallel * data_parallel > 1 and links is None:
            raise ConfigError(
                f"{bundle.folder}: tensor parallelism of {bundle.tensor_parallel} and data parallelism of "
                f"{data_parallel} need the link between the devices"
            )
        _refuse_operators(bundle, model)
        self._model, self._sharding = model, sharding
        self._num_devices = bundle.tensor_parallel * data_parallel
        self._exchanges = None
        if links is not None:
            self._exchanges = Exchanges(
                model=model, links=links, tensor=sharding.tensor, data=sharding.data, expert=sharding.expert
            )
        self._routing: Routing | None = None
        self._layers = model.num_layers
        self._on_tokens = [
            (calls * self._layers, _line(bundle.dense[name]))
            for name, calls in CALLS_PER_LAYER.items()
            if name in bundle.dense
        ] + [(1, _line(bundle.dense[name])) for name in ONCE_PER_STEP]
        self._measured_tokens = sorted(bundle.dense["embedding"])
        self._on_rows = [_line(bundle.per_sequence[name]) for name in PER_SEQUENCE]
        self._experts = _by_tokens(bundle.moe)
        self._expert_tokens = list(self._experts)
        self._attention = Attention(bundle.attention, bundle.skew)
        self._most_tokens = min(line.knots[-1] for _, line in self._on_tokens)
        self._most_rows = min(line.knots[-1] for line in self._on_rows)
        self._tokens_us: dict[int, float] = {}
        self._rows_us: dict[int, float] = {}
        self._decoding: dict[tuple[int, int | None], _Decoding] = {}

    def step(self, batch: Batch) -> Price:
        decodes = batch.num_decodes
        if not batch.prefills:
            at = self._decode(decodes, batch.graph_tokens)
            mean_kv = batch.decode_kv_tokens / decodes
            us = at.other_us + self._layers * at.attention.us(mean_kv, batch.max_decode_kv_tokens)
            return Price(us, at.is_extrapolated or mean_kv > at.attention.line.knots[-1])
        tokens, rows = batch.num_tokens, batch.num_seqs
        attention_us, is_outside = self._attention_us(batch)
        us = self._other_us(batch.graph_tokens or tokens, rows) + self._layers * attention_us
        return Price(us, is_outside or tokens > self._most_tokens or rows > self._most_rows)

    def together(self, batches: Sequence[Batch]) -> Price:
        """A step that a data-parallel group takes together, and the slowest device ends.

        In a graph all are padded to it; else each computes its own, as vLLM pads across a group only to replay
        (`coordinate_batch_across_dp`). Instances without a batch have no tokens.
        """
        if self._sharding.data == 1:
            (alone,) = batches
            return self.step(alone)
        most = max(batch.num_tokens for batch in batches)
        graph_tokens = batches[0].graph_tokens
        assert all(b.graph_tokens == graph_tokens for b in batches), "a group steps in one graph, or eagerly"
        if graph_tokens is not None:
            tokens = [graph_tokens] * len(batches)
            shared_us = self._shared_us(float(graph_tokens))
        else:
            tokens = [batch.num_tokens for batch in batches]
            shared_us = self._shared_us(sum(tokens) / self._sharding.data)
        us, is_outside = 0.0, most > self._most_tokens
        for batch, own in zip(batches, tokens, strict=True):
            attention_us, beyond = self._attention_us(batch)
            us = max(us, self._own_us(own) + self._head_us(batch.num_seqs) + self._layers * attention_us)
            is_outside |= beyond or batch.num_seqs > self._most_rows
        return Price(us + shared_us, is_outside)

    def _attention_us(self, batch: Batch) -> tuple[float, bool]:
        decodes = batch.num_decodes
        mean_kv = batch.decode_kv_tokens / decodes if decodes else 0.0
        if batch.prefills:
            return self._attention.mixed(batch.prefills, decodes, mean_kv, batch.max_decode_kv_tokens)
        alone = self._attention.decodes(decodes)
        is_outside = alone.is_extrapolated or mean_kv > alone.line.knots[-1]
        return alone.us(mean_kv, batch.max_decode_kv_tokens), is_outside

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        assert not batch.prefills, "only decodes repeat themselves"
        at = self._decode(batch.num_decodes, batch.graph_tokens)
        steps = np.arange(num_steps)
        mean_kv = (batch.decode_kv_tokens + batch.num_decodes * steps) / batch.num_decodes
        max_kv = (batch.max_decode_kv_tokens + steps).astype(np.float64)
        us = at.other_us + self._layers * at.attention.us_at(mean_kv, max_kv)
        return Prices(us, (mean_kv > at.attention.line.knots[-1]) | at.is_extrapolated)

    def _decode(self, decodes: int, graph_tokens: int | None) -> _Decoding:
        found = self._decoding.get((decodes, graph_tokens))
        if found is None:
            attention = self._attention.decodes(decodes)
            is_outside = attention.is_extrapolated or decodes > self._most_tokens or decodes > self._most_rows
            other_us = self._other_us(graph_tokens or decodes, decodes)
            found = self._decoding[decodes, graph_tokens] = _Decoding(other_us, attention, is_outside)
        return found

    def _other_us(self, tokens: int, rows: int) -> float:
        """All but attention; padding of a graph is among the tokens, and never attends."""
        on_tokens = self._tokens_us.get(tokens)
        if on_tokens is None:
            on_tokens = self._tokens_us[tokens] = self._own_us(tokens) + self._shared_us(float(tokens))
        return on_tokens + self._head_us(rows)

    def _own_us(self, tokens: int) -> float:
        """What acts on a device's own tokens."""
        padded = self._whole_tiles(tokens)
        return sum(calls * line(padded) for calls, line in self._on_tokens)

    def _whole_tiles(self, tokens: int) -> int:
        """Matrix products compute whole tiles: sizes that share one cost alike, and a line between them would not."""
        whole = -(-tokens // TILE_TOKENS) * TILE_TOKENS
        above = bisect_left(self._measured_tokens, tokens)
        return whole if above == len(self._measured_tokens) else min(whole, self._measured_tokens[above])

    def _head_us(self, rows: int) -> float:
        found = self._rows_us.get(rows)
        if found is None:
            found = self._rows_us[rows] = sum(line(rows) for line in self._on_rows)
        return found

    def _shared_us(self, tokens: float) -> float:
        """Experts, and what devices exchange, where each instance of the group has so many tokens."""
        us = 0.0 if self._exchanges is None else self._exchanges.us(tokens)
        if self._model.experts is None:
            return us
        if self._routing is None:
            return us + self._even_us(tokens)
        return us + self.experts_us(*self._routing.peak(tokens * self._sharding.data))

    def _even_us(self, tokens: float) -> float:
        """Experts, when tokens choose theirs evenly: each device has its share of them, and of all rows."""
        experts = self._model.experts
        assert experts is not None, "experts of a model without any"
        everyones = tokens * self._sharding.data
        activated = experts.num_activated(everyones) / self._num_devices
        return experts.num_layers * self._layer_us(everyones / self._num_devices, activated)

    def experts_us(self, rows_L: Floats, activated_L: Floats) -> float:
        """What a step spends in experts, each layer waiting for its most loaded device.

        Args:
            rows_L: of that device, a token counting once for each of its experts there. Shape [layers with experts], or
                fewer layers, which stand for all.
            activated_L: its experts that have a row.
        """
        experts = self._model.experts
        assert experts is not None, "experts of a model without any"
        tokens, activated = (rows_L / experts.num_per_token).tolist(), activated_L.tolist()
        total_us = sum(self._layer_us(n, e) for n, e in zip(tokens, activated, strict=True))
        return total_us * (experts.num_layers / len(tokens))

    def route(self, routing: Routing | None) -> None:
        """Price steps from now on with experts that are routed to so; None: evenly.

        Raises:
            ConfigError: experts that are not spread over as many devices.
        """
        refuse_routing(routing, self._model, self._sharding)
        self._routing = routing
        self._tokens_us.clear()
        self._decoding.clear()

    def _layer_us(self, tokens: float, activated: float) -> float:
        """Experts of a layer on a device that has the rows of so many tokens."""
        shares = bracket(self._expert_tokens, tokens, extrapolate=True)
        return sum(share * self._experts[at](activated) for at, share in shares)


def _line(times: Mapping[int, float]) -> Line:
    return Line(*zip(*sorted(times.items()), strict=True))


def _by_tokens(moe: Mapping[tuple[float, int], float]) -> dict[float, Line]:
    """tokens -> line over activated experts."""
    rows: dict[float, dict[int, float]] = {}
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
