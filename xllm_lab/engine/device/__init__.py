"""The one place that knows what cpu, cuda and npu are.

Everything else in the engine receives a `Device` and asks it: where tensors live, which dtype to use, how much memory
is left, how a step is captured, what to write into the run's manifest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xllm_lab.engine.device import cpu, cuda_pages, npu_pages, npu_setup
from xllm_lab.engine.device.cpu import CpuFacts, DeviceMemory, cpu_facts, give_back_freed_memory, survives
from xllm_lab.engine.device.cpu_pages import PAGE_BYTES, CpuPages, is_there
from xllm_lab.engine.device.driver_pages import DriverPages
from xllm_lab.engine.device.streams import Streams
from xllm_lab.engine.device.virtual_memory import Geometry, VirtualMemory
from xllm_lab.errors import ConfigError

__all__ = [
    "DEVICE_NAMES",
    "DTYPES",
    "CpuFacts",
    "Device",
    "DeviceMemory",
    "Geometry",
    "Streams",
    "VirtualMemory",
    "cpu_facts",
    "give_back_freed_memory",
    "open_device",
    "survives",
]

DEVICE_NAMES = ("cpu", "cuda", "npu", "auto")
# Who carries tensors between devices of a kind.
_COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An opened device.

    Attributes:
        name: "cpu", "cuda" or "npu".
        torch_device: where tensors live.
        default_dtype: of weights and KV when the user names none. float32 on the CPU, which is comparable token by
            token with other engines and no slower than bfloat16 unless the cores have bfloat16 matrix units.
        kv_block_tokens: the only size of KV blocks that its attention takes; None: any.
        description: model of the hardware and threads, for the manifest.
        streams: what it computes on beside the host, and captures with; None: it is the host.
    """

    name: str
    torch_device: torch.device
    default_dtype: torch.dtype
    kv_block_tokens: int | None = None
    description: str
    streams: Streams | None = None

    @property
    def is_host(self) -> bool:
        """Whether it computes in the host's memory, and has done when a call returns."""
        return self.streams is None

    @property
    def collectives(self) -> str:
        """The library through which such devices exchange tensors."""
        return _COLLECTIVES[self.name]

    def synchronize(self) -> None:
        """Returns when what was launched on this thread's stream is done, whatever others do; on the CPU at once."""
        if self.streams is not None:
            self.streams.current().synchronize()

    def memory(self) -> DeviceMemory:
        if self.is_host:
            return cpu.memory()
        free_bytes, total_bytes = torch.accelerator.get_memory_info(self.torch_device)
        return DeviceMemory(free_bytes, total_bytes)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeroed memory that is large and stays."""
        return cpu.zeros(shape, dtype) if self.is_host else torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def page_bytes(self) -> int:
        """Memory that it maps at once. ConfigError where it maps none."""
        if not self.is_host:
            page_bytes = npu_pages.page_bytes if self.name == "npu" else cuda_pages.page_bytes
            return page_bytes(self.torch_device.index or 0)
        if not is_there():
            raise ConfigError("kv_layout 'virtual' wants a CPU under Linux; accepted here: 'paged'")
        return PAGE_BYTES

    def virtual_memory(self, geometry: Geometry) -> VirtualMemory:
        """Addresses, and pages to show there; pages are multiples of `page_bytes`. ConfigError if it has no more."""
        if self.is_host:
            return CpuPages(geometry)
        driver = (npu_pages if self.name == "npu" else cuda_pages).driver(self.torch_device.index or 0)
        return DriverPages(geometry, driver, self.torch_device)

    def like_this_thread(self) -> Callable[[], None]:
        """What a new thread begins with: this device, and the stream that this thread works on now.

        Or what the one prepared would not be in order with what the other computes.
        """
        if self.streams is None:
            return lambda: None
        index, streams, stream = self.torch_device.index or 0, self.streams, self.streams.current()

        def begin() -> None:
            torch.accelerator.set_device_index(index)
            streams.use(stream)

        return begin

    def host_memory(self) -> DeviceMemory:
        """Of the host, which on the CPU is the device's."""
        return cpu.memory()

    def host_zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeroed memory of the host that is large and stays, and that the device can copy to and from by itself."""
        return cpu.zeros(shape, dtype) if self.is_host else torch.zeros(shape, dtype=dtype, pin_memory=True)

    def side(self, name: str) -> Callable[[Callable[[], None]], None]:
        """What does work on this thread and returns when it is done; on an accelerator, beside all other work, on the
        stream of that name. What it reads must be done before."""
        return _at_once if self.streams is None else self.streams.side(name)

    def mirrored(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """Zeroed bytes of the host, from which the device can copy by itself, and as many of its own.

        Where the device is the host, they are the same.
        """
        host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=not self.is_host)
        return host, host if self.is_host else host.to(self.torch_device)

    @contextlib.contextmanager
    def refusing_what_does_not_fit(self, what: str) -> Iterator[None]:
        """ConfigError with the numbers if memory runs out meanwhile; what was kept for reuse is given back."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            wanted = " ".join(str(error).split()).partition(". ")[0]
            # Freed while the traceback still holds on to the frames that ask for more, so only what nobody names.
            torch.accelerator.empty_cache()
            free_bytes, total_bytes = self.memory()
            raise ConfigError(
                f"{what} does not fit on {self.name}: {free_bytes} of {total_bytes} bytes are free; accepted: a "
                f"smaller model, fewer num_kv_blocks, or a smaller max_tokens_per_batch ({wanted})"
            ) from error


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
    if name == "npu" or (name == "auto" and npu_setup.is_expected()):
        return _open_npu(index)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = None if accelerator is None else accelerator.type
    if name == "auto":
        name = found if found in DEVICE_NAMES else "cpu"
    if name == "cpu":
        return Device(
            name="cpu", torch_device=torch.device("cpu"), default_dtype=torch.float32, description=cpu.describe()
        )
    if name != found:
        available = "cpu" if found is None else f"cpu, {found}"
        raise ConfigError(f"device {name!r} is not available here; available are {available}")
    _select(name, index)
    return Device(
        name="cuda",
        torch_device=torch.device("cuda", torch.cuda.current_device()),
        default_dtype=torch.bfloat16,
        description=torch.cuda.get_device_name(),
        streams=Streams(torch.cuda, torch.cuda.CUDAGraph, loads_lazily=True),
    )


def _at_once(work: Callable[[], None]) -> None:
    work()


def _select(name: str, index: int | None) -> None:
    if index is not None:
        count = torch.accelerator.device_count()
        if index >= count:
            raise ConfigError(f"device {name!r} number {index} is wanted; 0 to {count - 1} are accepted here")
        torch.accelerator.set_device_index(index)


def _open_npu(index: int | None) -> Device:
    npu_setup.load()
    _select("npu", index)
    api = npu_setup.api()
    return Device(
        name="npu",
        torch_device=torch.device("npu", api.current_device()),
        default_dtype=torch.bfloat16,
        kv_block_tokens=128,  # the only size that vllm-ascend uses, and that all modes of the attention take
        description=npu_setup.describe(),
        streams=Streams(api, api.NPUGraph),
    )
