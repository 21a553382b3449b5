"""An etcd of its own for a test, on free ports of the loopback."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

_UP_S = 30.0


@contextlib.contextmanager
def etcd(folder: Path) -> Iterator[str]:
    """HOST:PORT of one that runs; fails, and says what to install, where there is none."""
    binary = shutil.which("etcd")
    if binary is None:
        pytest.fail("etcd is not installed; accepted: `apt-get install etcd-server`")
    client, peer = _free_port(), _free_port()
    process = subprocess.Popen(
        [
            *(binary, "--data-dir", str(folder / "etcd")),
            *("--listen-client-urls", f"http://127.0.0.1:{client}"),
            *("--advertise-client-urls", f"http://127.0.0.1:{client}"),
            *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
            *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
            *("--initial-cluster", f"default=http://127.0.0.1:{peer}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await_health(f"http://127.0.0.1:{client}/health", process)
        yield f"127.0.0.1:{client}"
    finally:
        process.kill()
        process.wait()


def _await_health(url: str, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + _UP_S
    while time.monotonic() < until_s:
        assert process.poll() is None, f"etcd ended with status {process.returncode}"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1.0) as answer:
            if b"true" in answer.read():
                return
    pytest.fail(f"etcd is not healthy after {_UP_S:g} s")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port
