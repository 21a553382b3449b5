"""Drafts by the target's own prediction module.

Row p of the module reads the hidden state of token p and the embedding of token p + 1, and predicts token p + 2. Hidden
states wait in a pool of the target's blocks, beside the module's KV, in the slot of their token:

    the target computes token p      slot p = its hidden state        whoever shares the block shares that, too
    the module computes row p last   slot p + 1 = its own              the next draft's; the target overwrites it

So a slot is right whenever the target's KV there is: after rejected drafts, for prompts in chunks, and for tokens that
the prefix cache supplied. Only the last row of a shared block reads a token behind it, which sharers need not have in
common: their drafts may be worse by it, never wrong.
"""

# Shapes: T packed rows, R rows whose logits are wanted, D hidden size, V vocabulary, S slots of the pool

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xllm_lab.engine.device import Device
from xllm_lab.engine.drafts.memory import draft_pool, most_logits, most_tokens
from xllm_lab.engine.drafts.model_proposer import Draw, ModelProposer
from xllm_lab.engine.models import LoadedModel
from xllm_lab.engine.mtp_module import MtpModule, Normed, Rescaled
from xllm_lab.engine.ops.batch import paged_batch
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.workspace import Rows
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig


class MtpHead:
    """A `Drafter`: a prediction module, with KV, hidden states and a workspace of its own. It runs eagerly."""

    reads_target = True
    fill = None  # it reads hidden states that the target is about to compute

    def __init__(self, module: MtpModule, config: InstanceConfig, device: Device, *, who: str) -> None:
        """Raises: ConfigError if its KV and hidden states do not fit."""
        self._module, self._body, self._device = module, module.body, device
        shape, dtype = self._body.config, self._body.dtype
        self.max_rows = shape.max_position
        self._block_size = config.block_size
        row_bytes = shape.hidden_size * dtype.itemsize
        self._pool = draft_pool(who, shape, dtype, config, device, row_bytes=row_bytes)
        self._hidden_SD = device.zeros((config.num_kv_tokens, shape.hidden_size), dtype)
        self._workspace = self._body.workspace()
        self._workspace.reserve(tokens=most_tokens(config), logits=most_logits(config))
        self._joint_T2D = device.zeros((most_tokens(config), 2 * shape.hidden_size), dtype)

    def observe(self, chunks: Sequence[SequenceChunk], normed_TD: Tensor) -> None:
        """Keeps the target's hidden states of a step, as `Runner.observer` is told them."""
        slots = [slot for chunk in chunks for slot in self._slots(chunk)]
        half_TD = self._hidden_half(self._module.from_target, normed_TD, self._workspace.rows(len(slots)))
        self._hidden_SD.index_copy_(0, self._tensor(slots), half_TD)

    def run(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """As `Runner.run`, of the module's rows: row p of a chunk is computed with token p + 1."""
        queries = [len(c.token_ids) for c in chunks]
        positions = [
            p
            for c, n in zip(chunks, queries, strict=True)
            for p in range(c.num_computed_tokens, c.num_computed_tokens + n)
        ]
        ends = torch.tensor(queries).cumsum(0).tolist()
        wanted = [end - 1 for c, end in zip(chunks, ends, strict=True) if c.num_logits]
        with torch.inference_mode():
            batch = paged_batch(
                queries,
                [c.num_computed_tokens for c in chunks],
                [c.block_table for c in chunks],
                self._pool.layers[0].k_BPKH,
            )
            rows = self._workspace.rows(len(positions))
            self._join(self._tensor([t for c in chunks for t in c.token_ids]), batch.slot_T, rows)
            normed_TD = self._body.run_embedded(
                self._tensor(positions), batch=batch, kv=self._pool.layers, workspace=self._workspace
            )
            normed_RD = normed_TD[self._tensor(wanted)]
            self._chain([c for c in chunks if c.num_logits], normed_RD)
            return self._body.logits(normed_RD, self._workspace)

    def argmax(self, logits_RV: Tensor) -> list[int]:
        return self._body.ops.argmax(logits_RV)

    def _join(self, token_T: Tensor, slot_T: Tensor, rows: Rows) -> None:
        """Writes what the module's layer reads."""
        D, joint_T2D = rows.hidden_TD.shape[1], self._joint_T2D[: len(token_T)]
        self._body.embed(token_T, rows.hidden_TD, self._workspace)
        eps = self._body.config.rms_norm_eps
        embedded_TD = self._body.ops.rms_norm(rows.hidden_TD, self._module.token_norm_D, eps, rows.normed_TD)
        joint_T2D[:, :D] = self._hidden_SD[slot_T]
        joint_T2D[:, D:] = embedded_TD
        self._module.projection(joint_T2D, rows.hidden_TD)

    def _chain(self, chunks: Sequence[SequenceChunk], normed_RD: Tensor) -> None:
        """The last rows' own hidden states stand for those of the tokens that they predict."""
        if chunks:
            ends = [c.num_computed_tokens + len(c.token_ids) for c in chunks]
            slots = [
                c.block_table[e // self._block_size] * self._block_size + e % self._block_size
                for c, e in zip(chunks, ends, strict=True)
            ]
            half_RD = self._hidden_half(self._module.from_own, normed_RD, self._workspace.rows(len(chunks)))
            self._hidden_SD.index_copy_(0, self._tensor(slots), half_RD)

    def _hidden_half(self, source: Rescaled | Normed, normed_TD: Tensor, rows: Rows) -> Tensor:
        if isinstance(source, Rescaled):
            return torch.mul(normed_TD, source.gain_D, out=rows.branch_TD)
        eps = self._body.config.rms_norm_eps
        return self._body.ops.rms_norm(normed_TD, source.weight_D, eps, rows.branch_TD)

    def _slots(self, chunk: SequenceChunk) -> Iterator[int]:
        size, table, start = self._block_size, chunk.block_table, chunk.num_computed_tokens
        return (table[p // size] * size + p % size for p in range(start, start + len(chunk.token_ids)))

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device.torch_device)


def mtp_proposer(
    target: LoadedModel, runner: Runner, config: InstanceConfig, device: Device, draw: Draw
) -> ModelProposer:
    """A `Proposer` by "mtp" for one run, which observes what `runner` computes from now on.

    Raises:
        ConfigError: the model has no prediction module, or its memory does not fit.
    """
    if target.mtp is None:
        why = "is divided over ranks" if target.model.is_divided else "has no prediction module"
        raise ConfigError(f"model {target.name} {why}; accepted for drafts by mtp: one that has, on one rank")
    head = MtpHead(target.mtp, config, device, who=f"the prediction module of {target.name}")
    runner.observer = head.observe
    return ModelProposer("mtp", head, block_size=config.block_size, draw=draw, max_tokens_per_run=most_tokens(config))
