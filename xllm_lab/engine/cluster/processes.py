"""The engine processes of a fleet: started on this machine, found through the registry, ended with their router."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import asdict
from typing import IO, Any

from xllm_lab.engine.cluster.member import PLACE, MemberPlace
from xllm_lab.engine.engine import EngineOptions
from xllm_lab.engine.rank_processes import LOST_STATUS
from xllm_lab.engine.ranks import meeting_point
from xllm_lab.errors import InstanceError
from xllm_lab.policies.routing import InstanceId
from xllm_lab.registry import Entry, Left, Registry
from xllm_lab.wire import Channel, GoneError, connect

_START_S = 600.0  # to read its weights
_LOOK_S = 0.02
_END_S = 10.0


class EngineProcess:
    """One incarnation of an instance; what it says goes to a file, and is shown if it ends too early."""

    def __init__(self, place: MemberPlace) -> None:
        self.place = place
        self.entry: Entry | None = None
        self.is_lost = False
        self.channel: Channel | None = None
        self.hello: dict[str, Any] = {}
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "xllm_lab.engine.cluster.member"],
            env={**os.environ, PLACE: json.dumps(asdict(place))},
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
        )
        self._finalizer = weakref.finalize(self, _kill, self.popen, self._said)

    def how_it_ended(self, within_s: float = 0.0) -> str | None:
        """None while it runs. A socket closes a little before its process is gone."""
        try:
            status = self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
        return f"instance {self.place.instance} ended with {how}" + (f": {lines[-1]}" if lines else "")

    def kill(self) -> None:
        """It is gone when this returns, and so is what it was about to say."""
        if self.channel is not None:
            self.channel.close()
        self._finalizer()

    def end(self) -> None:
        """It ends by itself, or is made to."""
        if self.channel is not None:
            with contextlib.suppress(GoneError):
                self.channel.tell({"do": "end"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(_END_S)
        self.kill()


class Processes:
    """All instances of a fleet, each of which may come and go. Close them, or use them with `with`."""

    def __init__(self, options: EngineOptions, num_instances: int, registry: Registry, host: str) -> None:
        self._options, self._registry, self._host = options, registry, host
        self._meeting = meeting_point(num_instances) if options.expert_parallel else None
        self._secret = secrets.token_hex(16)
        self._running: dict[InstanceId, EngineProcess] = {}
        self.instances = [InstanceId(k) for k in range(num_instances)]

    @property
    def share_experts(self) -> bool:
        """Whether each of them needs all others."""
        return self._meeting is not None

    def process(self, instance: InstanceId) -> EngineProcess | None:
        """The present incarnation."""
        return self._running.get(instance)

    def start(self, instance: InstanceId) -> None:
        """Start an instance that does not run; it loads its model while others work."""
        if instance in self._running:
            return
        place = MemberPlace(
            instance=instance,
            incarnation=secrets.token_hex(8),
            registry=self._registry.url,
            host=self._host,
            secret=self._secret,
            options=asdict(self._options),
            rank=None if self._meeting is None else asdict(self._meeting.place(instance)),
        )
        self._running[instance] = EngineProcess(place)

    def await_up(self, instance: InstanceId) -> Channel:
        """Wait until an instance is there, and speak to it.

        Raises:
            InstanceError: it ended, or does not come.
        """
        process, until_s = self._running[instance], time.monotonic() + _START_S
        while process.channel is None:
            self._read_registry(_LOOK_S)
            if process.entry is not None:
                self._meet(process, process.entry)
                break
            if (how := self.who_ended() if self.share_experts else process.how_it_ended()) is not None:
                raise InstanceError(how)
            if time.monotonic() > until_s:
                raise InstanceError(f"instance {instance} did not come up within {_START_S:g} s")
        assert process.channel is not None, "they met"
        return process.channel

    def is_lost(self, instance: InstanceId) -> bool:
        """Whether an instance that was started left the registry."""
        self._read_registry()
        process = self._running.get(instance)
        return process is not None and process.is_lost

    def how_it_ended(self, instance: InstanceId) -> str:
        """For people, of one that is lost."""
        process = self._running.get(instance)
        return (process and process.how_it_ended(_LOOK_S)) or f"instance {instance} lost its lease, and is ended"

    def who_ended(self, within_s: float = 0.0) -> str | None:
        """For people, the first of all that ended, but for those that only followed another."""
        until_s = time.monotonic() + within_s
        while True:
            for process in self._running.values():
                how = process.how_it_ended()
                if how is not None and process.popen.returncode != LOST_STATUS:
                    return how
            if time.monotonic() >= until_s:
                return None
            time.sleep(_LOOK_S)

    def refuse_lost(self, otherwise: str) -> None:
        """Raise InstanceError: instances that share experts end with the first of them that is lost."""
        raise InstanceError(self.who_ended(within_s=1.0) or otherwise)

    def kill(self, instance: InstanceId) -> None:
        """An instance is gone when this returns."""
        if (process := self._running.pop(instance, None)) is not None:
            process.kill()

    def close(self) -> None:
        """All of them end."""
        for process in self._running.values():
            process.end()
        self._running.clear()
        self._registry.close()

    def _meet(self, process: EngineProcess, entry: Entry) -> None:
        try:
            channel = connect(entry.address, _END_S)
            channel.tell({"secret": self._secret})
            hello = channel.hear(_END_S)
        except GoneError as error:
            raise InstanceError(process.how_it_ended() or f"instance {entry.instance}: {error}") from None
        if hello is None or hello.get("incarnation") != process.place.incarnation:
            raise InstanceError(f"instance {entry.instance}: another process answers at {entry.address}")
        process.channel, process.hello = channel, hello

    def _read_registry(self, wait_s: float = 0.0) -> None:
        for change in self._registry.changes(wait_s):
            process = self._running.get(change.instance)
            if process is None or process.place.incarnation != change.incarnation:
                continue  # stale: of one that was given up; or of nobody that was started here
            if isinstance(change, Left):
                process.is_lost = True
            else:
                process.entry = change.entry


def _kill(popen: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    popen.kill()  # nothing, if it has ended
    popen.wait()
    said.close()
