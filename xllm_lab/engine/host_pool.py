"""KV blocks in the host's memory, behind the host tier's block ids, and how they move.

A copy moves bytes as they are, layer by layer, each run of neighbouring blocks at once:

    blocks of the device  3 4 5 9      one copy of three blocks and one of one, of the keys and of the values
    blocks of the host    0 1 2 3      of every layer

Nothing here can notice that a bit of the host's memory flipped, as nothing does for the device's: checksums belong to
what outlives a process or comes from another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from xllm_lab.engine.device import Device
from xllm_lab.engine.kv import LayerKv
from xllm_lab.errors import ConfigError
from xllm_lab.policies.cache import CopyKind


class Stretch(NamedTuple):
    """Blocks [block, block + length) of the device and [slot, slot + length) of the host."""

    block: int
    slot: int
    length: int


class HostPool:
    """Every layer's KV blocks on the host.

    Attributes:
        layers: one `LayerKv` a layer, each [S, P, K, H] of the device's S host blocks; as the device's otherwise.
        block_bytes: of one block, of all layers together.
    """

    def __init__(self, device_layers: Sequence[LayerKv], *, num_slots: int, device: Device) -> None:
        """Allocates it.

        Args:
            device_layers: whose blocks are copied, each [B, P, K, H].

        Raises:
            ConfigError: more bytes than the host has free.
        """
        self._device_layers = device_layers
        self.block_bytes = sum(x[0].nbytes for layer in device_layers for x in layer)
        wanted_bytes, free_bytes = num_slots * self.block_bytes, device.host_memory().free_bytes
        if wanted_bytes > free_bytes:
            raise ConfigError(
                f"host_blocks_factor makes {num_slots} host blocks: they take {wanted_bytes} bytes, {free_bytes} are "
                f"free on the host; at most {free_bytes // self.block_bytes} blocks are accepted"
            )
        self.layers = tuple(
            LayerKv(*(device.host_zeros((num_slots, *x.shape[1:]), x.dtype) for x in layer)) for layer in device_layers
        )

    def move(self, kind: CopyKind, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Copy blocks to the host or back, on this thread's stream; on the CPU it is done when it returns."""
        stretches = list(stretches_of(blocks, slots))
        with torch.inference_mode():
            for device_kv, host_kv in zip(self._device_layers, self.layers, strict=True):
                for on_device, on_host in zip(device_kv, host_kv, strict=True):
                    for block, slot, length in stretches:
                        one, other = on_device[block : block + length], on_host[slot : slot + length]
                        if kind == "offload":
                            other.copy_(one, non_blocking=True)
                        else:
                            one.copy_(other, non_blocking=True)


def stretches_of(blocks: Sequence[int], slots: Sequence[int]) -> Iterator[Stretch]:
    """The fewest runs of neighbours in both, in the given order."""
    begin = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or (blocks[end], slots[end]) != (blocks[end - 1] + 1, slots[end - 1] + 1):
            yield Stretch(blocks[begin], slots[begin], end - begin)
            begin = end
