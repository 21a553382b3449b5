"""The header of a GGUF file: metadata and where each tensor lies.

The `gguf` package reads the same header, but builds a numpy array for every string of the vocabulary: 3 CPU seconds
for 49,000 tokens against a tenth here. Its tensor types and dequantisation are used as they are.

    magic | version | tensor count | pair count | pairs (key, type, value) | tensors (name, shape, type, offset) | data
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xllm_lab.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# GGUF specification, `gguf_metadata_value_type`: number -> struct code.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BYTES_AT_ONCE = 1 << 13  # of the file; half of it in float32 fits the first-level cache of most cores


class TensorPlace(NamedTuple):
    """A tensor in the file.

    Attributes:
        shape: slowest dimension first, as torch has it; the file has it the other way round.
        ggml_type: number of its quantisation.
        start: of its bytes, from the beginning of the file.
    """

    shape: tuple[int, ...]
    ggml_type: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A parsed header. Tensors are read from the mapped file on demand."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]
    data: mmap.mmap

    def dequantised(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The tensor in float32.

        Raises:
            ModelError: a quantisation the `gguf` package cannot undo, or the file ends inside the tensor.
        """
        import gguf

        place = self.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(place.ggml_type)
            values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[kind]
            row_bytes = place.shape[-1] // values_per_block * bytes_per_block
            num_rows = math.prod(place.shape[:-1])
            if place.start + num_rows * row_bytes > len(self.data):
                raise ModelError(f"{self.path}: ends inside tensor {name}; the file is truncated")
            raw = np.frombuffer(self.data, np.uint8, num_rows * row_bytes, place.start)
            # The package loops over groups of 16 rows. Nobody's blocks cross a row's end, so that longer rows, made of
            # several, give the same values in fewer and larger steps.
            rows_at_once = math.gcd(num_rows, max(1, _BYTES_AT_ONCE // row_bytes))
            values = gguf.dequantize(_as_stored(raw.reshape(-1, rows_at_once * row_bytes), kind.name), kind)
        except (ValueError, KeyError, IndexError, OverflowError, NotImplementedError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                f"{self.path}: tensor {name} has ggml type {place.ggml_type}, unreadable: {error}"
            ) from error
        return np.array(values, dtype=np.float32, copy=kind.name == "F32" or None).reshape(place.shape)


def read_gguf(path: Path) -> GgufFile:
    """Parses a header.

    Raises:
        ModelError: the file is missing, not GGUF, of an unknown version, or truncated.
    """
    try:
        with path.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if data[:4] != _MAGIC:
        raise ModelError(f"{path}: starts with {data[:4]!r}, a GGUF file starts with {_MAGIC!r}")
    cursor = _Cursor(data, 4)
    try:
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            raise ModelError(f"{path}: GGUF version {version} is unknown; accepted are 2 and 3")
        num_tensors, num_pairs = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {cursor.string(): cursor.value() for _ in range(num_pairs)}
        places = {cursor.string(): cursor.place() for _ in range(num_tensors)}
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError) as error:
        raise ModelError(f"{path}: header is corrupt or truncated near byte {cursor.at}: {error}") from error
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: place._replace(start=start + place.start) for name, place in places.items()}
    return GgufFile(path, metadata, tensors, data)


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data, self.at = data, at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        text = self._data[self.at : self.at + length]
        if len(text) != length:
            raise struct.error(f"a string of {length} bytes")
        self.at += length
        return text.decode("utf-8")

    def value(self) -> Any:
        return self._value_of(self.scalar("I"))

    def place(self) -> TensorPlace:
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
        return TensorPlace(shape[::-1], self.scalar("I"), self.scalar("Q"))

    def _value_of(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            code = f"<{count}{_SCALARS[item]}"
            values = struct.unpack_from(code, self._data, self.at)
            self.at += struct.calcsize(code)
            return values
        read: Callable[[], Any] = self.string if item == _STRING else lambda: self._value_of(item)
        return tuple(read() for _ in range(count))


def _as_stored(raw: np.ndarray[Any, np.dtype[np.uint8]], kind: str) -> np.ndarray[Any, Any]:
    # gguf.dequantize takes unquantised tensors in their own type, all others as bytes.
    plain = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8")}
    return raw.view(plain[kind]) if kind in plain else raw
