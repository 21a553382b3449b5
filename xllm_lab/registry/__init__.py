"""Who is there: instances enter a registry under a lease, and a router watches them come and go.

    instance    enter(url, entry) --> Lease      kept alive by a thread until it is closed, or its process ends
    router      open_registry(url)  --> changes    Joined, Left, in the order in which they happened

Two registries behind one interface: `embedded`, in the router's own process, and `etcd`. An entry is of one incarnation
of an instance, a process; who watches knows which one counts, and ignores what is said of another.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from xllm_lab.errors import ConfigError
from xllm_lab.policies.routing import InstanceId

# Of a lease, seconds; xllm-service's `etcd_ttl`. It is kept alive three times as often.
TTL_S = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An instance, as it enters itself.

    Attributes:
        incarnation: names the process; no two have the same.
        address: where it listens, HOST:PORT.
        config: of the instance, for whoever looks.
    """

    instance: InstanceId
    incarnation: str
    address: str
    config: dict[str, Any]

    def as_text(self) -> str:
        """One line of JSON; `entry_from` turns it back."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)


def entry_from(text: str) -> Entry | None:
    """Inverse of `Entry.as_text`; None if it is nobody's entry."""
    try:
        value = json.loads(text)
        entry = Entry(**value)
    except (ValueError, TypeError):
        return None
    sound = (
        type(entry.instance) is int
        and entry.instance >= 0
        and isinstance(entry.incarnation, str)
        and isinstance(entry.address, str)
        and isinstance(entry.config, dict)
    )
    return entry if sound else None


class Joined(NamedTuple):
    """An incarnation entered itself."""

    entry: Entry

    @property
    def instance(self) -> InstanceId:
        return self.entry.instance

    @property
    def incarnation(self) -> str:
        return self.entry.incarnation


class Left(NamedTuple):
    """The lease of an incarnation was lost, or given up."""

    instance: InstanceId
    incarnation: str


Change = Joined | Left


class Registry(Protocol):
    """The router's side. Close it."""

    @property
    def url(self) -> str:
        """What instances are told, to enter themselves."""
        ...

    def changes(self, wait_s: float = 0.0) -> Sequence[Change]:
        """What happened since it was asked last; if nothing did, what happens next, if it is soon enough."""
        ...

    def close(self) -> None: ...


class Lease(Protocol):
    """An instance's side."""

    @property
    def is_lost(self) -> bool: ...
    def close(self) -> None:
        """Leave."""
        ...


class Mailbox:
    """Changes that one thread notes and another asks for."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._changes: list[Change] = []

    def note(self, change: Change) -> None:
        with self._news:
            self._changes.append(change)
            self._news.notify()

    def take(self, wait_s: float) -> Sequence[Change]:
        """All since the last time."""
        if not self._changes and not wait_s:  # of one who looks often
            return ()
        with self._news:
            if not self._changes:
                self._news.wait(wait_s)
            taken, self._changes = self._changes, []
        return taken


def open_registry(where: str, host: str = "127.0.0.1") -> Registry:
    """The router's side of a registry: "embedded", or an etcd, "etcd://HOST:PORT/PREFIX".

    Args:
        host: on which the embedded one listens.

    Raises:
        ConfigError: there is no such registry, or it does not answer.
    """
    if where == "embedded":
        from xllm_lab.registry.embedded import EmbeddedRegistry

        return EmbeddedRegistry(host)
    if where.startswith("etcd://"):
        from xllm_lab.registry.etcd import EtcdRegistry

        return EtcdRegistry(where)
    raise ConfigError(f"registry is {where!r}; accepted: embedded, etcd://HOST:PORT/PREFIX")


def enter(url: str, entry: Entry) -> Lease:
    """Enter an instance where `Registry.url` says.

    Raises:
        ConfigError: there is no such registry, or it does not answer.
    """
    if url.startswith("etcd://"):
        from xllm_lab.registry.etcd import EtcdLease

        return EtcdLease(url, entry)
    from xllm_lab.registry.embedded import EmbeddedLease

    return EmbeddedLease(url, entry)
