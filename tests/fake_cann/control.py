"""The fake device from Python: loading it before torch, its settings, its counters, and launches of device work.

Import order matters: `load()` must run before the first `import torch` of the process, because torch imports torch_npu,
and torch_npu needs the libraries. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import build

Order = Literal["program", "shuffled", "threads"]
ORDERS: tuple[Order, ...] = ("program", "shuffled", "threads")

_library: ctypes.CDLL | None = None
_hccl: ctypes.CDLL | None = None


@dataclass(frozen=True)
class Count:
    """How often something happened, and how many bytes it concerned (zero where bytes mean nothing)."""

    calls: int
    bytes: int


class Counts(dict[str, Count]):
    """Counters by name; a name that never counted reads as zero calls."""

    def __missing__(self, name: str) -> Count:
        return Count(0, 0)

    def calls(self, *names: str) -> dict[str, int]:
        """The named counters' calls, or all of them: what a budget is compared with."""
        return {name: self[name].calls for name in names or sorted(self)}

    def launches(self) -> dict[str, int]:
        """Work launched on the device, by operator name."""
        return {name.removeprefix("launch:"): one.calls for name, one in self.items() if name.startswith("launch:")}

    def starting(self, prefix: str) -> int:
        return sum(one.calls for name, one in self.items() if name.startswith(prefix))


def load(folder: Path | None = None, *, num_devices: int = 2) -> None:
    """Builds the libraries if need be and makes them visible to torch_npu. Call it before torch is imported.

    TASK_QUEUE_ENABLE=0: launches reach the runtime on the thread that makes them, so that counts and errors belong to
    the line that caused them.
    """
    global _library, _hccl
    if _library is not None:
        return
    if "torch" in sys.modules:
        raise RuntimeError("fake CANN must be loaded before torch is imported")
    os.environ.pop("ASCEND_HOME_PATH", None)  # with it, torch_npu demands the files of a CANN installation
    os.environ["TASK_QUEUE_ENABLE"] = "0"
    where = build.build(folder or Path(os.environ.get("FAKE_CANN_LIB", build.DEFAULT_FOLDER)))
    loaded = {name: ctypes.CDLL(str(where / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in build.LIBRARIES}
    _library, _hccl = loaded["ascendcl"], loaded["hccl"]
    _declare(_library)
    _library.fake_set_num_devices(num_devices)
    _library.fake_set_python_call(_call_python)


def attach_poison() -> None:
    """Poisons what torch's caching allocator hands out and takes back. After torch_npu is imported."""
    folder = Path(library()._name).parent
    ctypes.CDLL(str(folder / f"lib{build.POISON}.so"), mode=ctypes.RTLD_GLOBAL).fake_poison_allocator()


def library() -> ctypes.CDLL:
    assert _library is not None, "load() comes first"
    return _library


def hccl() -> ctypes.CDLL:
    assert _hccl is not None, "load() comes first"
    return _hccl


def _declare(cann: ctypes.CDLL) -> None:
    u64, text = ctypes.c_uint64, ctypes.c_char_p
    arguments: dict[str, list[type]] = {
        "fake_set_order": [ctypes.c_int, u64, u64],
        "fake_set_hbm_bytes": [u64],
        "fake_set_page_bytes": [u64],
        "fake_set_num_devices": [ctypes.c_uint32],
        "fake_set_timeout_ms": [u64],
        "fake_launch_python": [ctypes.c_void_p, u64, text],
        "fake_read_counts": [text, ctypes.c_size_t],
        "fake_take_released": [ctypes.POINTER(u64), ctypes.c_size_t],
        "fake_count": [text, u64],
        "fake_stream_is_capturing": [ctypes.c_void_p],
        "aclrtSynchronizeStream": [ctypes.c_void_p],
    }
    for name, types in arguments.items():
        getattr(cann, name).argtypes = types
    cann.fake_read_counts.restype = ctypes.c_size_t
    cann.fake_take_released.restype = ctypes.c_size_t


# Settings -------------------------------------------------------------------------------------------------------------
def set_order(order: Order, *, seed: int = 0, max_delay_us: int = 0) -> None:
    """How queued work runs from now on; waits for what is queued.

    program:  at launch, in the order of launches as far as events allow. Deterministic; nothing is ever late.
    shuffled: only when the host waits, drawing the next stream from `seed`. Deterministic; everything is late. For one
              process (a peer's collective would wait for a host that does not wait).
    threads:  a thread per stream, which sleeps up to `max_delay_us` (drawn from `seed`) before each task.
    """
    library().fake_set_order(ORDERS.index(order), seed, max_delay_us)
    raise_device_failure()


@contextmanager
def order(name: Order, *, seed: int = 0, max_delay_us: int = 0) -> Iterator[None]:
    """`set_order` for the time of a `with`, and back to program order."""
    set_order(name, seed=seed, max_delay_us=max_delay_us)
    try:
        yield
    finally:
        set_order("program")


@contextmanager
def hbm(num_bytes: int) -> Iterator[None]:
    """A device of `num_bytes` of memory for the time of a `with` (64 GiB otherwise)."""
    library().fake_set_hbm_bytes(num_bytes)
    try:
        yield
    finally:
        library().fake_set_hbm_bytes(64 << 30)


@contextmanager
def page_bytes(num_bytes: int) -> Iterator[None]:
    """A device whose physical memory comes in pages of so many bytes for the time of a `with` (2 MiB otherwise)."""
    library().fake_set_page_bytes(num_bytes)
    try:
        yield
    finally:
        library().fake_set_page_bytes(2 << 20)


@contextmanager
def no_poison() -> Iterator[None]:
    library().fake_set_poison(0)
    try:
        yield
    finally:
        library().fake_set_poison(1)


def set_timeout_ms(milliseconds: int) -> None:
    """How long a host wait may last before it is an error (507046): the wait for an event that nobody records."""
    library().fake_set_timeout_ms(milliseconds)


# Counters -------------------------------------------------------------------------------------------------------------
def read_counts() -> Counts:
    size = library().fake_read_counts(None, 0)
    text = ctypes.create_string_buffer(size + 4096)
    library().fake_read_counts(text, size + 4096)
    rows = (line.split("\t") for line in text.value.decode().splitlines())
    return Counts({name: Count(int(calls), int(num_bytes)) for name, calls, num_bytes in rows})


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts what happens inside the `with`; the counters are filled in when it ends."""
    before = read_counts()
    counts = Counts()
    yield counts
    for name, after in read_counts().items():
        if after != before[name]:
            counts[name] = Count(after.calls - before[name].calls, after.bytes - before[name].bytes)


# Device work ----------------------------------------------------------------------------------------------------------
_functions: dict[int, Callable[[], None]] = {}
_numbers = itertools.count(1)
_failures: list[BaseException] = []  # of kernels; the first is what is told
_RELEASED = (ctypes.c_uint64 * 256)()


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)
def _call_python(number: int) -> int:
    try:
        _functions[number]()
    except BaseException as failure:
        _failures.append(failure)
        return 1
    return 0


def launch(stream: int, name: str, function: Callable[[], None]) -> None:
    """Queues `function` as one kernel called `name` on a stream (its raw address; 0 is the default stream).

    A graph capture records it instead, and runs it at each replay: it must hold addresses, not results.

    Raises:
        Exception: what a kernel raised before, here or on another stream: the device is dead from then on.
        RuntimeError: the runtime refuses the launch.
    """
    taken = library().fake_take_released(_RELEASED, len(_RELEASED))
    for number in _RELEASED[:taken]:
        del _functions[number]
    number = next(_numbers)
    _functions[number] = function
    error = library().fake_launch_python(stream, number, name.encode())
    raise_device_failure()
    if error:
        raise RuntimeError(f"launch of {name}: ACL error {error}")


def raise_device_failure() -> None:
    """Raises what a kernel raised, and revives the device so that the next test starts well."""
    if _failures:
        first = _failures[0]
        forget_failure()
        raise first


def forget_failure() -> None:
    _failures.clear()
    library().fake_clear_device_error()


def capturing(stream: int) -> bool:
    return bool(library().fake_stream_is_capturing(stream))


# Collectives inside an operator ---------------------------------------------------------------------------------------
def group_rank(name: str) -> int:
    """This process's rank in the communicator of that name (`get_hccl_comm_name`), -1 if there is none."""
    return int(hccl().fake_hccl_rank(name.encode()))


def group_size(name: str) -> int:
    return int(hccl().fake_hccl_size(name.encode()))
