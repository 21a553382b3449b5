"""Where tests put blocks, and how they get at the bytes behind the store's back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xllm_lab.cluster_services import LOOPBACK, Service, free_ports, start_master
from xllm_lab.store import BlockIdentity, BlockStore, open_store

IDENTITY = BlockIdentity(
    model="weights of a test", layout="k, v by layer", dtype="bf16", block_size=16, num_layers=2, num_kv_heads=2,
    head_dim=64,
)  # fmt: skip
# Long enough for any call that is answered; whatever is late is answered by nobody.
PATIENT_US = 20_000_000


class Place(Protocol):
    """One kind of store.

    Attributes:
        spec: opens it, for reading and writing.
        reading_spec: opens it without lending it anything.
    """

    spec: str
    reading_spec: str

    def stored(self, name: str) -> bytes | None:
        """An envelope as it lies there."""

    def replace(self, name: str, envelope: bytes) -> None:
        """Put another in its place."""


class DirectoryPlace:
    """A folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = self.reading_spec = f"dir:{folder}?bytes=64MiB"

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.kv"

    def stored(self, name: str) -> bytes | None:
        try:
            return self.file(name).read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, name: str, envelope: bytes) -> None:
        self.file(name).parent.mkdir(exist_ok=True)
        self.file(name).write_bytes(envelope)


class MooncakePlace:
    """A master of the test, and a client of its own."""

    def __init__(self, port: int) -> None:
        self.reading_spec = f"mooncake://{LOOPBACK}:{port}"
        self.spec = f"{self.reading_spec}?segment_bytes=64MiB"
        self._master = f"{LOOPBACK}:{port}"
        self._own: Any = None

    def stored(self, name: str) -> bytes | None:
        found: bytes = self._client().get(name)
        return found or None

    def replace(self, name: str, envelope: bytes) -> None:
        self._client().remove(name, True)
        assert self._client().put(name, envelope) == 0

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    def _client(self) -> Any:
        if self._own is None:
            from mooncake.store import MooncakeDistributedStore

            self._own = MooncakeDistributedStore()
            assert self._own.setup(LOOPBACK, "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", self._master) == 0
        return self._own


@contextmanager
def mooncake_master(*options: str) -> Iterator[tuple[int, Service]]:
    """(Port, process) of a master on free ports."""
    port, metrics_port = free_ports(2)
    with start_master(port=port, metrics_port=metrics_port, options=options) as master:
        yield port, master


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[Place]:
    """A place of this kind."""
    if kind == "directory":
        yield DirectoryPlace(folder)
        return
    with mooncake_master() as (port, _):
        place = MooncakePlace(port)
        yield place
        place.close()


def store_at(spec: str, block_bytes: int = 1024, identity: BlockIdentity = IDENTITY, **options: object) -> BlockStore:
    """A store of small blocks, two to a batch, so that a few blocks are several batches."""
    given = {"batch_blocks": 2, **options}
    told = "&".join(f"{name}={value}" for name, value in given.items())
    return open_store(f"{spec}{'&' if '?' in spec else '?'}{told}", identity, block_bytes)


def name_of(key: bytes, identity: BlockIdentity = IDENTITY) -> str:
    """What a shelf calls a block."""
    return f"{identity.digest.hex()}/{key.hex()}"


def key_of(*numbers: int) -> bytes:
    """A key that no other numbers have."""
    return b"".join(number.to_bytes(4, "little") for number in numbers).ljust(16, b"\0")


def content(key: bytes, block_bytes: int) -> bytes:
    """The only right bytes of a block, as its key says."""
    return np.random.default_rng(list(key)).bytes(block_bytes)


def room(num_blocks: int, block_bytes: int = 1024) -> list[list[bytearray]]:
    """Memory for blocks, each in two parts; 0xEE wherever nothing was copied."""
    half = block_bytes // 2
    return [[bytearray(b"\xee" * half), bytearray(b"\xee" * (block_bytes - half))] for _ in range(num_blocks)]


def told(parts: list[bytearray]) -> bytes:
    return b"".join(parts)


def untouched(parts: list[bytearray]) -> bool:
    return set(told(parts)) <= {0xEE}
