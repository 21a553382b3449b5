"""Envelopes in Mooncake Store: memory that processes lend to one another, under one master.

Needs the wheel of constraints.txt (`pip install "xllm-lab[mooncake]"`) and libibverbs.so.1, which its transfer engine
is linked with even for TCP. Processes meet without a metadata server (P2PHANDSHAKE): Mooncake's own listens on every
interface whatever it is told, as of 0.3.13.

So do a process's own two sockets, by which others read the memory that it lends. Where only this machine shall reach
them, they are kept to the loopback device as soon as they are there (SO_BINDTODEVICE, socket(7)).
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import Any, Final

from xllm_lab.errors import ConfigError
from xllm_lab.store.envelope import Bytes

METADATA: Final = "P2PHANDSHAKE"
# ErrorCode of mooncake-store/include/types.h.
_NOT_FOUND, _INVALID_PARAMS, _TRANSFER_FAIL = -704, -600, -800
# For `get` and `put`, which copy; ours are read and written where they lie.
_LOCAL_BUFFER_BYTES: Final = 16 << 20
# Read by the library as it is loaded or set up; whoever has set one has his reasons.
_SETTINGS: Final = {"MC_STORE_CLIENT_SETUP_RETRIES": "1", "GLOG_minloglevel": "2", "MC_LOG_LEVEL": "ERROR"}


class MooncakeShelf:
    """One process's part in a Mooncake store.

    Attributes:
        described: the master, and where this process listens.
        listens_on: address and port of each socket that waits for others.
    """

    def __init__(self, master: str, *, segment_bytes: int, listen: str, protocol: str, rpc_timeout_ms: int) -> None:
        """Joins the store.

        Args:
            master: `HOST:PORT`.
            segment_bytes: memory lent to the store; with 0 this process reads and writes that of others.
            listen: this process's address for the others.
            rpc_timeout_ms: after which the library gives up on the master.

        Raises:
            ConfigError: the library or one it needs is missing, nobody answers as a master, or sockets of this process
                cannot be kept to the loopback device.
        """
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        for name in ("MC_RPC_TIMEOUT_MS", "MC_RPC_CONNECT_TIMEOUT_MS"):
            os.environ.setdefault(name, str(rpc_timeout_ms))
        keeps_to_loopback = _is_loopback(listen)
        library = _library()
        _expect_master(master, rpc_timeout_ms / 1000)
        before = set(listening_sockets())
        self._store = library.MooncakeDistributedStore()
        code = self._store.setup(listen, METADATA, segment_bytes, _LOCAL_BUFFER_BYTES, protocol, "", master)
        if code != 0:
            raise ConfigError(f"mooncake://{master}: the store cannot be joined (Mooncake's error {code})")
        self._config = library.ReplicateConfig()
        if segment_bytes:  # what is put here is read here most, and goes with nobody else
            self._config.preferred_segment = self._store.get_hostname()
        ours = [file for file in listening_sockets() if file not in before]
        if keeps_to_loopback:
            _keep_to_loopback(ours)
        self.listens_on = tuple(_address(file) for file in ours)
        where = ", ".join(self.listens_on) or "nothing"
        self.described = f"Mooncake, master {master}, {segment_bytes} bytes lent; listens on {where}"

    def prepare(self, memory: Bytes) -> None:
        """Register it with the transfer engine."""
        code = self._store.register_buffer(memory.ctypes.data, memory.nbytes)
        if code != 0:
            raise ConfigError(f"{memory.nbytes} bytes of memory cannot be registered (Mooncake's error {code})")

    def read(self, names: Sequence[str], slots: Bytes, used_ns: int) -> list[int | str | None]:
        """As `Shelf.read`."""
        codes = self._store.batch_get_into(list(names), *_places(slots))
        return [_found(code, slots.shape[1]) for code in codes]

    def write(self, names: Sequence[str], slots: Bytes, used_ns: int) -> list[str | None]:
        """As `Shelf.write`; the library keeps what is there already, and calls it put."""
        codes = self._store.batch_put_from(list(names), *_places(slots), self._config)
        return [None if code == 0 else f"Mooncake: put failed with {code}" for code in codes]

    def has(self, names: Sequence[str], used_ns: int) -> list[bool]:
        """As `Shelf.has`; the master keeps its own time."""
        return [code == 1 for code in self._store.batch_is_exist(list(names))]

    def forget(self, name: str) -> None:
        """Remove it, even where somebody has it leased."""
        self._store.remove(name, True)

    def num_evictions(self) -> int:
        """The master evicts, and does not tell."""
        return 0

    def close(self) -> None:
        """Leave; what this process lent is gone."""
        self._store.close()


def _is_loopback(listen: str) -> bool:
    try:
        return ipaddress.ip_address(listen).is_loopback
    except ValueError as error:
        raise ConfigError(f"listen is {listen!r}; an address of this machine is accepted, as 127.0.0.1") from error


def _library() -> Any:
    try:
        import mooncake.store
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{error.name} is not installed, which a store in Mooncake needs: pip install "xllm-lab[mooncake]"'
        ) from error
    except ImportError as error:
        raise ConfigError(
            f"Mooncake cannot be loaded ({error}); on Debian apt-get install libibverbs1 brings libibverbs.so.1"
        ) from error
    return mooncake.store


def _expect_master(master: str, timeout_s: float) -> None:
    host, _, port = master.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError as error:
        raise ConfigError(f"no Mooncake master answers at {master} ({error}); `make cluster` starts one") from error


def _places(slots: Bytes) -> tuple[list[int], list[int]]:
    """(Addresses, sizes) of the slots."""
    start, stride = slots.ctypes.data, slots.strides[0]
    return [start + k * stride for k in range(len(slots))], [slots.shape[1]] * len(slots)


def _found(code: int, slot_bytes: int) -> int | str | None:
    if code == _NOT_FOUND:
        return None
    if code == _INVALID_PARAMS:  # of ours only the room can be wrong: more is stored than a block has
        return slot_bytes + 1
    if code == _TRANSFER_FAIL:  # its owner is gone, as a rule; the master finds out after `client_ttl`, 10 s
        return 0
    return code if code >= 0 else f"Mooncake: get failed with {code}"


def listening_sockets() -> list[int]:
    """This process's files that are listening TCP sockets."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/self/net/{table}", encoding="ascii") as lines:
            inodes |= {cells[9] for line in lines if (cells := line.split())[3] == "0A"}  # TCP_LISTEN
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            kind, _, inode = os.readlink(f"/proc/self/fd/{name}").partition(":")
        except FileNotFoundError:  # of the listing itself
            continue
        if kind == "socket" and inode.strip("[]") in inodes:
            found.append(int(name))
    return sorted(found)


def _keep_to_loopback(files: Sequence[int]) -> None:
    for file in files:
        with socket.socket(fileno=os.dup(file)) as one:
            try:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
            except OSError as error:
                raise ConfigError(
                    f"Mooncake listens on every interface, and {_address(file)} cannot be kept to this machine "
                    f"({error.strerror}; Linux 5.7 can); listen=ADDRESS accepts that"
                ) from error


def _address(file: int) -> str:
    """Of a socket, with the device that it is kept to: `0.0.0.0%lo:16784`."""
    with socket.socket(fileno=os.dup(file)) as one:
        host, port = one.getsockname()[:2]
        device = one.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode("ascii")
    return f"{f'[{host}]' if ':' in host else host}{'%' + device if device else ''}:{port}"
