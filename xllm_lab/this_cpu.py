"""The machine this runs on as a `Device`, measured in about a second; a stand-in where nothing better is known."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache

import numpy as np

from xllm_lab.hardware import Device, Link

_REPEATS = 5
_SIZE = 768
_COPIED_BYTES = 1 << 27


@cache
def measure_this_cpu() -> Device:
    """Arithmetic and memory bandwidth as numpy reaches them here, so both fractions are 1. Measured once a process.

    Other figures follow from these: fp32 arithmetic stands in for the other formats, memory for links.
    """
    a = np.ones((_SIZE, _SIZE), dtype=np.float32)
    flops_per_s = 2 * _SIZE**3 / _fastest_s(lambda: a @ a)
    source = np.ones(_COPIED_BYTES, dtype=np.uint8)
    target = np.empty_like(source)
    # A copy reads every byte and writes it.
    bytes_per_s = 2 * _COPIED_BYTES / _fastest_s(lambda: np.copyto(target, source))
    b = np.ones(1000, dtype=np.float32)
    b = np.ones(1_000_000, dtype=np.float32)
    c = np.empty_like(b)
    vector_flops_per_s = b.size / _fastest_s(lambda: np.add(b, b, out=c))
    kernel_us = _fastest_s(lambda: np.add(b[:16], b[:16], out=c[:16]), inner=1000) * 1e6
    link = Link(bytes_per_s=bytes_per_s, latency_us=0.0, num_devices=1, frac=1.0)
    told = f"measured with numpy on {platform.processor() or platform.machine()}, {datetime.now(UTC):%Y-%m-%d}"
    names = ("matrix_flops_per_s", "vector_flops_per_s", "hbm_bytes", "hbm_bytes_per_s", "matrix_frac", "hbm_frac")
    return Device(
        name="this-cpu",
        matrix_flops_per_s={"fp32": flops_per_s, "bf16": flops_per_s, "int8": flops_per_s},
        vector_flops_per_s=vector_flops_per_s,
        hbm_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        hbm_bytes_per_s=bytes_per_s,
        matrix_frac=1.0,
        hbm_frac=1.0,
        kernel_us=kernel_us,
        launch_us=kernel_us,
        link=link,
        far_link=link,
        sources=dict.fromkeys((*names, "kernel_us", "launch_us", "link", "far_link"), told),
    )


def _fastest_s(work: Callable[[], object], inner: int = 1) -> float:
    """The fastest of a few repeats: whatever else the machine does can only slow one down."""
    work()
    fastest = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(inner):
            work()
        fastest = min(fastest, (time.perf_counter() - start) / inner)
    return fastest
