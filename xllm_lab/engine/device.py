"""The one place that knows what cpu, cuda and npu are.

Everything else in the engine receives a `Device` and asks it: where tensors live, which dtype to use, how much
memory is left, what to write into the run's manifest.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import os
import platform
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from xllm_lab.errors import ConfigError

DEVICE_NAMES = ("cpu", "cuda", "npu", "auto")
# Who carries tensors between devices of a kind.
_COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# oneDNN's name for everything below AMX (oneDNN 3.x, "CPU dispatcher control").
_ISA_WITHOUT_AMX = "AVX10_1_512"


class DeviceMemory(NamedTuple):
    """Memory of a device in bytes; on the CPU the smaller of the machine's and the container's."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An opened device.

    Attributes:
        name: "cpu", "cuda" or "npu".
        torch_device: where tensors live.
        default_dtype: of weights and KV when the user names none. float32 on the CPU, which is comparable token by
            token with other engines and no slower than bfloat16 unless the cores have bfloat16 matrix units.
        description: model of the hardware and threads, for the manifest.
    """

    name: str
    torch_device: torch.device
    default_dtype: torch.dtype
    description: str

    @property
    def collectives(self) -> str:
        """The library through which such devices exchange tensors."""
        return _COLLECTIVES[self.name]

    def synchronize(self) -> None:
        """Returns when the device has finished what was launched; on the CPU at once."""
        if self.name != "cpu":
            torch.accelerator.synchronize(self.torch_device)

    def memory(self) -> DeviceMemory:
        if self.name == "cpu":
            return _cpu_memory()
        free_bytes, total_bytes = torch.accelerator.get_memory_info(self.torch_device)
        return DeviceMemory(free_bytes, total_bytes)


def open_device(name: str, *, threads: int | None = None, index: int | None = None) -> Device:
    """Opens a device by name; "auto" takes the accelerator if there is one, else the CPU.

    Open the CPU before anything else computes: oneDNN picks its instruction set at its first operator.

    Args:
        name: one of `DEVICE_NAMES`.
        threads: torch's compute threads in this process; `None` leaves them as they are.
        index: which accelerator of several; `None` is the current one. CPUs are one device.

    Raises:
        ConfigError: the name is unknown, the device is not there, or `threads` is below 1.
    """
    if name not in DEVICE_NAMES:
        raise ConfigError(f"device {name!r} is unknown; accepted are {', '.join(DEVICE_NAMES)}")
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads is {threads}, at least 1 is accepted")
        torch.set_num_threads(threads)
    found = _accelerator(wants_npu=name == "npu")
    if name == "auto":
        name = found if found in DEVICE_NAMES else "cpu"
    if name == "cpu":
        return _open_cpu()
    if name != found:
        available = "cpu" if found is None else f"cpu, {found}"
        raise ConfigError(f"device {name!r} is not available here; available are {available}")
    if index is not None:
        count = torch.accelerator.device_count()
        if index >= count:
            raise ConfigError(f"device {name!r} number {index} is wanted; 0 to {count - 1} are accepted here")
        torch.accelerator.set_device_index(index)
    return Device(
        name=name,
        torch_device=torch.device(name, torch.accelerator.current_device_index()),
        default_dtype=torch.bfloat16,
        description=str(getattr(torch, name).get_device_name()),
    )


def _accelerator(*, wants_npu: bool) -> str | None:
    """Type of the accelerator torch sees. torch_npu registers itself only when imported, so "npu" imports it."""
    if wants_npu:
        try:
            import torch_npu  # noqa: F401
        except (ImportError, OSError) as error:
            raise ConfigError(f"device 'npu' needs the torch_npu package, which does not load: {error}") from error
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def _open_cpu() -> Device:
    facts = cpu_facts()
    note = ", AMX kept from oneDNN, which fails on it here" if "amx_tile" in facts.flags and _amx_is_off() else ""
    return Device(
        name="cpu",
        torch_device=torch.device("cpu"),
        default_dtype=torch.float32,
        description=f"{facts.model_name}, {torch.get_num_threads()} threads{note}",
    )


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


def _cpu_memory() -> DeviceMemory:
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
