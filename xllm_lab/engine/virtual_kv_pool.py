"""KV blocks, mapped into one range of addresses for each sequence, layer and side, which attention reads as it lies.

    k_BPKH of a layer    | slot 0: tokens 0 ... max_model_len | slot 1 ... | ... | what pads a graph |
    block table of a sequence in slot s, where attention takes any block size         [s]
    and where it takes blocks of V tokens, of which a slot has M                      [s * M, s * M + 1, ...]

So a "block" of the attention is a view of a range, and not a block of the ledger: that is a physical page, of all
layers, and which page of which slot shows it is mapped by `PageMapper` as the scheduler says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from xllm_lab.engine.device import Device, Geometry
from xllm_lab.engine.kv import LayerKv, refuse_below_1
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.step import PageRun
from xllm_lab.virtual_kv import num_slots, pages_per_slot


class VirtualKvPool:
    """Every layer's KV, seen slot by slot. A `KvLayout`.

    Attributes:
        layers: one `LayerKv` a layer; a block there is a view of `block_size` tokens of a slot.
        num_blocks: physical ones.
        num_bytes: of these together.
        memory: what they are mapped in.
    """

    def __init__(
        self, config: ModelConfig, instance: InstanceConfig, *, num_blocks: int, dtype: torch.dtype, device: Device
    ) -> None:
        """Allocates the blocks, all zero, and reserves addresses. No slot shows anything but the one that pads.

        Args:
            num_blocks: those of the instance, and perhaps one more, which pads graphs.

        Raises:
            ConfigError: a block is no whole number of the pages that the device maps, or there is too little memory.
        """
        refuse_below_1(num_blocks=num_blocks, block_size=instance.block_size)
        self._page_tokens = instance.block_size
        token_bytes = config.num_kv_heads * config.head_dim * dtype.itemsize
        _refuse_other_sizes(instance.block_size, token_bytes, device)
        self.num_blocks = num_blocks
        self._pages_per_slot = _whole_views(pages_per_slot(instance), instance.block_size, device)
        self.slot_tokens = self._pages_per_slot * instance.block_size
        self.block_size = device.kv_block_tokens or self.slot_tokens
        self._num_slots = num_slots(instance)
        self.blocks_per_sequence = self.slot_tokens // self.block_size
        geometry = Geometry(
            num_ranges=config.kv_sides * config.num_layers,
            num_positions=(self._num_slots + 1) * self._pages_per_slot,
            num_pages=num_blocks,
            page_bytes=instance.block_size * token_bytes,
        )
        self.num_bytes = geometry.num_bytes
        free_bytes = device.memory().free_bytes
        if self.num_bytes > free_bytes:
            raise ConfigError(
                f"num_blocks is {num_blocks}: {instance.block_size} tokens each take {self.num_bytes} bytes of KV, "
                f"{free_bytes} are free on {device.name}; at most {free_bytes * num_blocks // self.num_bytes} blocks "
                "are accepted"
            )
        self._page_bytes = geometry.page_bytes
        self._rehearsed: dict[int, int] = {}
        self.memory = device.virtual_memory(geometry)
        shape = (-1, self.block_size, config.num_kv_heads, config.head_dim)
        views = [one.view(dtype).view(shape) for one in self.memory.ranges]
        if config.kv_sides == 1:
            self.layers = tuple(LayerKv(view, view[..., :0]) for view in views)
        else:
            self.layers = tuple(LayerKv(*views[2 * k : 2 * k + 2]) for k in range(config.num_layers))
        if not self.memory.fresh_is_zero:
            self._zero()
        # What pads writes anywhere in its slot, and all of that is one page.
        self.padding_block = self._num_slots * self.blocks_per_sequence
        for page in range(self._pages_per_slot if num_blocks > instance.num_kv_blocks else 0):
            self.memory.map(self._num_slots * self._pages_per_slot + page, num_blocks - 1, 1)

    def table(self, slot: int) -> Sequence[int]:
        """The block table of the sequence in a slot."""
        return range(slot * self.blocks_per_sequence, (slot + 1) * self.blocks_per_sequence)

    def map(self, run: PageRun) -> None:
        """Pages of a slot show blocks."""
        self.memory.map(run.slot * self._pages_per_slot + run.page, run.block, run.num_pages)

    def unmap(self, run: PageRun) -> None:
        """Pages of a slot show nothing."""
        self.memory.unmap(run.slot * self._pages_per_slot + run.page, run.num_pages)

    def rehearse(self, lengths: Sequence[int]) -> list[Sequence[int]]:
        """Block tables of made-up sequences of so many tokens, each on blocks of its own; see `KvLayout`."""
        following, tables = 0, list[Sequence[int]]()
        for slot, length in enumerate(lengths):
            num_pages = -(-length // self._page_tokens)
            self.map(PageRun(slot, 0, following, num_pages))
            self._rehearsed[slot] = max(num_pages, self._rehearsed.get(slot, 0))
            following += num_pages
            tables.append(self.table(slot))
        return tables

    def forget_rehearsals(self) -> None:
        """Their slots show nothing again."""
        for slot, num_pages in self._rehearsed.items():
            self.unmap(PageRun(slot, 0, -1, num_pages))
        self._rehearsed = {}

    def _zero(self) -> None:
        """Through the first slots' addresses."""
        most = self._num_slots * self._pages_per_slot
        for first in range(0, self.num_blocks, most):
            count = min(most, self.num_blocks - first)
            self.memory.map(0, first, count)
            for one in self.memory.ranges:
                one[
                    : count * self._page_tokens * (len(one) // (most + self._pages_per_slot) // self._page_tokens)
                ].zero_()
            self.memory.unmap(0, count)


def _whole_views(num_pages: int, page_tokens: int, device: Device) -> int:
    """Pages of a slot, rounded up until the attention's blocks divide it."""
    view = device.kv_block_tokens or 1
    step = view // math.gcd(view, page_tokens)
    return -(-num_pages // step) * step


def _refuse_other_sizes(block_size: int, token_bytes: int, device: Device) -> None:
    page_bytes = device.page_bytes()
    if block_size * token_bytes % page_bytes:
        least = page_bytes // math.gcd(page_bytes, token_bytes)
        raise ConfigError(
            f"block_size is {block_size}: a layer's keys of a block take {block_size * token_bytes} bytes, and "
            f"{device.name} maps memory by {page_bytes}; accepted for kv_layout 'virtual': multiples of {least}"
        )
