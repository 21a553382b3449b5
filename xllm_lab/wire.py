"""What the processes of a fleet say to one another: JSON objects, one a line, over a socket. Nothing else is read.

A line that is no JSON object, or longer than `MOST_BYTES`, ends the conversation: whoever wrote it is not one of us.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections import deque
from collections.abc import Mapping
from typing import Any

# A prompt of a million tokens, or a whole prefix index of a hundred thousand blocks, is a tenth of it.
MOST_BYTES = 1 << 26
_PIECE_BYTES = 1 << 16


class GoneError(Exception):
    """Who is spoken to is not there any more, or says what nobody understands."""


class Channel:
    """One end of a conversation."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._socket.setblocking(True)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._partial = bytearray()
        self._heard: deque[dict[str, Any]] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Say something. GoneError: nobody listens."""
        try:
            self._socket.sendall(json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise GoneError(f"the connection broke: {error.strerror or error}") from None

    def hear(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """What is said next; None if nothing is said in time, which None makes for ever. GoneError: nobody speaks."""
        while not self._heard:
            if not select.select([self._socket], [], [], timeout_s)[0]:
                return None
            self._read()
        return self._heard.popleft()

    def heard(self) -> list[dict[str, Any]]:
        """All that was said by now, without waiting. GoneError: nobody speaks, and all was heard."""
        gone: GoneError | None = None
        try:
            while select.select([self._socket], [], [], 0)[0]:
                self._read()
        except GoneError as error:
            gone = error
        said = list(self._heard)
        self._heard.clear()
        if gone is not None and not said:
            raise gone
        return said

    def close(self) -> None:
        """The other end hears of it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        try:
            piece = self._socket.recv(_PIECE_BYTES)
        except OSError as error:
            raise GoneError(f"the connection broke: {error.strerror or error}") from None
        if not piece:
            raise GoneError("the connection was closed")
        self._partial += piece
        if b"\n" not in piece:
            if len(self._partial) > MOST_BYTES:
                raise GoneError(f"said a line of more than {MOST_BYTES} bytes")
            return
        *lines, rest = self._partial.split(b"\n")
        self._partial = bytearray(rest)
        self._heard += [_object(line) for line in lines]


def _object(line: bytes | bytearray) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise GoneError("said what is no JSON") from None
    if not isinstance(value, dict):
        raise GoneError("said what is no JSON object")
    return value


def listen(host: str) -> socket.socket:
    """A socket that listens on a free port. OSError if the host is none of this machine's."""
    return socket.create_server((host, 0))


def address_of(listening: socket.socket) -> str:
    """Where it listens, HOST:PORT."""
    host, port = listening.getsockname()[:2]
    return f"{host}:{port}"


def connect(address: str, timeout_s: float) -> Channel:
    """Speak to whoever listens at HOST:PORT. GoneError: nobody does."""
    host, _, port = address.rpartition(":")
    try:
        return Channel(socket.create_connection((host, int(port)), timeout_s))
    except (OSError, ValueError) as error:
        raise GoneError(f"nobody answers at {address}: {error}") from None
