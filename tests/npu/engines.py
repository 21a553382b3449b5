"""Engines and runners on the fake device, computed by the references of our operators.

float32 is let through to the fused attention, which a device refuses: then the tokens are the CPU engine's, and no
rounding explains a difference. In bfloat16 the operators' limits are checked as on a device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.fake_cann import operators
from tests.tiny_models import VOCAB_SIZE, tiny_model, write_tiny_model
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.ops.npu import calls, limits  # noqa: F401  (`calls` declares the operators)
from xllm_lab.engine.ops.npu.operators import OPERATORS, check_calls
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.records import Records
from xllm_lab.workload import Workload

# Where the wheel has no function for the shape of a result.
SHAPES = {
    "_npu_fused_infer_attention_score_get_max_workspace": lambda *_, **__: torch.empty(1, dtype=torch.uint8).to("meta"),
    "npu_format_cast": lambda input, _: torch.empty_like(input),
}
NUM_LAYERS = 2
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # the attention wants multiples of 16
WHERE = InstanceConfig(
    max_model_len=400, block_size=128, num_kv_blocks=40, max_seqs_per_batch=6, max_tokens_per_batch=320
)


def install_operators() -> None:
    """Each operator that we declare, and no other: whatever else a model calls fails."""
    operators.install({name: operator.reference for name, operator in OPERATORS.items()}, SHAPES)


def let_float32_through() -> None:
    """And nothing else: calls are not checked, until an engine asks for it."""
    check_calls(on=False)
    limits.ATTENTION_DTYPES = (torch.float32, *limits.HALVES)


@functools.cache
def folder(**changes: Any) -> Path:
    """A tiny checkpoint whose heads the fused attention takes."""
    name = "-".join(f"{k}_{v}" for k, v in changes.items()) or "wide"
    return write_tiny_model(tiny_model() / name.replace("[", "").replace("]", "").replace("'", ""), **WIDE, **changes)


@functools.cache
def engine(device: str, dtype: str = "float32", model: Path | None = None, check_ops: bool = False) -> Engine:
    return Engine(EngineOptions(model=str(model or folder()), device=device, dtype=dtype, check_ops=check_ops))


def served(
    host: Engine,
    workload: Workload,
    where: InstanceConfig = WHERE,
    shapes: str = "eager",
    policy: str = "decode-first",
    **knobs: Any,
) -> tuple[dict[int, list[int]], dict[str, Any] | None]:
    """Output tokens by request, and what became of graphs."""
    records = Records()
    graphs = host.serve(
        workload, where, Policies(make_policy("batch", policy), shapes=make_policy("shapes", shapes, knobs)), records
    )
    return {r.id: r.output_token_ids.tolist() for r in records.requests}, graphs


def runner(device: str, shapes: ShapesPolicy | None = None, dtype: torch.dtype = torch.float32) -> Runner:
    """Over a pool of its own, with the decoding graphs captured if there are to be any."""
    host = engine(device, str(dtype).removeprefix("torch."))
    made = host._runner(WHERE) if shapes is None else host._runner(WHERE, shapes)
    if made.graphs is not None:
        made.run([SequenceChunk([0] * 3, 0, (0,), True)])
        made.graphs.warm()
    return made


class Talk:
    """Sequences, each on blocks of its own, that grow as they are computed."""

    def __init__(self, *prompts: int) -> None:
        self.blocks = [tuple(range(4 * i, 4 * i + 4)) for i in range(len(prompts))]
        self.computed = [0] * len(prompts)
        self.prompts = list(prompts)

    def chunk(self, row: int, num_tokens: int) -> SequenceChunk:
        start = self.computed[row]
        tokens = [(7 * (start + i) + 31 * row + 1) % VOCAB_SIZE for i in range(num_tokens)]
        self.computed[row] += num_tokens
        return SequenceChunk(tokens, start, self.blocks[row], True)

    def prefill(self) -> list[SequenceChunk]:
        return [self.chunk(row, length) for row, length in enumerate(self.prompts)]

    def decode(self, rows: Sequence[int] | None = None) -> list[SequenceChunk]:
        return [self.chunk(row, 1) for row in (range(len(self.prompts)) if rows is None else rows)]
