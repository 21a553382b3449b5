"""Blocks between the host's memory, or the device's, and a store: what the threads of save, prefetch and push do.

    save        host block ------------------> store
    prefetch    host block <------------------ store          proven right, or not there
    push        device block --> stage ------> store          some blocks at a time

A block in the store is its layers' keys and values, one after the other, as they lie in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from xllm_lab.copies import Copy
from xllm_lab.engine.device import Device
from xllm_lab.engine.host_pool import HostPool
from xllm_lab.engine.kv import LayerKv
from xllm_lab.store.block_store import BlockStore, Parts

_STAGE_BLOCKS = 8


class StoreWays:
    """What copies between a store and one instance's memory.

    Args:
        host: the host's blocks.
        device_layers: the device's, each [B, P, K, H].
    """

    def __init__(self, store: BlockStore, host: HostPool, device_layers: Sequence[LayerKv], device: Device) -> None:
        assert store.block_bytes == host.block_bytes, f"blocks of {host.block_bytes} bytes in a store for others"
        self._store, self._host = store, host
        self._stage = HostPool(device_layers, num_slots=_STAGE_BLOCKS, device=device)
        self._on_side = device.side("push")

    def work(self, copy: Copy) -> Callable[[], int]:
        """What is to be done on a thread: it returns how many of the first blocks are where they were to go.

        The deadline begins now.
        """
        assert copy.timeout_us is not None, f"a {copy.kind} without a deadline"
        deadline_us = _now_us() + copy.timeout_us
        ways = {"save": self._save, "prefetch": self._prefetch, "push": self._push}
        return lambda: ways[copy.kind](copy, deadline_us)

    def _save(self, copy: Copy, deadline_us: int) -> int:
        return self._store.put(copy.keys, parts_of(self._host, copy.slots), _left_us(deadline_us))

    def _prefetch(self, copy: Copy, deadline_us: int) -> int:
        return self._store.get_into(copy.keys, parts_of(self._host, copy.slots), _left_us(deadline_us))

    def _push(self, copy: Copy, deadline_us: int) -> int:
        num_done = 0
        while num_done < len(copy.keys):
            blocks = copy.blocks[num_done : num_done + _STAGE_BLOCKS]
            slots = range(len(blocks))
            self._on_side(partial(self._stage.move, "offload", blocks, slots))
            keys = copy.keys[num_done : num_done + len(blocks)]
            num_put = self._store.put(keys, parts_of(self._stage, slots), _left_us(deadline_us))
            num_done += num_put
            if num_put < len(blocks):
                break
        return num_done


def parts_of(pool: HostPool, slots: Sequence[int]) -> list[Parts]:
    """Of each block of the host its memory, layer by layer."""
    return [[_bytes_of(x[slot]) for layer in pool.layers for x in layer] for slot in slots]


def _bytes_of(x: torch.Tensor) -> npt.NDArray[np.uint8]:
    return x.view(torch.uint8).numpy().reshape(-1)


def _now_us() -> int:
    return time.monotonic_ns() // 1000


def _left_us(deadline_us: int) -> int:
    return max(0, deadline_us - _now_us())
