"""Services start together, say where they listen, and stop together. Run by `make test-cluster`."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.listening import listening_addresses
from tests.store.test_processes import ROOT
from xllm_lab.cluster_services import LOOPBACK, free_ports, start_etcd, start_master
from xllm_lab.errors import ConfigError


def test_etcd_listens_on_this_machine_alone(tmp_path: Path) -> None:
    port, peer_port = free_ports(2)
    with start_etcd(tmp_path / "etcd", port=port, peer_port=peer_port) as etcd:
        assert listening_addresses(etcd.process.pid) == {f"{LOOPBACK}:{port}", f"{LOOPBACK}:{peer_port}"}
    assert etcd.process.returncode is not None


def test_both_run_until_they_are_asked_to_end() -> None:
    ports = free_ports(4)
    names = ("--master-port", "--metrics-port", "--etcd-port", "--etcd-peer-port")
    options = [word for name, port in zip(names, ports, strict=True) for word in (name, str(port))]
    command = [sys.executable, "-m", "xllm_lab.cluster_services", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as both:
        assert both.stdout is not None
        lines = [both.stdout.readline().strip() for _ in range(3)]
        both.send_signal(signal.SIGINT)
        rest, errors = both.communicate()
    requests, metrics, clients, peers = (f"{LOOPBACK}:{port}" for port in ports)
    assert lines == [
        f"Mooncake master listens on {requests} (requests), {metrics} (metrics)",
        f"etcd listens on {clients} (clients), {peers} (peers)",
        "Ctrl-C stops both",
    ]
    assert (rest, errors, both.returncode) == ("stopped\n", "", 0)
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, port))


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    port, metrics_port = free_ports(2)
    taken = pytest.raises(ConfigError, match=f"somebody listens on {LOOPBACK}:{port} already")
    with start_master(port=port, metrics_port=metrics_port), taken:
        start_etcd(tmp_path, port=port, peer_port=metrics_port)


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    port, metrics_port = free_ports(2)
    with pytest.raises(ConfigError, match=r"Mooncake master ended with status \d+: .*no_such_flag"):
        start_master(port=port, metrics_port=metrics_port, options=("--no_such_flag=1",))
