"""A reader of Perfetto traces for tests: takes the wire format apart, and refuses what its importer would.

Written against the protocol buffers' wire format and Perfetto's page on synthetic track events, not against our writer.
"""

from __future__ import annotations

import gzip
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[int, list[Any]]


def message(data: bytes) -> Message:
    """Field number -> values in order: an int, or the bytes of a text or of a message within."""
    found: Message = defaultdict(list)
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        match tag & 7:
            case 0:
                value, at = varint(data, at)
                found[tag >> 3].append(value)
            case 2:
                length, at = varint(data, at)
                assert at + length <= len(data), f"field {tag >> 3} is cut off"
                found[tag >> 3].append(data[at : at + length])
                at += length
            case kind:
                raise AssertionError(f"field {tag >> 3} has wire type {kind}, which a timeline does not use")
    return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = shift = 0
    while True:
        assert shift < 70, "a number of more than ten bytes"
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


@dataclass
class Slice:
    """From begin to end, ns; slices within it, in order."""

    name: str
    start_ns: int
    arguments: dict[str, int | str]
    end_ns: int = -1
    inside: list[Slice] = field(default_factory=list)


@dataclass
class Track:
    """One track with all that is on it."""

    uuid: int
    name: str
    parent: int | None
    rank: int
    is_counter: bool
    is_process: bool
    slices: list[Slice] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)
    open: list[Slice] = field(default_factory=list)
    last_ns: int = 0


class PerfettoTrace:
    """A trace, read by the rules of the format; AssertionError where one is broken."""

    def __init__(self, path: Path) -> None:
        self.tracks: dict[int, Track] = {}
        self._interned: dict[tuple[int, int], str] = {}
        self._is_state_cleared = False
        self._pids: set[int] = set()
        whole = message(gzip.decompress(path.read_bytes()))
        assert set(whole) == {1}, "a trace is packets and nothing else"
        for packet in whole[1]:
            self._packet(message(packet))
        for track in self.tracks.values():
            assert not track.open, f"{track.name}: {[s.name for s in track.open]} never end"

    def named(self, name: str, parent: Track | None = None) -> Track:
        """The only track of that name, under `parent` if given."""
        found = [t for t in self.tracks.values() if t.name == name and (parent is None or t.parent == parent.uuid)]
        assert len(found) == 1, f"{len(found)} tracks are named {name}"
        return found[0]

    def children(self, parent: Track) -> list[Track]:
        """In the order in which they are shown."""
        return sorted((t for t in self.tracks.values() if t.parent == parent.uuid), key=lambda t: t.rank)

    def _packet(self, packet: Message) -> None:
        assert packet[10] == [1], "all packets are of one sequence"
        flags = packet.get(13, [0])[0]
        if flags & 1:
            assert not self._interned, "names are forgotten"
            self._is_state_cleared = True
        if 12 in packet or flags & 2:
            assert self._is_state_cleared, "interned names before the sequence began"
        if 12 in packet:
            self._intern(message(packet[12][0]))
        if 60 in packet:
            self._describe(message(packet[60][0]))
        if 11 in packet:
            self._event(packet[8][0], message(packet[11][0]))

    def _intern(self, data: Message) -> None:
        for kind, entries in data.items():
            assert kind in (2, 3, 29)
            for entry in map(message, entries):
                key = (kind, entry[1][0])
                assert key not in self._interned, f"id {key} is given twice"
                assert key[1] > 0, "id 0 means none"
                self._interned[key] = entry[2][0].decode()

    def _describe(self, data: Message) -> None:
        uuid = data[1][0]
        assert uuid > 0, "track 0 is the whole trace's"
        assert uuid not in self.tracks, f"track {uuid} is described twice"
        parent = data.get(5, [None])[0]
        assert parent is None or parent in self.tracks, f"track {uuid} comes before its parent {parent}"
        name = data[2][0].decode() if 2 in data else ""
        if 3 in data:
            process = message(data[3][0])
            assert process[1][0] > 0, "process 0 is the idle one"
            assert process[1][0] not in self._pids, f"pid {process[1][0]} is used twice"
            self._pids.add(process[1][0])
            name = process[6][0].decode()
        self.tracks[uuid] = Track(uuid, name, parent, data.get(12, [0])[0], 8 in data, 3 in data)

    def _event(self, at_ns: int, event: Message) -> None:
        track = self.tracks[event[11][0]]
        assert at_ns >= track.last_ns, f"{track.name}: time goes back from {track.last_ns} to {at_ns}"
        track.last_ns = at_ns
        kind = event[9][0]
        assert (kind == 4) == track.is_counter, f"{track.name}: event of type {kind}"
        if kind == 4:
            track.samples.append((at_ns, event[30][0]))
        elif kind == 1:
            name = event[23][0].decode() if 23 in event else self._interned[2, event[10][0]]
            begun = Slice(name, at_ns, dict(self._argument(message(a)) for a in event.get(4, [])))
            (track.open[-1].inside if track.open else track.slices).append(begun)
            track.open.append(begun)
        else:
            assert kind == 2, f"{track.name}: event of type {kind}"
            assert track.open, f"{track.name}: an end without a begin at {at_ns}"
            track.open.pop().end_ns = at_ns

    def _argument(self, data: Message) -> tuple[str, int | str]:
        name = self._interned[3, data[1][0]]
        return (name, data[3][0]) if 3 in data else (name, self._interned[29, data[17][0]])
