"""What surrounds a block's bytes, so that whoever reads them knows that they are the ones he asked for.

    magic and version   8 bytes
    identity           16    `BlockIdentity.digest`
    key                16    the ledger's chained key: the block's tokens and all before it
    payload length      8    little endian
    checksum           16    XXH3-128 of the 48 bytes above and of the payload
    payload

The checksum finds accidents, it is no signature: who may write to a store is trusted not to forge.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import xxhash

Bytes = npt.NDArray[np.uint8]
Miss = Literal["absent", "short", "corrupted", "foreign", "failed", "late"]

MAGIC: Final = b"xllmkv\x00\x01"  # the last byte is the version
_SIGNED: Final = struct.Struct("<8s16s16sQ")
KEY_BYTES: Final = 16
HEADER_BYTES: Final = _SIGNED.size + 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockIdentity:
    """Whose KV it is and how it lies in memory: blocks of two identities never stand for each other.

    Attributes:
        model: names the weights themselves, as a checksum of them does; two fine-tunes differ here.
        layout: what the bytes of a block mean, in order; its author's word.
        dtype: of an element.
        block_size: tokens in a block.
        num_layers, num_kv_heads, head_dim: of the whole model.
        tp_rank, tp_size: which part of it, of how many.
    """

    model: str
    layout: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def digest(self) -> bytes:
        """Sixteen bytes, equal in every process and release."""
        told = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return xxhash.xxh3_128_digest(MAGIC + told.encode("ascii"))


def seal(envelope: Bytes, identity: bytes, key: bytes) -> None:
    """Write the header of an envelope, [HEADER_BYTES + payload], whose payload is there."""
    assert len(key) == KEY_BYTES, f"a block key of {len(key)} bytes"
    payload = envelope[HEADER_BYTES:]
    _SIGNED.pack_into(envelope.data, 0, MAGIC, identity, key, len(payload))
    envelope[_SIGNED.size : HEADER_BYTES] = np.frombuffer(_checksum(envelope), np.uint8)


def miss_of(envelope: Bytes, num_bytes: int, identity: bytes, key: bytes) -> Miss | None:
    """Why it is not the block asked for; None if it is.

    Args:
        envelope: as many bytes as the block has, of which `num_bytes` came.
    """
    if num_bytes != len(envelope):
        return "short"
    if _checksum(envelope) != envelope[_SIGNED.size : HEADER_BYTES].tobytes():
        return "corrupted"
    found = _SIGNED.unpack_from(envelope.data)
    return None if found == (MAGIC, identity, key, len(envelope) - HEADER_BYTES) else "foreign"


def _checksum(envelope: Bytes) -> bytes:
    digest = xxhash.xxh3_128(envelope[: _SIGNED.size].data)
    digest.update(envelope[HEADER_BYTES:].data)
    return digest.digest()
