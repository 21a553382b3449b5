"""A store from a line of text, as options and configurations give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from xllm_lab.errors import ConfigError
from xllm_lab.store.block_store import BlockStore
from xllm_lab.store.directory import DirectoryShelf
from xllm_lab.store.envelope import HEADER_BYTES, BlockIdentity
from xllm_lab.store.shelf import Shelf
from xllm_lab.store_spec import Options, count_of, options_of, size_of

ACCEPTED: Final = "dir:/PATH?bytes=20GiB, or mooncake://127.0.0.1:50051?segment_bytes=4GiB"
# Eight blocks a call are xLLM's own example of `prefetch_batch_size`; a lane's memory stays within 64 MiB.
_BATCH_BLOCKS, _BATCH_BYTES = 8, 64 << 20
_NUM_LANES = 4


def open_store(spec: str, identity: BlockIdentity, block_bytes: int) -> BlockStore:
    """The store that `spec` names, for blocks of one identity and size.

        dir:/PATH?bytes=SIZE                  files; SIZE is what all processes' files may take, default 10GiB
        mooncake://HOST:PORT?OPTION=VALUE&... the master's address, and
            segment_bytes=SIZE    memory this process lends to the store, default 0: it only reads and writes others'
            listen=ADDRESS        of this process, for those who read that memory, default 127.0.0.1
            protocol=tcp          or whatever else the library was built for
            rpc_timeout_ms=N      after which the library gives up on the master, default 1000

    Both take `batch_blocks` (blocks a call asks the shelf for) and `lanes` (calls at a time). A SIZE is a number of
    bytes, or of KiB, MiB, GiB or TiB.

    Args:
        block_bytes: of one block, all layers together, without envelope.

    Raises:
        ConfigError: anything else; a directory that cannot be used; Mooncake, or a library it needs, not installed; no
            master where it is said to be.
    """
    if block_bytes < 1:
        raise ConfigError(f"block_bytes is {block_bytes}; at least 1 is accepted")
    scheme = spec.partition(":")[0]
    if scheme not in _OPENERS:
        raise ConfigError(f"{spec!r} names no store of KV blocks; accepted are {ACCEPTED}")
    options = options_of(spec)
    at_once = max(1, min(_BATCH_BLOCKS, _BATCH_BYTES // (HEADER_BYTES + block_bytes)))
    batch_blocks = count_of(spec, options, "batch_blocks", at_once)
    num_lanes = count_of(spec, options, "lanes", _NUM_LANES)
    shelf = _OPENERS[scheme](spec, options)
    return BlockStore(shelf, identity, block_bytes, batch_blocks=batch_blocks, num_lanes=num_lanes)


def directory_of(spec: str) -> Path | None:
    """Where the blocks of the store lie that `spec` names, if they are files; ConfigError for a directory unnamed."""
    scheme, _, rest = spec.partition(":")
    if scheme != "dir":
        return None
    if not (path := unquote(rest.partition("?")[0])):
        raise ConfigError(f"{spec!r} has no path; accepted is dir:/PATH?bytes=20GiB")
    return Path(path)


def _open_directory(spec: str, options: Options) -> Shelf:
    path = directory_of(spec)
    assert path is not None, "the scheme was looked at"
    capacity_bytes = size_of(spec, options, "bytes", 10 << 30)
    _expect_all_known(spec, options, ("bytes", "batch_blocks", "lanes"))
    return DirectoryShelf(path, capacity_bytes)


def _open_mooncake(spec: str, options: Options) -> Shelf:
    try:
        address = urlsplit(spec)
        host, port = address.hostname, address.port
    except ValueError:
        host = port = None
    if host is None or port is None or address.path not in ("", "/"):
        raise ConfigError(f"{spec!r} has no address of a master; accepted is mooncake://127.0.0.1:50051")
    segment_bytes = size_of(spec, options, "segment_bytes", 0)
    rpc_timeout_ms = count_of(spec, options, "rpc_timeout_ms", 1000)
    listen, protocol = options.pop("listen", "127.0.0.1"), options.pop("protocol", "tcp")
    known = ("segment_bytes", "listen", "protocol", "rpc_timeout_ms", "batch_blocks", "lanes")
    _expect_all_known(spec, options, known)
    from xllm_lab.store.mooncake import MooncakeShelf

    return MooncakeShelf(
        f"{host}:{port}", segment_bytes=segment_bytes, listen=listen, protocol=protocol, rpc_timeout_ms=rpc_timeout_ms
    )


_OPENERS: Final[Mapping[str, Callable[[str, Options], Shelf]]] = {"dir": _open_directory, "mooncake": _open_mooncake}


def _expect_all_known(spec: str, left: Options, known: tuple[str, ...]) -> None:
    for name in left:
        raise ConfigError(f"{spec!r}: {name!r} is no option of this store; accepted are {', '.join(known)}")
