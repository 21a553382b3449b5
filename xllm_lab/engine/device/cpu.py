"""CPUs: what this machine is, what its matrix units are worth, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import math
import mmap
import os
import platform
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# oneDNN's name for everything below AMX (oneDNN 3.x, "CPU dispatcher control").
_ISA_WITHOUT_AMX = "AVX10_1_512"


class DeviceMemory(NamedTuple):
    """Memory of a device in bytes; on the CPU the smaller of the machine's and the container's."""

    free_bytes: int
    total_bytes: int


def describe() -> str:
    """Cores and threads. oneDNN settles on an instruction set here, before it computes anything."""
    facts = cpu_facts()
    note = ", AMX kept from oneDNN, which fails on it here" if "amx_tile" in facts.flags and _amx_is_off() else ""
    return f"{facts.model_name}, {torch.get_num_threads()} threads{note}"


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On Linux, pages that the system zeroes all at once, for two thirds of what touching each of them takes."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes or not hasattr(mmap, "MAP_POPULATE"):
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@functools.cache
def _amx_is_off() -> bool:
    """Tries AMX once a process, and tells oneDNN to do without it if it is faulty. A user's own setting stands."""
    if "ONEDNN_MAX_CPU_ISA" in os.environ or _bfloat16_matmul_survives():
        return False
    os.environ["ONEDNN_MAX_CPU_ISA"] = _ISA_WITHOUT_AMX
    return True


def _bfloat16_matmul_survives() -> bool:
    """Tries one AMX-sized product of oneDNN's.

    On some virtual machines it kills the process (illegal instruction at `tilezero`, torch 2.13 on Sapphire Rapids):
    the matrix unit is there and works, but the hypervisor hides CPUID leaf 0x1D, from which oneDNN reads the shape of
    a tile, so that it configures tiles of no rows. Our own kernels (`ops/kernels/linear.cpp`) know the shape.
    """

    def trial() -> bool:
        x = torch.ones(16, 64, dtype=torch.bfloat16)
        return torch.nn.functional.linear(x, x).sum().item() == 16 * 16 * 64

    return survives(trial)


def survives(trial: Callable[[], bool]) -> bool:
    """Whether `trial` returns True in a child process: for what may kill the process that tries it.

    The child inherits this process's torch, so the trial costs milliseconds; it uses one thread, because the OpenMP
    pool does not survive a fork, and leaves neither a core file nor a zombie.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(10)  # seconds; a lock that another thread held during the fork would never open
            torch.set_num_threads(1)
            status = 0 if trial() else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def give_back_freed_memory() -> None:
    """Returns to the system what this process freed and its allocator kept.

    glibc keeps freed pieces of up to 32 MiB, which after dequantising a model were half as much as the model; what is
    allocated later is larger and finds no use for them. Other allocators are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class CpuFacts(NamedTuple):
    """What /proc/cpuinfo says of the first core; no flags where there is no such file."""

    model_name: str
    flags: frozenset[str]


def cpu_facts() -> CpuFacts:
    """Model and instruction sets of this machine's cores."""
    model_name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model_name = value.strip()
        if key.strip() == "flags":
            flags = frozenset(value.split())
        if not line and flags:
            break
    return CpuFacts(model_name, flags)


def memory() -> DeviceMemory:
    """Of the machine, or of the container if that has less."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    total_bytes = os.sysconf("SC_PHYS_PAGES") * page_bytes
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * page_bytes
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):  # unlike free pages, it counts what the page cache would give back
                free_bytes = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used_bytes = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
    except OSError:
        return DeviceMemory(free_bytes, total_bytes)
    if limit != "max":
        total_bytes = min(total_bytes, int(limit))
        free_bytes = min(free_bytes, max(0, int(limit) - used_bytes))
    return DeviceMemory(free_bytes, total_bytes)
