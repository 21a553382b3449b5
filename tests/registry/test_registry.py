"""Both registries: who enters is seen, who leaves or dies is seen, and what nobody wrote is nobody's entry."""

from __future__ import annotations

import base64
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.registry.etcd_server import etcd
from xllm_lab.errors import ConfigError
from xllm_lab.policies.routing import InstanceId
from xllm_lab.registry import TTL_S, Change, Entry, Joined, Left, Registry, enter, entry_from, open_registry
from xllm_lab.registry.etcd import _Gateway
from xllm_lab.wire import Channel, GoneError, connect

# A lease that is not kept ends after its time; etcd looks at leases every half second, and rounds up.
_PATIENCE_S = 4 * TTL_S


@pytest.fixture(scope="module")
def etcd_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with etcd(tmp_path_factory.mktemp("etcd")) as address:
        yield address


@pytest.fixture(params=["embedded", "etcd"])
def registry(request: pytest.FixtureRequest) -> Iterator[Registry]:
    where = "embedded"
    if request.param == "etcd":
        where = f"etcd://{request.getfixturevalue('etcd_address')}/tests/{request.node.name}"
    opened = open_registry(where)
    yield opened
    opened.close()


def entry(instance: int = 0, incarnation: str = "first") -> Entry:
    return Entry(
        instance=InstanceId(instance), incarnation=incarnation, address="127.0.0.1:9", config={"model": "tiny"}
    )


def seen(registry: Registry, num: int) -> list[Change]:
    """So many changes, as soon as they are there."""
    found: list[Change] = []
    until_s = time.monotonic() + _PATIENCE_S
    while len(found) < num and time.monotonic() < until_s:
        found += registry.changes(wait_s=0.5)
    return found


def test_who_enters_and_leaves_is_seen(registry: Registry) -> None:
    """With all that was said, in order."""
    lease = enter(registry.url, entry())
    other = enter(registry.url, entry(1))
    assert seen(registry, 2) == [Joined(entry()), Joined(entry(1))]
    lease.close()
    assert seen(registry, 1) == [Left(InstanceId(0), "first")]
    other.close()
    assert seen(registry, 1) == [Left(InstanceId(1), "first")]


def test_incarnations_are_told_apart(registry: Registry) -> None:
    """The second comes before the first is known to be gone; that one's end is told as its own."""
    first = enter(registry.url, entry(0, "first"))
    second = enter(registry.url, entry(0, "second"))
    assert seen(registry, 2) == [Joined(entry(0, "first")), Joined(entry(0, "second"))]
    first.close()
    assert seen(registry, 1) == [Left(InstanceId(0), "first")]
    assert not second.is_lost
    second.close()


def _enter_and_wait(url: str) -> None:
    enter(url, entry())
    signal.pause()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lease_ends_with_its_process(registry: Registry, how: signal.Signals) -> None:
    """Killed or stopped: nobody says good-bye."""
    process = multiprocessing.get_context("spawn").Process(target=_enter_and_wait, args=(registry.url,))
    process.start()
    assert seen(registry, 1) == [Joined(entry())]
    assert process.pid is not None
    os.kill(process.pid, how)
    assert seen(registry, 1) == [Left(InstanceId(0), "first")]
    process.kill()
    process.join()


def test_a_lease_that_is_kept_outlives_its_time(registry: Registry) -> None:
    """The registry hears of it as long as it lasts: another one's end, two lives later, is the only news."""
    lease = enter(registry.url, entry())
    process = multiprocessing.get_context("spawn").Process(target=_enter_and_wait, args=(registry.url,))
    assert seen(registry, 1) == [Joined(entry())]
    for _ in range(2):
        process = multiprocessing.get_context("spawn").Process(target=_enter_and_wait, args=(registry.url,))
        process.start()
        (joined,) = seen(registry, 1)
        assert isinstance(joined, Joined)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        assert [type(change) for change in seen(registry, 1)] == [Left]
        process.kill()
        process.join()
    assert not lease.is_lost
    lease.close()


def test_an_etcd_that_knew_of_others_tells_them_first(etcd_address: str) -> None:
    """Who entered before the router came is seen as it comes."""
    url = f"etcd://{etcd_address}/tests/early"
    lease = enter(url, entry())
    opened = open_registry(url)
    assert seen(opened, 1) == [Joined(entry())]
    lease.close()
    assert seen(opened, 1) == [Left(InstanceId(0), "first")]
    opened.close()


def test_what_others_put_into_etcd_is_ignored(etcd_address: str) -> None:
    """A key beside the prefix, a value that is nobody's entry: the next real one is what is seen."""
    url = f"etcd://{etcd_address}/tests/strangers"
    opened, gateway = open_registry(url), _Gateway(url)
    for key, value in (("tests/strangersnot/0/x", entry().as_text()), ("tests/strangers/0/x", "no entry")):
        encoded = {"key": base64.b64encode(key.encode()).decode(), "value": base64.b64encode(value.encode()).decode()}
        gateway.ask("kv/put", encoded)
    lease = enter(url, entry(5))
    assert seen(opened, 1) == [Joined(entry(5))]
    lease.close()
    opened.close()


def test_a_registry_that_is_not_there_is_refused() -> None:
    """In one line, with what was given."""
    with pytest.raises(ConfigError, match=r"etcd://127\.0\.0\.1:1/x.*accepted: an etcd that answers"):
        open_registry("etcd://127.0.0.1:1/x")
    with pytest.raises(ConfigError, match="registry is 'consul://a'; accepted"):
        open_registry("consul://a")
    with pytest.raises(ConfigError, match="accepted: etcd://HOST:PORT/PREFIX"):
        open_registry("etcd://127.0.0.1:1")
    with pytest.raises(ConfigError, match="accepted: one that runs"):
        enter("embedded://127.0.0.1:1", entry())


@pytest.mark.parametrize("said", [b"\x80\x04\x95pickle\n", b"[1]\n", b'{"entry": "x"}\n', b'{"entry": "{}"}\n'])
def test_strangers_are_hung_up_on(said: bytes) -> None:
    """Bytes that nobody understands are not read on, and make no entry."""
    opened = open_registry("embedded")
    stranger: Channel = connect(opened.url.removeprefix("embedded://"), 5.0)
    stranger._socket.sendall(said)
    with pytest.raises(GoneError):
        stranger.hear(_PATIENCE_S)
    lease = enter(opened.url, entry())
    assert seen(opened, 1) == [Joined(entry())]
    lease.close()
    opened.close()


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"instance": -1}', entry().as_text().replace("0", '"0"')])
def test_what_is_nobodys_entry(text: str) -> None:
    """And what is one comes back as it was."""
    assert entry_from(text) is None
    assert entry_from(entry().as_text()) == entry()


def test_the_embedded_one_listens_on_loopback() -> None:
    """Unless told otherwise."""
    opened = open_registry("embedded")
    assert opened.url.startswith("embedded://127.0.0.1:")
    opened.close()
