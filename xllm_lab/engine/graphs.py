"""Steps captured once for each size and kind, replayed for every step that fits: a cache of graphs over shared memory.

    shapes policy: size, or eager -> capture, if it is the first of its key -> fill the inputs -> replay -> logits

All graphs share one pool: the workspace, cut to their size, and the inputs. What the pool must hold is known from the
policy before anything is captured; a pool that does not fit is refused. After that no address in it changes.
"""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: T tokens of a graph, D hidden size, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.device import Device
from xllm_lab.engine.expert_parallel import ALL_GATHER, ALL_TO_ALL
from xllm_lab.engine.graph_backends import Recorder, recorder_for
from xllm_lab.engine.graph_inputs import Chunk, GraphInputs, InputMemory
from xllm_lab.engine.kv import KvLayout
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.ops.tape import recording
from xllm_lab.engine.workspace import Workspace, most_logits
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import ceil_div
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.step_shape import graph_sizes


class Key(NamedTuple):
    """What tells graphs apart: tokens, padding included, and whether each is a sequence's only one."""

    num_tokens: int
    is_decode: bool


class PoolPlan(NamedTuple):
    """What all graphs together need, known before the first is captured.

    Attributes:
        tokens, logits: of the largest graph; the largest eager step counts, since it runs in the same memory.
        sequences: of the largest graph.
        blocks_per_sequence: of the longest context.
        workspace_bytes, input_bytes: the pool's two parts.
    """

    tokens: int
    logits: int
    sequences: int
    blocks_per_sequence: int
    workspace_bytes: int
    input_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.workspace_bytes + self.input_bytes


@dataclass(slots=True)
class GraphCounts:
    """What captures came to; what became of steps, `step_shape.ShapeCounts` says.

    Attributes:
        captures: of graphs.
        capture_us: they took so long, wall time.
        kernels, calls: of the graphs in the cache: kernels replayed, and calls from Python that start them.
    """

    captures: int = 0
    capture_us: int = 0
    kernels: int = 0
    calls: int = 0


class _Graph(NamedTuple):
    replay: Callable[[], object]
    inputs: GraphInputs
    normed_TD: Tensor
    logits_TV: Tensor | None  # of a decoding graph, whose head is in it


class Graphs:
    """The graphs of one runner.

    Attributes:
        plan: the pool's.
        counts: since it was made.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_pool: KvLayout,
        device: Device,
        workspace: Workspace,
        *,
        config: InstanceConfig,
        policy: ShapesPolicy,
        pool_bytes: int | None = None,
    ) -> None:
        """Plans the pool and takes it.

        Args:
            kv_pool: has one block more than the configuration, which pads.
            pool_bytes: what the pool may take; None: as much as the device has free.

        Raises:
            ConfigError: the pool does not fit, or the device cannot capture what serves the model.
            PolicyError: the policy plans something illegal.
        """
        assert kv_pool.num_blocks == config.num_kv_blocks + 1, "a block to pad with"
        refuse_what_nothing_captures(model, device)
        self._model, self._kv_pool, self._workspace = model, kv_pool, workspace
        self._decode_sizes = graph_sizes(policy, config, is_decode=True)
        longest_table = kv_pool.blocks_per_sequence
        sizes = [*self._decode_sizes, *graph_sizes(policy, config, is_decode=False)]
        _refuse_longer_than_exchanged(model, device, sizes)
        self.plan = _plan(workspace, config, longest_table, sizes)
        _refuse(self.plan, device, pool_bytes)
        self._recorder: Recorder = recorder_for(device)
        self._memory = InputMemory(
            tokens=self.plan.tokens,
            sequences=self.plan.sequences,
            blocks_per_sequence=self.plan.blocks_per_sequence,
            block_size=kv_pool.block_size,
            padding_block=kv_pool.padding_block,
            device=device,
        )
        workspace.reserve(tokens=self.plan.tokens, logits=self.plan.logits)
        workspace.is_fixed = True
        self._cache: dict[Key, _Graph] = {}
        self.counts = GraphCounts()

    def warm(self) -> None:
        """Captures the decoding graphs, the largest first. Others are captured when a step needs them."""
        for size in self._decode_sizes:
            self._capture(Key(size, True), [], [])

    def run(self, size: int, tokens: Sequence[int], chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor | None]:
        """Computes a step in the graph of that size, which is captured if need be.

        Returns:
            What the head reads, a row for each token; and logits of the same rows, if the graph had its head in it.
            Both stand until the next step.
        """
        key = Key(size, len(tokens) == len(chunks))
        graph = self._cache.get(key)
        if graph is None:
            graph = self._capture(key, tokens, chunks)
        else:
            self._memory.fill(graph.inputs, tokens, chunks, is_decode=key.is_decode)
            graph.replay()
        return graph.normed_TD, graph.logits_TV

    def describe(self) -> dict[str, Any]:
        """Counts and pool, for a manifest."""
        return {**asdict(self.counts), "pool_bytes": self.plan.num_bytes}

    def _capture(self, key: Key, tokens: Sequence[int], chunks: Sequence[Chunk]) -> _Graph:
        """Records the step that makes it necessary, and has run it."""
        started_ns = time.perf_counter_ns()
        inputs = self._memory.of(key.num_tokens, is_decode=key.is_decode)
        self._memory.fill(inputs, tokens, chunks, is_decode=key.is_decode)
        if self._recorder.rehearses:
            self._compute(inputs, has_head=key.is_decode)
        tape = self._recorder.open(whole=key.is_decode)
        with recording(tape):
            normed_TD, logits_TV = self._compute(inputs, has_head=key.is_decode)
        program = tape.close()
        graph = self._cache[key] = _Graph(program, inputs, normed_TD, logits_TV)
        self.counts.captures += 1
        self.counts.kernels += tape.num_kernels
        self.counts.calls += tape.num_calls
        self.counts.capture_us += (time.perf_counter_ns() - started_ns) // 1000
        return graph

    def _compute(self, inputs: GraphInputs, *, has_head: bool) -> tuple[Tensor, Tensor | None]:
        """As `run` returns it. Once more over the same inputs changes nothing."""
        with torch.inference_mode():
            normed_TD = self._model.run_layers(
                inputs.token_T,
                inputs.position_T,
                batch=inputs.batch,
                kv=self._kv_pool.layers,
                workspace=self._workspace,
            )
            return normed_TD, self._model.logits(normed_TD, self._workspace) if has_head else None


def _plan(workspace: Workspace, config: InstanceConfig, longest_table: int | None, sizes: Sequence[int]) -> PoolPlan:
    longest = min(config.max_tokens_per_batch, config.num_kv_tokens)  # of an eager step
    most_seqs = min(config.max_seqs_per_batch, config.max_tokens_per_batch)
    tokens = max([longest, *sizes])
    logits = most_logits(config)
    # A wasted row of a request that ended may be one token longer than the context.
    blocks = longest_table or min(ceil_div(config.max_model_len + 1, config.block_size), config.num_kv_blocks)
    return PoolPlan(
        tokens=tokens,
        logits=logits,
        sequences=most_seqs,
        blocks_per_sequence=blocks,
        workspace_bytes=workspace.bytes_for(tokens=tokens, logits=logits),
        input_bytes=InputMemory.bytes_for(tokens=tokens, sequences=most_seqs, blocks_per_sequence=blocks),
    )


def refuse_what_nothing_captures(model: DecoderModel, device: Device) -> None:
    """An accelerator's graph cannot hold what the host decides by looking at results; a tape of a CPU can. Nobody's can
    hold shapes that other ranks decide.
    """
    if (experts := model.experts) is not None and experts.has_own_tokens:
        raise ConfigError("graphs where ranks share experts and each has its own tokens; accepted: shapes 'eager'")
    if device.streams is None:
        return
    is_fused = model.ops.experts is not None and model.ops.experts.exchange is not None
    if experts is not None and experts.dispatch == ALL_TO_ALL and not is_fused:
        raise ConfigError(
            f"graphs with expert_dispatch {ALL_TO_ALL!r}, whose counts {device.name} cannot capture; accepted: shapes "
            f"'eager', or {ALL_GATHER!r}"
        )
    by = {op: served.by for op, served in model.ops.served.items()}
    loops = by.get("grouped_matmul") == "torch"
    # PyTorch's attention launches and allocates: more than a replaced call may.
    replaces = device.streams.has_task_groups and by["paged_attention"] == "torch"
    if loops or replaces:
        op = "grouped_matmul" if loops else "paged_attention"
        raise ConfigError(f"graphs with {op} by 'torch', which {device.name} cannot capture; accepted: shapes 'eager'")


def _refuse_longer_than_exchanged(model: DecoderModel, device: Device, sizes: Sequence[int]) -> None:
    """Fused kernels that exchange experts' rows take so many; beyond those the host looks at counts."""
    experts, of_experts = model.experts, model.ops.experts
    if device.streams is None or experts is None or of_experts is None or of_experts.exchange is None:
        return
    most = of_experts.exchange.most_rows * experts.group.size
    if max(sizes, default=0) > most:
        raise ConfigError(f"a graph of {max(sizes)} tokens with expert_dispatch {ALL_TO_ALL!r}; accepted: up to {most}")


def _refuse(plan: PoolPlan, device: Device, pool_bytes: int | None) -> None:
    free_bytes = device.memory().free_bytes
    allowed, whose = (free_bytes, f"free on {device.name}") if pool_bytes is None else (pool_bytes, "graph_pool_bytes")
    if plan.num_bytes > allowed:
        raise ConfigError(
            f"graphs of up to {plan.tokens} tokens and {plan.logits} rows of logits need a pool of {plan.num_bytes} "
            f"bytes, {plan.workspace_bytes} to compute in and {plan.input_bytes} of inputs; accepted: {allowed} "
            f"({whose}), or smaller max_tokens_per_batch and max_seqs_per_batch"
        )
