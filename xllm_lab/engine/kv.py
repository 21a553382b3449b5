"""The tensors behind the KV ledger's block ids."""

# ruff: noqa: N815  (shapes live in the names of fields, too)
# Shapes: B blocks, P tokens per block, K KV heads, H head dim

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from xllm_lab.engine.device import Device
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.errors import ConfigError


class LayerKv(NamedTuple):
    """One layer's keys and values, each [B, P, K, H]. Of latent attention values are keys, and their own have H = 0."""

    k_BPKH: Tensor
    v_BPKH: Tensor


class KvLayout(Protocol):
    """Every layer's KV, as attention sees it.

    Attributes:
        layers: one `LayerKv` a layer.
        block_size: P, in tokens.
        num_blocks: of the ledger, and those that pad.
        padding_block: nobody's, in which graphs pad; one of `layers`.
        blocks_per_sequence: entries of the longest block table; None: as many as the longest context has blocks.
    """

    @property
    def layers(self) -> Sequence[LayerKv]: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def padding_block(self) -> int: ...
    @property
    def blocks_per_sequence(self) -> int | None: ...
    def rehearse(self, lengths: Sequence[int]) -> list[Sequence[int]]:
        """Block tables of made-up sequences of so many tokens, each on blocks of its own, until nobody has any."""
        ...

    def forget_rehearsals(self) -> None:
        """Nobody looks at made-up sequences any more."""
        ...


def refuse_below_1(**counts: int) -> None:
    """ConfigError for the first count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, at least 1 is accepted")


class KvPool:
    """Every layer's KV blocks. Which block belongs to whom is the ledger's business. A `KvLayout`.

    Attributes:
        layers: one `LayerKv` a layer.
        num_blocks: B.
        block_size: P, in tokens.
        num_bytes: of all layers together.
    """

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: Device
    ) -> None:
        """Allocates the pool, zeroed so that a slot never written cannot hold a NaN.

        Raises:
            ConfigError: a count below 1, a block size that the device's attention does not take, or more bytes than the
                device has free.
        """
        refuse_below_1(num_blocks=num_blocks, block_size=block_size)
        if device.kv_block_tokens not in (None, block_size):
            raise ConfigError(
                f"block_size is {block_size}; the attention of {device.name} takes KV blocks of "
                f"{device.kv_block_tokens} tokens; accepted: {device.kv_block_tokens}"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self.padding_block, self.blocks_per_sequence = num_blocks - 1, None
        block_bytes = block_size * config.kv_bytes_per_token(dtype)
        self.num_bytes = num_blocks * block_bytes
        free_bytes = device.memory().free_bytes
        if self.num_bytes > free_bytes:
            raise ConfigError(
                f"num_blocks is {num_blocks}: {block_size} tokens each take {self.num_bytes} bytes of KV, "
                f"{free_bytes} are free on {device.name}; at most {free_bytes // block_bytes} blocks are accepted"
            )
        shape = (num_blocks, block_size, config.num_kv_heads)
        widths = (config.head_dim, config.head_dim if config.kv_sides == 2 else 0)
        self.layers = tuple(
            LayerKv(*(device.zeros((*shape, width), dtype) for width in widths)) for _ in range(config.num_layers)
        )

    def rehearse(self, lengths: Sequence[int]) -> list[Sequence[int]]:
        """See `KvLayout`."""
        tables, following = list[Sequence[int]](), 0
        for length in lengths:
            num_blocks = -(-length // self.block_size)
            tables.append(range(following, following + num_blocks))
            following += num_blocks
        assert following <= self.num_blocks, "the synthetic step is larger than the pool"
        return tables

    def forget_rehearsals(self) -> None:
        """See `KvLayout`."""
