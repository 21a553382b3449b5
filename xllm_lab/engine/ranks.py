"""The processes of a tensor-parallel engine: how they find one another, and what is known of one that is lost.

    alone        rank 0 is the process that was started; it starts the others, on this machine
    torchrun     all were started; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say who and where they are

Rank 0 tells the others what to run, in JSON over torch's store; tensors go through the group. A rank that is lost ends
the run: an operation of the group fails on all others, and those that rank 0 started end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from xllm_lab.engine.ops.collectives import TorchGroup
from xllm_lab.engine.rank_place import Place, place_in_environment
from xllm_lab.engine.rank_processes import Started, kill, start
from xllm_lab.errors import ConfigError, RankError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# A rank may have nothing to do for as long as no request comes.
_FOR_EVER = timedelta(days=3650)
_LOOK_S = 0.05  # between looks at whether a rank that is waited for still lives
_START_S = 600.0  # for others to be started, and to read their weights
_END_S = 10.0  # for a rank that was told to end


@dataclass(slots=True, weakref_slot=True)
class Ranks:
    """One process's place among the ranks, from before they meet to their end.

    Attributes:
        group: what tensors go through, once `connect` was called.
    """

    place: Place
    timeout_s: float
    _store: Any
    _started: Sequence[Started] = ()
    _connected: TorchGroup | None = None
    _is_bound: bool = False  # to the loopback, by us
    _finalizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self._finalizer = weakref.finalize(self, kill, self._started)

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the ranks that this one started."""
        return tuple(started.process.pid for started in self._started)

    @property
    def group(self) -> TorchGroup:
        assert self._connected is not None, "ranks that have not met"
        return self._connected

    def connect(self, library: str) -> None:
        """Meet the other ranks. The library is the device's: "gloo", "nccl" or "hccl".

        Raises:
            RankError: one of them does not come.
        """
        if dist.is_initialized():
            raise ConfigError("torch.distributed is in use in this process; accepted: one tensor-parallel engine")
        self.meet("joined")
        self._is_bound = _bind_to_loopback(self.place.master_addr)
        self._connected = TorchGroup(
            *(library, self._store),
            rank=self.place.rank,
            size=self.place.size,
            timeout_s=self.timeout_s,
            lost=self.lost,
        )

    def meet(self, where: str) -> None:
        """Rank 0 waits until all others have come as far, each in its own time; they go on at once.

        Raises:
            RankError: one of them failed before it came, or does not come.
        """
        if self.place.rank:
            self._store.set(f"{where}/{self.place.rank}", "")
            return
        try:
            for started in self._started:
                self._await_started(started, f"{where}/{started.rank}")
            self._store.wait([f"{where}/{r}" for r in range(1, self.place.size)], timedelta(seconds=_START_S))
        except RuntimeError as error:
            raise self.lost(error) from error

    def tell(self, message: Mapping[str, Any]) -> None:
        """Rank 0 says what all do next, after what it said before; it does not wait until they hear it."""
        text = json.dumps(message, separators=(",", ":"))
        if self._store is None:
            raise RankError("the ranks of this engine have ended; accepted: a new engine")
        try:
            for rank in range(1, self.place.size):
                self._store.queue_push(f"to/{rank}", text)
        except RuntimeError as error:
            raise self.lost(error) from error

    def receive(self) -> dict[str, Any]:
        """Another rank hears what it is told next, however long it takes. RankError: rank 0 is gone."""
        try:
            message: dict[str, Any] = json.loads(self._store.queue_pop(f"to/{self.place.rank}"))
        except RuntimeError as error:
            raise self.lost(error) from error
        if message.get("do") == "end":
            self._store.set(_ended(self.place.rank), "")
        return message

    def fail(self, reason: str) -> None:
        """Another rank leaves word why it ends, if anybody is there to read it."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_failed(self.place.rank), reason)

    def reporter(self) -> Callable[[str], None]:
        """With what another rank reports from any thread, whatever this one waits for: its store is its own."""
        store, rank = self._store.clone(), self.place.rank

        def report(what: str) -> None:
            with contextlib.suppress(RuntimeError):  # nobody is there any more to hear it
                store.set(f"{what}/{rank}", "")

        return report

    def have_reported(self, what: str) -> bool:
        """Rank 0 looks whether all others have reported so; it waits for nobody."""
        try:
            return self.place.size == 1 or bool(self._store.check([f"{what}/{r}" for r in range(1, self.place.size)]))
        except RuntimeError as error:
            raise self.lost(error) from error

    def lost(self, error: RuntimeError) -> RankError:
        """What is known of the rank that made an operation fail."""
        if self.place.rank:
            return RankError(f"rank {self.place.rank} of {self.place.size} lost the others: {_first_line(error)}")
        if (reason := self._reason()) is not None:
            return RankError(reason)
        if "imed out" in str(error) or "imeout" in str(error):
            return RankError(f"a rank of {self.place.size} did not answer within {self.timeout_s:g} s")
        return RankError(f"a rank of {self.place.size} is lost: {_first_line(error)}")

    def end(self) -> None:
        """Rank 0 is done: the others end by themselves."""
        with contextlib.suppress(RankError, RuntimeError):
            self.tell({"do": "end"})
            # The store may be this process's: it must last until the others have heard.
            self._store.wait([_ended(rank) for rank in range(1, self.place.size)], timedelta(seconds=_END_S))
        self.leave()
        for started in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.process.wait(_END_S)
        self._finalizer()

    def abandon(self) -> None:
        """The run went wrong: the others end, whatever they are at."""
        with contextlib.suppress(RankError):
            self.tell({"do": "end"})
        self._finalizer()
        self.leave()

    def leave(self) -> None:
        """Whoever waits for this rank learns that it is gone."""
        if self._connected is not None:
            self._connected.close()
        if self._is_bound:
            del os.environ["GLOO_SOCKET_IFNAME"]
        self._connected, self._store, self._is_bound = None, None, False

    def _await_started(self, started: Started, key: str) -> None:
        for _ in range(round(_START_S / _LOOK_S)):
            if self._store.check([key]):
                return
            if (reason := self._reason(within_s=_LOOK_S)) is not None:
                raise RankError(reason)
        raise RankError(f"rank {started.rank} of {self.place.size} did not start within {_START_S:g} s")

    def _reason(self, within_s: float = 1.0) -> str | None:
        """What a rank said before it ended, or how it ended: a socket closes a little before its process is gone."""
        with contextlib.suppress(RuntimeError):
            for rank in range(1, self.place.size):
                if self._store is not None and self._store.check([_failed(rank)]):
                    return f"rank {rank} of {self.place.size}: {self._store.get(_failed(rank)).decode()}"
        return next((how for started in self._started if (how := started.ended(within_s)) is not None), None)


def lead(size: int, timeout_s: float) -> Ranks:
    """Rank 0 of so many: finds torchrun's, or starts the others on this machine."""
    place = place_in_environment()
    if place is not None:
        return join(place, timeout_s)
    meeting = meeting_point(size)
    place = meeting.place(0)
    return Ranks(place, timeout_s, meeting.store, [start(place, rank) for rank in range(1, size)])


class MeetingPoint(NamedTuple):
    """Where ranks on this machine find one another, for as long as this process has it."""

    store: Any
    size: int
    address: str
    port: int

    def place(self, rank: int) -> Place:
        """Of a rank, which has the device of that number."""
        return Place(rank=rank, size=self.size, local_rank=rank, master_addr=self.address, master_port=self.port)


def meeting_point(size: int) -> MeetingPoint:
    """Opened on loopback for so many ranks."""
    listening = socket.create_server(("127.0.0.1", 0))  # by itself, torch's store would listen to all networks
    address, port = listening.getsockname()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        *(address, port, size),
        is_master=True,
        timeout=timedelta(seconds=_START_S),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return MeetingPoint(store, size, address, port)


def join_at(place: Place, timeout_s: float) -> Ranks:
    """One of ranks whose meeting point another process has opened.

    Raises:
        RankError: nobody is there.
    """
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            *(place.master_addr, place.master_port, place.size),
            is_master=False,
            timeout=timedelta(seconds=_START_S),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise RankError(f"nobody at {place.master_addr}:{place.master_port}: {_first_line(error)}") from error
    return Ranks(place, timeout_s, store)


def join(place: Place, timeout_s: float = _START_S) -> Ranks:
    """A rank that was started as torchrun does. Its time limit counts from when all have joined.

    Raises:
        RankError: rank 0 is not there.
    """
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_START_S)))
    except RuntimeError as error:
        raise RankError(
            f"rank {place.rank} finds nobody at {place.master_addr}:{place.master_port}: {_first_line(error)}"
        ) from error
    if place.rank:
        store.set_timeout(_FOR_EVER)
    return Ranks(place, timeout_s, store)


def _bind_to_loopback(address: str) -> bool:
    """Whether gloo was told to: it asks for the machine's own name otherwise, which need not lead anywhere."""
    name = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if address not in _LOOPBACK or name is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return False
    os.environ["GLOO_SOCKET_IFNAME"] = name
    return True


def _failed(rank: int) -> str:
    return f"failed/{rank}"


def _ended(rank: int) -> str:
    return f"ended/{rank}"


def _first_line(error: RuntimeError) -> str:
    return " ".join((str(error).splitlines() or [type(error).__name__])[0].split())[:200]
