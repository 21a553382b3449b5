"""The registry in the router's own process: a thread that listens, and believes in whoever keeps saying so.

A lease is a connection. It is lost when that breaks, as it does the moment a process dies, or when nothing was said on
it for `TTL_S`, as when a process is stopped or its machine is gone.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Sequence

from xllm_lab.errors import ConfigError
from xllm_lab.registry import TTL_S, Change, Entry, Joined, Left, Mailbox, entry_from
from xllm_lab.wire import Channel, GoneError, address_of, connect, listen

_SCHEME = "embedded://"
_CONNECT_S = 10.0


class _Holder:
    """Whose lease a connection is, and until when."""

    def __init__(self, channel: Channel, until_s: float) -> None:
        self.channel = channel
        self.until_s = until_s
        self.entry: Entry | None = None


class EmbeddedRegistry:
    """A `Registry` that needs nothing else to run."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        try:
            self._listening = listen(host)
        except OSError as error:
            raise ConfigError(f"the registry cannot listen on {host}: {error.strerror or error}") from None
        self.url = _SCHEME + address_of(self._listening)
        self._mailbox = Mailbox()
        self._awake, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._awake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="registry", daemon=True)
        self._thread.start()

    def changes(self, wait_s: float = 0.0) -> Sequence[Change]:
        return self._mailbox.take(wait_s)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b".")
        self._thread.join()
        self._wake.close()

    def _serve(self) -> None:
        holders: dict[int, _Holder] = {}
        while True:
            for key, _ in self._selector.select(TTL_S / 10):
                if key.fileobj is self._awake:
                    self._end(holders)
                    return
                if key.fileobj is self._listening:
                    self._accept(holders)
                else:
                    self._listen_to(holders, key.fd)
            now_s = time.monotonic()
            for number in [n for n, holder in holders.items() if holder.until_s < now_s]:
                self._let_go(holders, number)

    def _accept(self, holders: dict[int, _Holder]) -> None:
        with contextlib.suppress(OSError):
            channel = Channel(self._listening.accept()[0])
            self._selector.register(channel, selectors.EVENT_READ)
            holders[channel.fileno()] = _Holder(channel, time.monotonic() + TTL_S)

    def _listen_to(self, holders: dict[int, _Holder], number: int) -> None:
        holder = holders.get(number)
        if holder is None:
            return
        try:
            for message in holder.channel.heard():
                holder.until_s = time.monotonic() + TTL_S
                if "entry" in message and holder.entry is None:
                    holder.entry = entry_from(str(message["entry"]))
                    if holder.entry is None:
                        raise GoneError("is nobody's entry")
                    self._mailbox.note(Joined(holder.entry))
        except GoneError:
            self._let_go(holders, number)

    def _let_go(self, holders: dict[int, _Holder], number: int) -> None:
        holder = holders.pop(number)
        self._selector.unregister(holder.channel)
        holder.channel.close()
        if holder.entry is not None:
            self._mailbox.note(Left(holder.entry.instance, holder.entry.incarnation))

    def _end(self, holders: dict[int, _Holder]) -> None:
        for holder in holders.values():
            holder.channel.close()
        self._selector.close()
        self._listening.close()
        self._awake.close()


class EmbeddedLease:
    """A `Lease` in such a registry."""

    def __init__(self, url: str, entry: Entry) -> None:
        try:
            self._channel = connect(url.removeprefix(_SCHEME), _CONNECT_S)
            self._channel.tell({"entry": entry.as_text()})
        except GoneError as error:
            raise ConfigError(f"registry {url}: {error}; accepted: one that runs") from None
        self._is_over = threading.Event()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    @property
    def is_lost(self) -> bool:
        return self._is_over.is_set()

    def close(self) -> None:
        self._is_over.set()
        self._channel.close()

    def _keep(self) -> None:
        with contextlib.suppress(GoneError):
            while not self._is_over.wait(TTL_S / 3):
                self._channel.tell({})
        self._is_over.set()
