"""What mapping pages of virtual KV takes on the device at hand, for a model's layers."""

from __future__ import annotations

import math
import time
from itertools import product

import torch

from xllm_lab.engine.device import Device
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.virtual_kv_pool import VirtualKvPool
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.page_time import Mapped, PageTime, fit_page_time
from xllm_lab.step import PageRun

_RUNS = (1, 2, 4, 16)  # pages of a run
_SLOTS = range(4)


def measure_page_time(
    model: ModelConfig, dtype: torch.dtype, device: Device, *, least_tokens: int, repeats: int
) -> PageTime | None:
    """Fitted to runs of several lengths; wall time, as the page thread takes. None where the device cannot map pages.

    Args:
        least_tokens: of a page; it has as many more as the device's own page wants.
    """
    token_bytes = model.num_kv_heads * model.head_dim * dtype.itemsize
    try:
        page_bytes = device.page_bytes()
        tokens = math.lcm(least_tokens, page_bytes // math.gcd(page_bytes, token_bytes))
        most = max(_RUNS)
        instance = InstanceConfig(
            max_model_len=tokens * most - 1,
            block_size=tokens,
            num_kv_blocks=most + len(_SLOTS),
            kv_layout="virtual",
            enable_prefix_cache=False,
        )
        pool = VirtualKvPool(model, instance, num_blocks=instance.num_kv_blocks, dtype=dtype, device=device)
    except ConfigError:
        return None
    taken: list[Mapped] = []
    for _, slot, num_pages in product(range(repeats), _SLOTS, _RUNS):
        run = PageRun(slot, 0, slot, num_pages)
        started_ns = time.perf_counter_ns()
        pool.map(run)
        mapped_ns = time.perf_counter_ns()
        pool.unmap(run)
        unmapped_ns = time.perf_counter_ns()
        taken.append(Mapped((run,), (), (mapped_ns - started_ns) / 1000))
        taken.append(Mapped((), (run,), (unmapped_ns - mapped_ns) / 1000))
    return fit_page_time(taken)
