"""A step written down while it runs, kernels and their arguments, so that it can run again without Python.

Operators that are our own kernels put their address and arguments on the tape; all others put a Python call there. What
a program repeats is exactly that, on the same memory: whoever records sees to it that addresses stay what they are.

    recorded    rms_norm  linear | torch.mm | swiglu  linear ...
    program     one C call       | Python   | one C call
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# By letter of a signature: how an argument fills its eight bytes.
_PACKED = {"p": "Q", "l": "q", "f": "f4x", "i": "i4x"}
_MOST_ARGUMENTS = 16  # as in kernels/replay.cpp


class Tape(Protocol):
    """Where calls go while they are recorded; it runs them, too, or hands them to a device that captures."""

    def kernel(self, kernel: Kernel, arguments: tuple[Any, ...]) -> None: ...

    def call(self, call: Callable[[], R]) -> R: ...

    def host_call(self, call: Callable[[], None]) -> None:
        """A call that reads the host's lists, and has to read them anew in each replay."""
        ...


class _Here(threading.local):
    tape: Tape | None = None
    updates = False


_here = _Here()


class Kernel:
    """A compiled function. Called, it runs; while its thread records, it is written down as well.

    Args:
        packed: the address of the same function, for arguments in an array.
    """

    __slots__ = ("_function", "_layout", "packed")

    def __init__(self, function: Callable[..., None], packed: int, signature: str) -> None:
        assert len(signature) <= _MOST_ARGUMENTS, f"{len(signature)} arguments"
        self._function, self.packed = function, packed
        self._layout = struct.Struct("<" + "".join(_PACKED[letter] for letter in signature))

    def __call__(self, *arguments: Any) -> None:
        tape = _here.tape
        if tape is not None:
            tape.kernel(self, arguments)
        else:
            self._function(*arguments)

    def run(self, arguments: tuple[Any, ...]) -> None:
        """Now, and unseen by any tape."""
        self._function(*arguments)

    def record(self, arguments: tuple[Any, ...]) -> bytes:
        """The call as `replay.cpp` reads it."""
        words = self._layout.pack(*(0 if argument is None else argument for argument in arguments))
        return struct.pack("<Q", self.packed) + words.ljust(8 * _MOST_ARGUMENTS, b"\0")


def taped(function: Callable[P, R]) -> Callable[P, R]:
    """An operator that is no kernel of ours, so that it is written down as well. Its result is where it was."""

    @functools.wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        tape = _here.tape
        if tape is not None:
            return tape.call(functools.partial(function, *arguments, **named))
        return function(*arguments, **named)

    return run


def reads_host(function: Callable[P, None]) -> Callable[P, None]:
    """As `taped`, for an operator whose arguments are lists of the host's, other ones in each step."""

    @functools.wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        tape = _here.tape
        if tape is not None:
            tape.host_call(functools.partial(function, *arguments, **named))
        else:
            function(*arguments, **named)

    return run


def is_captured() -> bool:
    """Whether what this thread calls goes into a graph, so that nothing can be read back."""
    return _here.tape is not None or _here.updates


@contextmanager
def updating() -> Iterator[None]:
    """What this thread calls meanwhile replaces a call in a graph."""
    _here.updates = True
    try:
        yield
    finally:
        _here.updates = False


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """What this thread calls meanwhile is on the tape."""
    assert _here.tape is None, "one tape at a time"
    _here.tape = tape
    try:
        yield
    finally:
        _here.tape = None


@contextmanager
def _unseen() -> Iterator[None]:
    tape, _here.tape = _here.tape, None
    try:
        yield
    finally:
        _here.tape = tape


class Program:
    """A tape for kernels on a CPU, and what comes of it.

    Args:
        replay: `replay` of the compiled kernels; None where there are none, and everything is a Python call.

    Attributes:
        num_kernels: kernels that are replayed.
        num_calls: calls from Python that a replay takes, those of whole runs of kernels included.
    """

    def __init__(self, replay: Callable[[Any, int], None] | None) -> None:
        self._replay = replay
        self._pieces: list[Callable[[], object]] = []
        self._kernels: list[bytes] = []
        self.num_kernels = 0

    @property
    def num_calls(self) -> int:
        return len(self._pieces)

    def kernel(self, kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        self._kernels.append(kernel.record(arguments))
        self.num_kernels += 1
        kernel.run(arguments)

    def call(self, call: Callable[[], R]) -> R:
        self._close_piece()
        self._pieces.append(call)
        with _unseen():  # kernels that it calls are its own affair, now and in each replay
            return call()

    host_call = call

    def close(self) -> Callable[[], object]:
        """What repeats it all."""
        self._close_piece()
        pieces = tuple(self._pieces)

        def run() -> None:
            for piece in pieces:
                piece()

        return pieces[0] if len(pieces) == 1 else run

    def _close_piece(self) -> None:
        if not self._kernels:
            return
        replay, count = self._replay, len(self._kernels)
        assert replay is not None, "kernels without a library"
        records = ctypes.create_string_buffer(b"".join(self._kernels), count * 8 * (_MOST_ARGUMENTS + 1))
        self._pieces.append(lambda: replay(records, count))
        self._kernels = []
