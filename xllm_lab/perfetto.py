"""Perfetto's own trace format, as far as a timeline needs it: tracks, slices with arguments, counters.

A trace is a sequence of `TracePacket`s. Field numbers are those of google/perfetto v59, protos/perfetto/trace/:
trace_packet, track_event/{track_event,track_descriptor,counter_descriptor,process_descriptor,debug_annotation},
interned_data. Perfetto calls Chrome's JSON a legacy format, read as well as can be; this one is a third of its size.

Packets of one kind are encoded together, as the rows of a matrix of bytes: each number takes as many bytes as the
largest one in its column. Protocol buffers allow such unneeded length, Perfetto's own writer uses it for sizes, and
gzip takes it away again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Bytes: TypeAlias = npt.NDArray[np.uint8]


class Label(NamedTuple):
    """A text per row: `text`, then the row's number with `num_digits` digits."""

    text: str
    number: Ints
    num_digits: int


Value: TypeAlias = "int | str | Ints | Label | Fields"
Fields: TypeAlias = Sequence[tuple[int, Value]]

_PACKET = 1  # Trace.packet
_TIMESTAMP, _SEQUENCE_ID, _TRACK_EVENT, _INTERNED_DATA, _SEQUENCE_FLAGS, _TRACK_DESCRIPTOR = 8, 10, 11, 12, 13, 60
_STATE_CLEARED, _NEEDS_STATE = 1, 2
_DEBUG_ANNOTATIONS, _TYPE, _NAME_IID, _TRACK_UUID, _NAME, _COUNTER_VALUE = 4, 9, 10, 11, 23, 30
_SLICE_BEGIN, _SLICE_END, _COUNTER = 1, 2, 4
_ANNOTATION_NAME_IID, _ANNOTATION_UINT, _ANNOTATION_STRING_IID = 1, 3, 17
_UUID, _TRACK_NAME, _PROCESS, _PARENT_UUID, _TRACK_COUNTER, _CHILD_ORDERING, _SIBLING_RANK = 1, 2, 3, 5, 8, 11, 12
_PID, _SORT_INDEX, _PROCESS_NAME = 1, 3, 6
_EXPLICIT = 3
_EVENT_NAMES, _ANNOTATION_NAMES, _ANNOTATION_STRINGS = 2, 3, 29
_NS_PER_US = 1000


class Sink(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> int: ...


class Word(NamedTuple):
    """An argument's value that is one of few texts: interned ids, one a row."""

    iid: Ints


Arguments: TypeAlias = Mapping[str, "Ints | Word"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """Slices, each with smaller ones inside. All arrays have shape [slices]; those of the parts, [parts].

    On each track, slices come in order of time and do not overlap.

    Attributes:
        part_of: index of the slice that a part lies in; never decreases, and the parts of one slice are in order.
        part_name: interned name of each part.
    """

    track: Ints
    start_us: Ints
    end_us: Ints
    name: Label
    arguments: Arguments
    part_of: Ints
    part_name: Ints
    part_start_us: Ints
    part_end_us: Ints


class TraceWriter:
    """Writes packets to a file as they come; what it keeps is the names that it has seen."""

    def __init__(self, file: Sink) -> None:
        self._file = file
        self._num_tracks = 0
        self._interned: dict[tuple[int, str], int] = {}
        self._put(_packets([(_SEQUENCE_FLAGS, _STATE_CLEARED)], 1))

    def process(self, name: str, pid: int) -> int:
        """A group of tracks; groups are shown in order of their `pid`, which is above 0. Returns its id."""
        process: Fields = [(_PID, pid), (_SORT_INDEX, pid), (_PROCESS_NAME, name)]
        return self._track([(_PROCESS, process), (_CHILD_ORDERING, _EXPLICIT)])

    def track(self, name: str, parent: int, rank: int, *, is_counter: bool = False) -> int:
        """A track, or a heading that folds others; siblings are shown in order of `rank`. Returns its id."""
        kind: Fields = [(_TRACK_COUNTER, [])] if is_counter else [(_CHILD_ORDERING, _EXPLICIT)]
        return self._track([(_TRACK_NAME, name), (_PARENT_UUID, parent), (_SIBLING_RANK, rank), *kind])

    def name(self, text: str) -> int:
        """Interned id of a slice's name."""
        return self._intern(_EVENT_NAMES, text)

    def word(self, text: str) -> int:
        """Interned id of an argument's value."""
        return self._intern(_ANNOTATION_STRINGS, text)

    def flat_slices(self, track: int, start_us: Ints, end_us: Ints, name: Ints, arguments: Arguments) -> None:
        """Slices of one track, in order, that do not overlap; `name` is interned, all of shape [slices]."""
        begin = self._begin(start_us, track, (_NAME_IID, name), arguments)
        self._put(np.hstack((begin, _end(end_us, track))))

    def slices(self, slices: Slices) -> None:
        """Slices and their parts, each slice's packets together and in order of time."""
        track = slices.track[slices.part_of]
        part = self._begin(slices.part_start_us, track, (_NAME_IID, slices.part_name), {})
        owners = np.arange(len(slices.track))
        kinds = (
            (owners, self._begin(slices.start_us, slices.track, (_NAME, slices.name), slices.arguments)),
            (slices.part_of, np.hstack((part, _end(slices.part_end_us, track)))),
            (owners, _end(slices.end_us, slices.track)),
        )
        self._put(_interleaved(kinds))

    def counter(self, track: int, at_us: Ints, value: Ints) -> None:
        """Values of a counter from `at_us` on, both of shape [samples]."""
        event: Fields = [(_TYPE, _COUNTER), (_TRACK_UUID, track), (_COUNTER_VALUE, value)]
        self._put(_events(at_us, event))

    def _begin(self, at_us: Ints, track: int | Ints, name: tuple[int, Value], arguments: Arguments) -> Bytes:
        event: list[tuple[int, Value]] = [(_TYPE, _SLICE_BEGIN), (_TRACK_UUID, track), name]
        for key, value in arguments.items():
            told = (_ANNOTATION_STRING_IID, value.iid) if isinstance(value, Word) else (_ANNOTATION_UINT, value)
            event.append((_DEBUG_ANNOTATIONS, [(_ANNOTATION_NAME_IID, self._intern(_ANNOTATION_NAMES, key)), told]))
        return _events(at_us, event)

    def _track(self, described: Fields) -> int:
        self._num_tracks += 1
        self._put(_packets([(_TRACK_DESCRIPTOR, [(_UUID, self._num_tracks), *described])], 1))
        return self._num_tracks

    def _intern(self, kind: int, text: str) -> int:
        known = self._interned.get((kind, text))
        if known is not None:
            return known
        iid = len(self._interned) + 1
        self._interned[kind, text] = iid
        # The id is field 1 and the text field 2 in each of the messages that intern a text.
        entry: Fields = [(1, iid), (2, text)]
        self._put(_packets([(_INTERNED_DATA, [(kind, entry)]), (_SEQUENCE_FLAGS, _NEEDS_STATE)], 1))
        return iid

    def _put(self, packets: Bytes) -> None:
        self._file.write(packets.tobytes())


def _end(at_us: Ints, track: int | Ints) -> Bytes:
    return _events(at_us, [(_TYPE, _SLICE_END), (_TRACK_UUID, track)])


def _events(at_us: Ints, event: Fields) -> Bytes:
    packet: Fields = [
        (_TIMESTAMP, at_us * _NS_PER_US),
        (_SEQUENCE_FLAGS, _NEEDS_STATE),
        (_TRACK_EVENT, event),
    ]
    return _packets(packet, len(at_us))


def _packets(packet: Fields, num_rows: int) -> Bytes:
    return encode([(_PACKET, [(_SEQUENCE_ID, 1), *packet])], num_rows)


def _interleaved(kinds: Sequence[tuple[Ints, Bytes]]) -> Bytes:
    """The rows of matrices of different widths in one line, ordered by (owner, kind, place); shape [bytes]."""
    order = np.argsort(np.concatenate([owner for owner, _ in kinds]), kind="stable")
    widths = np.concatenate([np.full(len(rows), rows.shape[1]) for _, rows in kinds])
    starts = np.empty(len(order), dtype=np.int64)
    starts[order] = np.cumsum(widths[order]) - widths[order]
    out = np.empty(int(widths.sum()), dtype=np.uint8)
    first = 0
    for _, rows in kinds:
        at = starts[first : first + len(rows)]
        out[at[:, None] + np.arange(rows.shape[1])] = rows
        first += len(rows)
    return out


def encode(fields: Fields, num_rows: int) -> Bytes:
    """Messages with the same fields, one a row: shape [rows, bytes].

    Args:
        fields: (field number, value) in the order they are written. Numbers are at least 0; an array has shape [rows].
    """
    pieces = [piece for number, value in fields for piece in _pieces(number, value, num_rows)]
    out = np.empty((num_rows, sum(p.shape[1] for p in pieces)), dtype=np.uint8)
    at = 0
    for piece in pieces:
        out[:, at : at + piece.shape[1]] = piece
        at += piece.shape[1]
    return out


def _pieces(number: int, value: Value, num_rows: int) -> list[Bytes]:
    """Tag, length and content; of one row where all rows are the same."""
    if isinstance(value, int):
        return [_varints(np.asarray([number << 3])), _varints(np.asarray([value]))]
    if isinstance(value, np.ndarray):
        return [_varints(np.asarray([number << 3])), _varints(value)]
    content = _content(value, num_rows)
    return [_varints(np.asarray([number << 3 | 2])), _varints(np.asarray([content.shape[1]])), content]


def _content(value: str | Label | Fields, num_rows: int) -> Bytes:
    if isinstance(value, Label):
        powers = 10 ** np.arange(value.num_digits - 1, -1, -1, dtype=np.int64)
        digits = (value.number[:, None] // powers % 10 + ord("0")).astype(np.uint8)
        return np.hstack((np.broadcast_to(_text(value.text), (num_rows, len(value.text.encode()))), digits))
    return _text(value) if isinstance(value, str) else encode(value, num_rows)


def _text(text: str) -> Bytes:
    return np.frombuffer(text.encode(), dtype=np.uint8)[None, :]


def _varints(values: Ints) -> Bytes:
    """Base-128 numbers, low digits first, all as long as the largest needs; shape [values, bytes]."""
    assert not len(values) or values.min() >= 0, "negative numbers are not written"
    num_bytes = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
    digits = values[:, None] >> (7 * np.arange(num_bytes))
    out = (digits & 0x7F).astype(np.uint8)
    out[:, :-1] |= 0x80
    return out
