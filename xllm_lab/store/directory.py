"""Envelopes as files of a directory, which any number of processes share: the store that needs nothing installed.

    DIRECTORY/.usage                 bytes that files may take, as far as is known; whoever changes it holds its lock
    DIRECTORY/IDENTITY/KEY.kv        an envelope, whole from the moment it has this name
    DIRECTORY/IDENTITY/.PID-N.part   one being written, locked by its writer

A file's time of change is when it was last used; the oldest are evicted first, whoever wrote them. Room for a file is
reserved under the lock before it is made, so that the sum of all files never exceeds the capacity, and is given back by
a count of what is there, which is due when room is short. Whoever dies leaves a reservation and a part that nobody
locks; the next count removes both.

Nothing is synced to the disk: after a power failure a block is absent, or its checksum tells. It is a cache.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

from xllm_lab.errors import ConfigError
from xllm_lab.store.envelope import Bytes

USAGE: Final = ".usage"
BLOCK, PART = ".kv", ".part"
# Evicting more than is needed spares counts: each reads the whole directory.
KEPT_FRAC: Final = 0.9
_USAGE: Final = struct.Struct("<q")
_UNKNOWN: Final = 1 << 62  # more than any capacity: a count is due


def blocks_in(path: Path) -> list[Path]:
    """Blocks of every identity that are whole, in order of name; none of a directory that is not there."""
    return sorted(path.glob(f"*/*{BLOCK}"))


class _File(NamedTuple):
    used_ns: int
    name: str
    num_bytes: int


class DirectoryShelf:
    """Files of one directory on a local file system.

    Attributes:
        path: the directory.
        capacity_bytes: of all its files together, whichever process wrote them.
    """

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        """Makes the directory if it is missing.

        Raises:
            ConfigError: it cannot be made or written.
        """
        self.path, self.capacity_bytes = path, capacity_bytes
        self.described = f"directory {path}, {capacity_bytes} bytes"
        self._numbers = count()
        self._evictions = 0
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked_usage() as usage:  # files may have been copied here, or the capacity been larger
                self._set_used_bytes(usage, self._make_room(0))
        except OSError as error:
            raise ConfigError(f"{path}: no directory for KV blocks can be had there ({error.strerror})") from error

    def prepare(self, memory: Bytes) -> None:
        """Any memory will do."""

    def has(self, names: Sequence[str], used_ns: int) -> list[bool]:
        """As `Shelf.has`; to be asked for is to be used."""
        return [_touch(self._file(name), used_ns - 1000 * k) for k, name in enumerate(names)]

    def read(self, names: Sequence[str], slots: Bytes, used_ns: int) -> list[int | str | None]:
        """As `Shelf.read`."""
        found: list[int | str | None] = []
        for k, (name, slot) in enumerate(zip(names, slots, strict=True)):
            found.append(self._read(name, slot, used_ns - 1000 * k))
            if not isinstance(found[-1], int):
                break
        return found

    def write(self, names: Sequence[str], slots: Bytes, used_ns: int) -> list[str | None]:
        """As `Shelf.write`."""
        done: list[str | None] = []
        for k, (name, slot) in enumerate(zip(names, slots, strict=True)):
            try:
                done.append(self._write(name, slot, used_ns - 1000 * k))
            except OSError as error:
                done.append(_told(error))
            if done[-1] is not None:
                break
        return done

    def forget(self, name: str) -> None:
        """Remove it, if it is still there; its room is found by the next count."""
        with suppress(OSError):
            os.unlink(self._file(name))

    def num_evictions(self) -> int:
        return self._evictions

    def close(self) -> None:
        """Nothing is held."""

    def _file(self, name: str) -> str:
        return f"{self.path}/{name}{BLOCK}"

    def _read(self, name: str, slot: Bytes, used_ns: int) -> int | str | None:
        try:
            file = os.open(self._file(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            return _told(error)
        try:
            os.utime(file, ns=(used_ns, used_ns))
            num_bytes, memory = 0, slot.data
            while num_bytes < len(slot) and (came := os.readv(file, [memory[num_bytes:]])):
                num_bytes += came
            return num_bytes if num_bytes < len(slot) else os.fstat(file).st_size
        except OSError as error:
            return _told(error)
        finally:
            os.close(file)

    def _write(self, name: str, envelope: Bytes, used_ns: int) -> str | None:
        target = self._file(name)
        part = os.path.join(os.path.dirname(target), f".{os.getpid()}-{next(self._numbers)}{PART}")
        os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        file = self._reserved(part, len(envelope))
        if file is None:
            return f"a block of {len(envelope)} bytes does not fit into {self.capacity_bytes}"
        try:
            num_bytes, memory = 0, envelope.data
            while num_bytes < len(envelope):
                num_bytes += os.writev(file, [memory[num_bytes:]])
            os.utime(file, ns=(used_ns, used_ns))
            os.replace(part, target)
        except OSError:
            with suppress(OSError):
                os.unlink(part)
            raise
        finally:
            os.close(file)
        return None

    def _reserved(self, part: str, num_bytes: int) -> int | None:
        """An empty file of the name, locked, and as much room as it will take; None if there is none at all."""
        with self._locked_usage() as usage:
            used_bytes = self._used_bytes(usage)
            if used_bytes + num_bytes > self.capacity_bytes:
                used_bytes = self._make_room(num_bytes)
                self._set_used_bytes(usage, used_bytes)
            if used_bytes + num_bytes > self.capacity_bytes:
                return None
            self._set_used_bytes(usage, used_bytes + num_bytes)
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.ftruncate(file, num_bytes)  # so that a count sees what is reserved
            except OSError:
                os.close(file)
                os.unlink(part)
                raise
            return file

    @contextmanager
    def _locked_usage(self) -> Iterator[int]:
        """The file of the bytes in use; nobody else, in any process, has it meanwhile."""
        usage = os.open(self.path / USAGE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(usage, fcntl.LOCK_EX)
            yield usage
        finally:
            os.close(usage)

    @staticmethod
    def _used_bytes(usage: int) -> int:
        told = os.pread(usage, _USAGE.size, 0)
        used_bytes = int(_USAGE.unpack(told)[0]) if len(told) == _USAGE.size else -1
        return used_bytes if used_bytes >= 0 else _UNKNOWN

    @staticmethod
    def _set_used_bytes(usage: int, num_bytes: int) -> None:
        os.pwrite(usage, _USAGE.pack(num_bytes), 0)

    def _make_room(self, num_bytes: int) -> int:
        """Count what is there, and evict the oldest until so many bytes fit, and some more; what is left, in bytes."""
        files = sorted(self._files())
        used_bytes = sum(file.num_bytes for file in files)
        if used_bytes + num_bytes <= self.capacity_bytes:
            return used_bytes
        for file in files:
            if used_bytes + num_bytes <= self.capacity_bytes * KEPT_FRAC:
                break
            if file.name.endswith(BLOCK):
                with suppress(FileNotFoundError):
                    os.unlink(file.name)
                    self._evictions += 1
                used_bytes -= file.num_bytes
        return used_bytes

    def _files(self) -> Iterator[_File]:
        """Every block, and every part that somebody is writing; other parts are removed."""
        for folder in os.scandir(self.path):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder.path):
                with suppress(FileNotFoundError):
                    if entry.name.endswith(PART) and _is_abandoned(entry.path):
                        os.unlink(entry.path)
                    elif entry.name.endswith((BLOCK, PART)):
                        told = entry.stat(follow_symlinks=False)
                        yield _File(told.st_mtime_ns, entry.path, told.st_size)


def _touch(file: str, used_ns: int) -> bool:
    """Whether it is there to be touched."""
    try:
        os.utime(file, ns=(used_ns, used_ns))
    except OSError:
        return False
    return True


def _told(error: OSError) -> str:
    return error.strerror or str(error)


def _is_abandoned(part: str) -> bool:
    """Its writer is gone: the system has let go of the lock."""
    file = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True
