"""A registry in etcd, version 3, over the HTTP/JSON gateway that every etcd has; no library is needed.

    PREFIX/INSTANCE/INCARNATION     the entry, as JSON, under a lease of `TTL_S`; a put, or a delete when that ends

The router reads the prefix once, then watches it from the next revision on, so that nothing is missed between the two.
https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/ describes the gateway: keys and values are base64.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from xllm_lab.errors import ConfigError
from xllm_lab.policies.routing import InstanceId
from xllm_lab.registry import TTL_S, Change, Entry, Joined, Left, Mailbox, entry_from

_ANSWER_S = 5.0
_AGAIN_S = 0.2  # between looks at an etcd that does not answer


class _Gateway:
    """One etcd, and the prefix of a fleet in it."""

    def __init__(self, url: str) -> None:
        self.url = url
        address, _, prefix = url.removeprefix("etcd://").partition("/")
        if not address or not prefix.strip("/"):
            raise ConfigError(f"registry is {url!r}; accepted: etcd://HOST:PORT/PREFIX")
        self._root = f"http://{address}/v3"
        self.prefix = prefix.strip("/") + "/"
        # No proxy of the environment's: where a fleet is registered is nobody else's business.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def open(self, call: str, body: Mapping[str, Any], timeout_s: float = _ANSWER_S) -> Any:
        """The response, to be read; OSError if there is none."""
        request = urllib.request.Request(f"{self._root}/{call}", json.dumps(body).encode(), method="POST")
        return self._opener.open(request, timeout=timeout_s)

    def ask(self, call: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer; OSError or ValueError if there is none."""
        with self.open(call, body) as response:
            answer = json.loads(response.readline() if call == "lease/keepalive" else response.read())
        if not isinstance(answer, dict):
            raise ValueError(f"{self._root}/{call} answers with no object")
        return answer

    @property
    def range(self) -> dict[str, str]:
        """All keys of the prefix."""
        end = self.prefix[:-1] + chr(ord(self.prefix[-1]) + 1)
        return {"key": _encoded(self.prefix), "range_end": _encoded(end)}

    def refusal(self, error: Exception) -> ConfigError:
        return ConfigError(f"registry {self.url}: {error}; accepted: an etcd that answers")


class EtcdRegistry:
    """A `Registry` in etcd. It survives an etcd that is away for a while: who was there stays until etcd says else."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._gateway = _Gateway(url)
        self._mailbox = Mailbox()
        self._is_over = threading.Event()
        self._response: Any = None
        self._known: set[tuple[InstanceId, str]] = set()
        try:
            revision = self._read_all()
        except (OSError, ValueError) as error:
            raise self._gateway.refusal(error) from None
        self._thread = threading.Thread(target=self._watch, args=(revision,), name="registry", daemon=True)
        self._thread.start()

    def changes(self, wait_s: float = 0.0) -> Sequence[Change]:
        return self._mailbox.take(wait_s)

    def close(self) -> None:
        self._is_over.set()
        if (response := self._response) is not None:
            with contextlib.suppress(OSError, AttributeError):
                response.fp.raw._sock.shutdown(2)  # a read that blocks for ever ends so
        self._thread.join(_ANSWER_S)

    def _watch(self, revision: int) -> None:
        while not self._is_over.is_set():
            try:
                create = {"create_request": {**self._gateway.range, "start_revision": str(revision + 1)}}
                with self._gateway.open("watch", create, timeout_s=3600.0) as self._response:
                    for line in self._response:
                        result = json.loads(line).get("result", {})
                        if result.get("canceled"):
                            break  # the revision is compacted away: read anew
                        for event in result.get("events", ()):
                            self._note(event.get("type", "PUT"), event["kv"])
                        revision = max(revision, int(result.get("header", {}).get("revision", revision)))
            except (OSError, ValueError, KeyError, AttributeError):
                pass
            if self._is_over.wait(_AGAIN_S):
                return
            with contextlib.suppress(OSError, ValueError):
                revision = self._read_all()

    def _read_all(self) -> int:
        """Note who is there, and of those known who is not any more. Returns the revision of which that is true."""
        answer = self._gateway.ask("kv/range", self._gateway.range)
        present = set[tuple[InstanceId, str]]()
        for kv in answer.get("kvs", ()):
            if (joined := _joined(kv)) is not None:
                present.add((joined.entry.instance, joined.entry.incarnation))
                self._mailbox.note(joined)
        for instance, incarnation in sorted(self._known - present):
            self._mailbox.note(Left(instance, incarnation))
        self._known = present
        return int(answer["header"]["revision"])

    def _note(self, kind: str, kv: Mapping[str, Any]) -> None:
        if kind == "DELETE":
            parts = _decoded(kv["key"]).removeprefix(self._gateway.prefix).split("/")
            if len(parts) == 2 and parts[0].isdigit():
                left = Left(InstanceId(int(parts[0])), parts[1])
                self._known.discard((left.instance, left.incarnation))
                self._mailbox.note(left)
        elif (joined := _joined(kv)) is not None:
            self._known.add((joined.entry.instance, joined.entry.incarnation))
            self._mailbox.note(joined)


class EtcdLease:
    """A `Lease` in etcd."""

    def __init__(self, url: str, entry: Entry) -> None:
        self._gateway = _Gateway(url)
        self._is_over = threading.Event()
        key = f"{self._gateway.prefix}{entry.instance}/{entry.incarnation}"
        try:
            self._id = self._gateway.ask("lease/grant", {"TTL": str(TTL_S)})["ID"]
            put = {"key": _encoded(key), "value": _encoded(entry.as_text()), "lease": self._id}
            self._gateway.ask("kv/put", put)
        except (OSError, ValueError, KeyError) as error:
            raise self._gateway.refusal(error) from None
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    @property
    def is_lost(self) -> bool:
        return self._is_over.is_set()

    def close(self) -> None:
        self._is_over.set()
        with contextlib.suppress(OSError, ValueError):
            self._gateway.ask("lease/revoke", {"ID": self._id})

    def _keep(self) -> None:
        while not self._is_over.wait(TTL_S / 3):
            with contextlib.suppress(OSError, ValueError):  # etcd is away; the lease may outlive that
                answer = self._gateway.ask("lease/keepalive", {"ID": self._id})
                if not int(answer.get("result", {}).get("TTL", 0)):
                    self._is_over.set()


def _joined(kv: Mapping[str, Any]) -> Joined | None:
    entry = entry_from(_decoded(kv["value"]))
    return None if entry is None else Joined(entry)


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode(errors="replace")
