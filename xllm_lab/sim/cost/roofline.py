"""A cost model of hardware figures and model shapes alone. It needs no measurement, and so nobody knows its error yet.

Each operator takes the longer of its arithmetic and its bytes, each at the rate that real kernels reach, and
`kernel_us` on top. Matrix multiplications see all tokens of a batch, attention each sequence; tensor and expert
parallelism add collectives. (Williams, Waterman and Patterson, Roofline, CACM 2009.)

All layers are added up when the model is made. What depends on the number of tokens is kept once computed; attention of
decodes is linear in their context; so a step costs a few additions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from xllm_lab.hardware import Device
from xllm_lab.model_spec import PRECISIONS, GroupedAttention, LatentAttention, Matmul, ModelSpec, Precision
from xllm_lab.sim.cost import Batch, CostModel, Price, Prices
from xllm_lab.sim.cost.collectives import collectives
from xllm_lab.sim.cost.host import Hosted, HostOverhead
from xllm_lab.sim.cost.interpolation import Floats
from xllm_lab.sim.cost.routed import refuse_routing
from xllm_lab.sim.cost.sharding import Sharding, kv_blocks_that_fit
from xllm_lab.sim.experts.routing import Routing

# Bytes a vector operator moves per number of a token: of 2 bytes, so many times read or written.
_NORM_BYTES = 2 * 4  # the residual and its update in, their sum and its norm out
_ACTIVATION_BYTES = 2 * 3  # gate and up in, their product out
# Vector operations per number: squared, summed, scaled, weighted; negated, exponentiated, added, divided, multiplied.
_NORM_FLOPS, _ACTIVATION_FLOPS = 4, 5
_SAMPLER_BYTES = 2 + 4 * 3  # a logit is read once as it comes, then as fp32: scaled, exponentiated, drawn from
_MEMO_SIZE = 1 << 16


class Operator(NamedTuple):
    """One operator, in all layers that have it. Times are of one device, in microseconds.

    Attributes:
        flops_us: arithmetic, per token.
        weights_us: reading what does not depend on the number of tokens.
        bytes_us: reading and writing activations, per token.
    """

    name: str
    flops_us: float
    weights_us: float
    bytes_us: float


class Ceilings:
    """The sum over operators of the longer of arithmetic and bytes: convex and piecewise linear in the tokens.

    Sorted by the number of tokens from which arithmetic decides, so that one look-up replaces the loop.
    """

    def __init__(self, operators: Sequence[Operator]) -> None:
        def turn(op: Operator) -> float:
            return op.weights_us / (op.flops_us - op.bytes_us) if op.flops_us > op.bytes_us else math.inf

        ordered = sorted(operators, key=turn)
        self._turns = [turn(op) for op in ordered]
        self._lines = []
        for k in range(len(ordered) + 1):
            computing, reading = ordered[:k], ordered[k:]
            slope = math.fsum((*(op.flops_us for op in computing), *(op.bytes_us for op in reading)))
            self._lines.append((math.fsum(op.weights_us for op in reading), slope))

    def us(self, tokens: int) -> float:
        """Microseconds for so many tokens."""
        constant, slope = self._lines[bisect_right(self._turns, tokens)]
        return constant + slope * tokens


class StepParts(NamedTuple):
    """What a step consists of, in microseconds: kernels, collectives, and the least time its launches take."""

    compute_us: float
    communication_us: float
    launch_us: float


class RooflineCost:
    """Satisfies `CostModel`."""

    note = "computed from hardware figures, not measured: its error on this machine is unknown"

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        *,
        sharding: Sharding = Sharding(),  # noqa: B008 frozen
        precision: Precision = PRECISIONS["bf16"],
    ) -> None:
        sharding.refuse_if_impossible(spec)
        self._device, self._spec, self._sharding, self._precision = device, spec, sharding, precision
        self._hbm_us = 1e6 / (device.hbm_bytes_per_s * device.hbm_frac)
        *body, self._head = self._matmuls()
        self._operators = (*body, *self._vectors())
        self._body, self._tail = Ceilings(self._operators), Ceilings((self._head,))
        num_kernels = _num_kernels(spec, precision)
        self._kernels_us, self._launches_us = num_kernels * device.kernel_us, num_kernels * device.launch_us
        self._attention_launches_us = spec.num_layers * device.launch_us
        self._tensor_group = collectives(device, sharding.tensor)
        self._expert_group = collectives(device, sharding.expert)
        self._set_attention()
        self._memo: dict[tuple[int, int, bool, int | None], StepParts] = {}
        self._routing: Routing | None = None

    def step(self, batch: Batch) -> Price:
        fixed, kv_tokens = self._fixed(batch), batch.decode_kv_tokens + batch.num_decodes
        us = self._total(fixed, self._prefill_us(batch), kv_tokens)
        return Price(us if us > fixed.launch_us else fixed.launch_us)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        fixed, first = self._fixed(batch), batch.decode_kv_tokens + batch.num_decodes
        kv_tokens = first + batch.num_decodes * np.arange(num_steps)
        us = np.maximum(self._total(fixed, 0.0, kv_tokens), fixed.launch_us)
        return Prices(us, np.zeros(num_steps, dtype=np.bool_))

    def together(self, batches: Sequence[Batch]) -> Price:
        """A step of the data-parallel instances, each with its own batch; see `GroupCost`."""
        if self._sharding.data == 1:
            (alone,) = batches
            return self.step(alone)
        graph = batches[0].graph_tokens
        routed = sum(b.num_tokens for b in batches) if graph is None else graph * self._sharding.data
        own_us, launch_us, most, most_logits = 0.0, 0.0, 0, 0
        for batch in batches:
            tokens, logits, launches_us = self._launched(batch)
            kv_tokens = batch.decode_kv_tokens + batch.num_decodes
            attention_us = self._prefill_us(batch) + self._decode_kv_us * kv_tokens
            own_us = max(own_us, self._own_us(tokens, logits) + attention_us)
            launch_us, most, most_logits = max(launch_us, launches_us), max(most, tokens), max(most_logits, logits)
        us = own_us + self._experts_us(routed) + self._communication_us(most, most_logits)
        return Price(us if us > launch_us else launch_us)

    def parts(self, batch: Batch) -> StepParts:
        """Where the time of `step` goes."""
        fixed = self._fixed(batch)
        kv_tokens = batch.decode_kv_tokens + batch.num_decodes
        attention_us = self._decode_kv_us * kv_tokens + self._prefill_us(batch)
        return fixed._replace(compute_us=fixed.compute_us + attention_us)

    def operators(self) -> tuple[Operator, ...]:
        """Everything but attention, experts and collectives."""
        return (*self._operators, self._head)

    def _total(self, fixed: StepParts, prefill_us: float, kv_tokens: Any) -> Any:
        return (fixed.compute_us + fixed.communication_us + prefill_us) + self._decode_kv_us * kv_tokens

    def _fixed(self, batch: Batch) -> StepParts:
        """Everything but attention."""
        tokens = batch.num_decodes
        for chunk in batch.prefills:
            tokens += chunk.num_tokens
        key = (tokens, batch.num_logits, not batch.prefills, batch.graph_tokens)
        found = self._memo.get(key)
        if found is None:
            if len(self._memo) >= _MEMO_SIZE:
                self._memo.clear()
            found = self._memo[key] = self._fixed_parts(*key)
        return found

    def _fixed_parts(self, tokens: int, logits: int, is_decode: bool, graph_tokens: int | None) -> StepParts:
        tokens, logits, launch = self._launches(tokens, logits, is_decode, graph_tokens)
        compute = self._kernels_us
        compute += self._body.us(tokens) + self._experts_us(tokens * self._sharding.data)
        if logits:
            compute += self._tail.us(logits)
        return StepParts(compute, self._communication_us(tokens, logits), launch)

    def _launched(self, batch: Batch) -> tuple[int, int, float]:
        return self._launches(batch.num_tokens, batch.num_logits, not batch.prefills, batch.graph_tokens)

    def _launches(self, tokens: int, logits: int, is_decode: bool, graph_tokens: int | None) -> tuple[int, int, float]:
        """Tokens and logits that are computed, padding included, and what launching takes at least."""
        if graph_tokens is None:
            return tokens, logits, self._launches_us
        # The attention of prompts, whose lengths differ from step to step, is launched between pieces of graph.
        launch = 0.0 if is_decode else self._attention_launches_us
        return graph_tokens, graph_tokens if is_decode else logits, launch

    def _own_us(self, tokens: int, logits: int) -> float:
        """What an instance computes on its own tokens, attention excepted."""
        return self._kernels_us + self._body.us(tokens) + (self._tail.us(logits) if logits else 0.0)

    def _matmuls(self) -> Iterator[Operator]:
        for m in self._spec.matmuls:
            yield self._matmul(m)

    def _matmul(self, m: Matmul) -> Operator:
        spec, precision = self._spec, self._precision
        dtype, size = (precision.matrix_dtype, precision.weight_bytes) if m.is_quantized else ("bf16", 2.0)
        part = self._sharding.part(m, spec)
        params = m.num_params * part
        # One side of the matrix is whole on every device, the other divided.
        whole = spec.hidden_size if spec.hidden_size in (m.inputs, m.outputs) else min(m.inputs, m.outputs)
        numbers = m.count * (whole + (m.inputs + m.outputs - whole) * part)
        moved = 2.0 * numbers
        if m.name == "head":
            moved += spec.vocab_size * part * _SAMPLER_BYTES
        flops_us = 2.0 * params / self._device.flops_per_s(dtype) * 1e6
        return Operator(m.name, flops_us, params * size * self._hbm_us, moved * self._hbm_us)

    def _vectors(self) -> Iterator[Operator]:
        """Norms and activations, on the vector units."""
        spec, s = self._spec, self._sharding
        normed = spec.num_layers * 2 * spec.hidden_size
        gated = sum(m.outputs * m.count for m in spec.matmuls if m.name.endswith("gate_up_proj")) / 2
        if e := spec.experts:
            gated += e.num_per_token * e.intermediate_size * e.num_layers
        flops_us = 1e6 / self._device.vector_flops_per_s
        yield Operator("norms", normed * _NORM_FLOPS * flops_us, 0.0, normed * _NORM_BYTES * self._hbm_us)
        gated /= s.tensor
        yield Operator(
            "activations", gated * _ACTIVATION_FLOPS * flops_us, 0.0, gated * _ACTIVATION_BYTES * self._hbm_us
        )

    def _experts_us(self, routed: int) -> float:
        """Routed experts, of so many tokens of all instances: those that get one are read, each computes k times."""
        e, s = self._spec.experts, self._sharding
        if e is None:
            return 0.0
        if self._routing is not None:
            return self.experts_us(*self._routing.peak(routed))
        if s.expert > 1:
            held = self._sharding.experts_per_device(self._spec)
            # Copies share their expert's tokens, as if there were that many experts.
            alike = e._replace(num_experts=held * s.expert)
            activated, part = alike.num_activated(routed) / s.expert, 1.0 / s.expert
        else:
            # Each instance has all experts, and its own tokens.
            activated, part = e.num_activated(routed / s.data) / s.tensor, 1.0 / s.tensor / s.data
        return e.num_layers * self._layer_us(e.num_per_token * routed * part, activated)

    def _layer_us(self, rows: float, activated: float) -> float:
        """Experts of a layer on a device that computes so many rows, with so many experts."""
        e = self._spec.experts
        assert e is not None, "experts of a model without any"
        peak = self._device.flops_per_s(self._precision.matrix_dtype)
        flops_us = 2.0 * e.params_per_expert * rows / peak * 1e6
        moved = 2.0 * rows * 2 * (e.hidden_size + e.intermediate_size)
        weights = activated * e.params_per_expert * self._precision.weight_bytes
        return max(flops_us, (weights + moved) * self._hbm_us)

    def experts_us(self, rows_L: Floats, activated_L: Floats) -> float:
        """What a step spends in experts, each layer waiting for its most loaded device.

        Args:
            rows_L: of that device, a token counting once for each of its experts there. Shape [layers with experts], or
                fewer layers, which stand for all.
            activated_L: its experts that have a row.
        """
        e = self._spec.experts
        assert e is not None, "experts of a model without any"
        layers = zip(rows_L.tolist(), activated_L.tolist(), strict=True)
        return sum(self._layer_us(n, a) for n, a in layers) * (e.num_layers / len(rows_L))

    def route(self, routing: Routing | None) -> None:
        """Price steps from now on with experts that are routed to so; None: evenly.

        Raises:
            ConfigError: experts that are not spread over as many devices.
        """
        refuse_routing(routing, self._spec, self._sharding)
        self._routing = routing
        self._memo.clear()

    def _communication_us(self, tokens: int, logits: int) -> float:
        spec, s = self._spec, self._sharding
        group, hidden_bytes = self._tensor_group, spec.hidden_size * 2.0
        reduce_us = group.all_reduce_us(tokens * hidden_bytes)
        us = spec.num_layers * reduce_us + spec.num_dense_layers * reduce_us
        if logits:
            us += group.all_gather_us(logits * spec.vocab_size / s.tensor * 2.0)
        if (e := spec.experts) is None:
            return us
        if s.expert == 1:
            return us + e.num_layers * reduce_us
        # Each device of a tensor group sends its part of the tokens to their experts, takes back the results, and
        # the group gathers them.
        sent = tokens / s.tensor * e.num_per_token * spec.hidden_size
        dispatch = self._expert_group.all_to_all_us(sent * self._precision.activation_bytes)
        combine = self._expert_group.all_to_all_us(sent * 2.0)
        return us + e.num_layers * (dispatch + combine + group.all_gather_us(tokens / s.tensor * hidden_bytes))

    def _set_attention(self) -> None:
        a, layers, s = self._spec.attention, self._spec.num_layers, self._sharding
        heads = a.num_heads // s.tensor
        flops_us = layers * 1e6 / self._device.flops_per_s("bf16")
        self._kv_us = s.kv_bytes_per_token(self._spec, self._precision) * self._hbm_us
        self._prefill_pair_us = a.prefill_flops(heads) * flops_us
        self._expand_us = a.expansion_flops(heads) * flops_us if isinstance(a, LatentAttention) else 0.0
        self._decode_pair_us = a.decode_flops(heads) * flops_us
        self._decode_kv_us = max(self._decode_pair_us, self._kv_us)

    def _prefill_us(self, batch: Batch) -> float:
        us = 0.0
        for new, computed in batch.prefills:
            pairs = new * (computed + 0.5 * (new + 1))
            # A few rows behind a long context, as those that verify drafts, are computed as decodes are.
            pairs_us = min(self._prefill_pair_us * pairs + self._expand_us * computed, self._decode_pair_us * pairs)
            us += max(pairs_us, self._kv_us * (computed + new))
        return us


def _num_kernels(spec: ModelSpec, precision: Precision) -> int:
    """Kernels of a step that compute, counted as serving engines fuse them: additions with norms, gate with up."""
    if isinstance(spec.attention, GroupedAttention):
        # norm, qkv, rotation, cache write, attention, output; queries and keys normalised apart
        attention, inputs = 6 + 2 * spec.is_qk_normed, 2
    else:
        # norm, q_a, norm, q_b, kv_a, norm, rotation, cache write, absorbing, attention, expanding, output
        attention, inputs = 12, 3
    is_dynamic = precision.activation_bytes < 2  # inputs of quantised matrices are quantised by a kernel each
    per_layer = attention + is_dynamic * inputs
    mlp = 3 + is_dynamic * 2
    num = spec.num_layers * (per_layer + 1) + spec.num_dense_layers * mlp
    if e := spec.experts:
        # router, top k, sorting tokens, gate and up, activation, down, weighing and adding up
        num += e.num_layers * (7 + is_dynamic * 2)
        num += e.num_layers * mlp * any(m.name.startswith("shared_") for m in spec.matmuls)
    # embedding, last norm, head, sampler
    return num + 4


def roofline_cost(
    hardware: Device,
    spec: ModelSpec,
    *,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    expert_parallel: int = 1,
    precision: Precision = PRECISIONS["bf16"],
    host: HostOverhead = HostOverhead(),  # noqa: B008 frozen
) -> CostModel:
    """What a step of `spec` on so many devices takes, host included.

    Raises:
        ConfigError: the model cannot be divided so, does not fit, or multiplies in a format the device does not know.
    """
    kv_blocks_that_fit(
        hardware,
        spec,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        expert_parallel=expert_parallel,
        precision=precision,
        block_size=1,
    )
    sharding = Sharding(tensor=tensor_parallel, data=data_parallel, expert=expert_parallel)
    return Hosted(RooflineCost(hardware, spec, sharding=sharding, precision=precision), host)
