"""An envelope says whose block it is, and no other bytes pass for it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.store.places import IDENTITY
from xllm_lab.store.envelope import HEADER_BYTES, BlockIdentity, Bytes, miss_of, seal

KEYS = st.binary(min_size=16, max_size=16)
PAYLOADS = st.binary(min_size=1, max_size=300)


def sealed(payload: bytes, key: bytes, identity: BlockIdentity = IDENTITY) -> Bytes:
    envelope = np.zeros(HEADER_BYTES + len(payload), np.uint8)
    envelope[HEADER_BYTES:] = np.frombuffer(payload, np.uint8)
    seal(envelope, identity.digest, key)
    return envelope


@given(payload=PAYLOADS, key=KEYS)
def test_what_was_sealed_is_right(payload: bytes, key: bytes) -> None:
    envelope = sealed(payload, key)
    assert miss_of(envelope, len(envelope), IDENTITY.digest, key) is None
    assert envelope[HEADER_BYTES:].tobytes() == payload


@given(payload=PAYLOADS, key=KEYS, data=st.data())
def test_no_flipped_bit_passes(payload: bytes, key: bytes, data: st.DataObject) -> None:
    """In the header, in the checksum itself, or in the payload."""
    envelope = sealed(payload, key)
    position = data.draw(st.integers(0, len(envelope) - 1))
    envelope[position] ^= data.draw(st.integers(1, 255))
    assert miss_of(envelope, len(envelope), IDENTITY.digest, key) == "corrupted"


@given(payload=PAYLOADS, key=KEYS, data=st.data())
def test_another_length_is_short(payload: bytes, key: bytes, data: st.DataObject) -> None:
    envelope = sealed(payload, key)
    came = data.draw(st.integers(0, 2 * len(envelope)).filter(lambda n: n != len(envelope)))
    assert miss_of(envelope, came, IDENTITY.digest, key) == "short"


@given(payload=PAYLOADS, key=KEYS, other=KEYS)
def test_a_block_of_another_key_is_foreign(payload: bytes, key: bytes, other: bytes) -> None:
    envelope = sealed(payload, key)
    assert miss_of(envelope, len(envelope), IDENTITY.digest, other) == (None if key == other else "foreign")


def test_every_part_of_an_identity_tells() -> None:
    """Other weights, another layout, type or share of the model: never the same block."""
    key = b"k" * 16
    for field in fields(BlockIdentity):
        value = getattr(IDENTITY, field.name)
        changed: dict[str, Any] = {field.name: value + 1 if isinstance(value, int) else value + "'"}
        other = replace(IDENTITY, **changed)
        assert miss_of(sealed(b"kv", key, other), HEADER_BYTES + 2, IDENTITY.digest, key) == "foreign", field.name


def test_an_identity_means_the_same_tomorrow() -> None:
    """Files outlive the process that wrote them; another release that changes this must change the version."""
    assert IDENTITY.digest.hex() == "fb5b1183adbf63d29ca23910d1096acf"
