"""Memory of a model that drafts beside the target: as many KV blocks, and steps as large."""

from __future__ import annotations

import torch

from xllm_lab.engine.device import Device
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig


def most_tokens(config: InstanceConfig) -> int:
    """Rows of a run: those that a step of the target may have."""
    return min(config.max_tokens_per_batch, config.num_kv_tokens)


def most_logits(config: InstanceConfig) -> int:
    return min(config.max_seqs_per_batch, most_tokens(config))


def draft_pool(
    who: str, model: ModelConfig, dtype: torch.dtype, config: InstanceConfig, device: Device, *, row_bytes: int = 0
) -> KvPool:
    """A pool of the target's blocks for the layers of `model`.

    Args:
        who: takes it, for the error.
        row_bytes: that it will want besides for each token.

    Raises:
        ConfigError: it does not fit beside what is there.
    """
    token_bytes, free_bytes = model.kv_bytes_per_token(dtype) + row_bytes, device.memory().free_bytes
    if token_bytes * config.num_kv_tokens > free_bytes:
        raise ConfigError(
            f"{who} needs {token_bytes * config.num_kv_tokens} bytes for num_kv_blocks {config.num_kv_blocks} of "
            f"{config.block_size} tokens, beside the target's; {free_bytes} are free on {device.name}, accepted: at "
            f"most {free_bytes // (token_bytes * config.block_size)} blocks, or to draft by another method"
        )
    return KvPool(model, num_blocks=config.num_kv_blocks, block_size=config.block_size, dtype=dtype, device=device)
