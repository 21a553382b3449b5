"""A store is opened from a line of text, and a line that cannot be meant is refused with what can."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.store.places import IDENTITY, PATIENT_US, key_of, room
from xllm_lab.cluster_services import LOOPBACK, free_ports
from xllm_lab.errors import ConfigError
from xllm_lab.store import open_store

MASTER = f"mooncake://{LOOPBACK}:1"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "names no store"),
        ("redis://127.0.0.1:6379", r"names no store of KV blocks; accepted are dir:/PATH.*mooncake://"),
        ("dir:", "has no path; accepted is dir:/PATH"),
        ("dir:?bytes=1", "has no path"),
        ("dir:{tmp}?bytes=1.5GiB", r"bytes is '1\.5GiB'; a whole number of bytes is accepted, or of KiB"),
        ("dir:{tmp}?bytes=10GB", "bytes is '10GB'"),
        ("dir:{tmp}?bytes=-1", "bytes is '-1'"),
        ("dir:{tmp}?bytes=", "bytes is ''"),
        ("dir:{tmp}?size=1GiB", "'size' is no option of this store; accepted are bytes, batch_blocks, lanes"),
        ("dir:{tmp}?bytes", "options are accepted as NAME=VALUE"),
        ("dir:{tmp}?bytes=1&bytes=2", "gives an option twice"),
        ("dir:{tmp}?lanes=0", "lanes is '0'; a whole number of at least 1"),
        ("dir:{tmp}?batch_blocks=two", "batch_blocks is 'two'"),
        ("dir:{tmp}/file/below", "no directory for KV blocks can be had there"),
        ("mooncake://127.0.0.1", "has no address of a master; accepted is mooncake://127.0.0.1:50051"),
        ("mooncake://127.0.0.1:port", "has no address of a master"),
        (f"{MASTER}/path", "has no address of a master"),
        (f"{MASTER}?bytes=1GiB", "'bytes' is no option of this store; accepted are segment_bytes"),
        (f"{MASTER}?segment_bytes=all", "segment_bytes is 'all'"),
        (f"{MASTER}?listen=here", "listen is 'here'; an address of this machine is accepted"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message) as caught:
        open_store(spec.replace("{tmp}", str(tmp_path)), IDENTITY, 1024)
    assert "\n" not in str(caught.value)


def test_a_block_has_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="block_bytes is 0; at least 1 is accepted"):
        open_store(f"dir:{tmp_path}", IDENTITY, 0)


def test_sizes_and_paths_are_what_they_say(tmp_path: Path) -> None:
    """A path may have blanks, as %20 or as they are."""
    for told in ("a%20b", "a b"):
        with open_store(f"dir:{tmp_path}/{told}?bytes=3MiB", IDENTITY, 1 << 20) as store:
            assert store.described == f"directory {tmp_path}/a b, {3 << 20} bytes"
            keys = [key_of(k) for k in range(2)]
            assert store.put(keys, [[bytes(1 << 20)]] * 2, PATIENT_US) == 2
            assert store.get_into(keys, room(2, 1 << 20), PATIENT_US) == 2


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    with pytest.raises(ConfigError, match=r'pip install "xllm-lab\[mooncake\]"'):
        open_store(MASTER, IDENTITY, 1024)


def test_without_libibverbs_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind what the loader says, as of any extension module that it cannot load."""
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    (tmp_path / "mooncake" / "store.so").write_text("no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("mooncake", "mooncake.store"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=r"cannot be loaded .*store\.so.*apt-get install libibverbs1"):
        open_store(MASTER, IDENTITY, 1024)


def test_free_ports_are_free() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as one:
            one.bind((LOOPBACK, port))
