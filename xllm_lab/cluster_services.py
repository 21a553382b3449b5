"""The services that several engine processes share, on this machine: Mooncake's master and etcd.

    python -m xllm_lab.cluster_services            both, in the foreground, until Ctrl-C; `make cluster`
    python -m xllm_lab.cluster_services install    what they need of Debian's packages

Both listen on the loopback address unless `--listen` names another, and say where. Tests start them by the same
functions, on free ports.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from xllm_lab.errors import ConfigError, UserError

LOOPBACK = "127.0.0.1"
# The services' own defaults.
MASTER_PORT, METRICS_PORT = 50051, 9003
ETCD_PORT, ETCD_PEER_PORT = 2379, 2380
POSTGRES_PORT = 5432
_READY_S, _STOP_S, _POLL_S = 20.0, 5.0, 0.02


class _Needed(NamedTuple):
    what: str
    package: str
    is_there: bool


@dataclass(slots=True)
class Service:
    """A process that listens.

    Attributes:
        name: for people.
        addresses: `what HOST:PORT`, of each port it listens on.
        log: what it says.
    """

    name: str
    addresses: tuple[str, ...]
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask it to end, then make it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.log.close()

    def last_words(self, num_lines: int = 5) -> str:
        """The end of its log."""
        file = self.log.fileno()  # whose position is also that of the process's writing
        said = os.pread(file, 1 << 14, max(0, os.fstat(file).st_size - (1 << 14)))
        return "\n".join(said.decode("utf-8", "replace").splitlines()[-num_lines:])


def start_master(
    *, port: int = MASTER_PORT, metrics_port: int = METRICS_PORT, listen: str = LOOPBACK, options: Sequence[str] = ()
) -> Service:
    """Mooncake's master, without its metadata server, ready to be joined.

    Args:
        options: further flags of `mooncake_master`.

    Raises:
        ConfigError: it is not installed, cannot be loaded, or ends before it answers.
    """
    program = _program("mooncake_master", 'pip install "xllm-lab[mooncake]"')
    command = [program, f"--rpc_address={listen}", f"--rpc_port={port}", f"--metrics_host={listen}"]
    command += [f"--metrics_port={metrics_port}", *options]
    return _started("Mooncake master", command, {"requests": (listen, port), "metrics": (listen, metrics_port)})


def start_etcd(
    folder: Path, *, port: int = ETCD_PORT, peer_port: int = ETCD_PEER_PORT, listen: str = LOOPBACK
) -> Service:
    """An etcd of one member, ready for clients.

    Args:
        folder: where it keeps its data.

    Raises:
        ConfigError: it is not installed, or ends before it answers.
    """
    program = _program("etcd", "on Debian, apt-get install etcd-server")
    clients, peers = f"http://{listen}:{port}", f"http://{listen}:{peer_port}"
    command = [program, "--data-dir", str(folder), "--listen-client-urls", clients, "--advertise-client-urls", clients]
    command += ["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers]
    command += ["--initial-cluster", f"default={peers}"]
    return _started("etcd", command, {"clients": (listen, port), "peers": (listen, peer_port)})


@contextmanager
def started_postgres(*, port: int = POSTGRES_PORT, listen: str = LOOPBACK) -> Iterator[str]:
    """PostgreSQL with an empty database in a folder that is removed, as the URL that Optuna takes; loopback only.

    Raises:
        ConfigError: it is not installed, or ends before it answers.
    """
    initdb = _program("initdb", "on Debian, apt-get install postgresql")
    server = _program("postgres", "on Debian, apt-get install postgresql")
    # It refuses to run as root; Debian's package brings a user for it.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="xllm-lab-postgres-") as folder:
        if user is not None:
            shutil.chown(folder, user)
        data = str(Path(folder) / "data")
        made = [
            initdb,
            "--pgdata",
            data,
            "--username",
            "postgres",
            "--auth",
            "trust",
            "--encoding",
            "UTF8",
            "--no-sync",
        ]
        done = subprocess.run(made, user=user, cwd=folder, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise ConfigError(f"initdb failed: {done.stderr.strip()[-400:]}")
        command = [server, "-D", data, "-p", str(port), "-h", listen, "-k", folder]
        with _started("PostgreSQL", command, {"clients": (listen, port)}, user=user):
            yield f"postgresql+psycopg://postgres@{listen}:{port}/postgres"


def free_ports(num_ports: int) -> tuple[int, ...]:
    """Ports of the loopback address that nobody listens on at this moment."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(num_ports)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return tuple(int(one.getsockname()[1]) for one in sockets)


def install() -> None:
    """Install what is missing of Debian's packages, without starting any service.

    Raises:
        ConfigError: something is missing, and this user cannot install it.
    """
    missing = [needed for needed in _needed() if not needed.is_there]
    if not missing:
        return
    packages = [needed.package for needed in missing]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        told = " and ".join(needed.what for needed in missing)
        raise ConfigError(f"{told} missing; as root, apt-get install {' '.join(packages)}")
    print(f"installing {' '.join(packages)}", flush=True)  # noqa: T201
    # etcd-server would start one that belongs to the system; at run level 1 nothing is started.
    environment = {**os.environ, "RUNLEVEL": "1", "DEBIAN_FRONTEND": "noninteractive"}
    for words in (("update",), ("install", "--yes", "--no-install-recommends", *packages)):
        done = subprocess.run(["apt-get", "-qq", *words], env=environment, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise ConfigError(f"apt-get {' '.join(words)} failed: {done.stderr.strip()[-400:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """As a command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m xllm_lab.cluster_services", description=__doc__.split("\n")[0])
    parser.add_argument("verb", nargs="?", choices=("serve", "install"), default="serve")
    parser.add_argument("--listen", default=LOOPBACK, help="address to listen on; default: this machine only")
    parser.add_argument("--master-port", type=int, default=MASTER_PORT)
    parser.add_argument("--metrics-port", type=int, default=METRICS_PORT, help="the master's")
    parser.add_argument("--etcd-port", type=int, default=ETCD_PORT)
    parser.add_argument("--etcd-peer-port", type=int, default=ETCD_PEER_PORT)
    parser.add_argument("--etcd-folder", type=Path, help="where etcd keeps its data; default: a folder that is removed")
    o = parser.parse_args(arguments)
    try:
        if o.verb == "install":
            install()
            return 0
        return _serve(o)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2


def _serve(o: argparse.Namespace) -> int:
    """Both services until Ctrl-C, SIGTERM, or the end of one; 1 if one ended."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ExitStack() as running:
            folder = o.etcd_folder or Path(running.enter_context(tempfile.TemporaryDirectory(prefix="xllm-lab-etcd-")))
            master = start_master(port=o.master_port, metrics_port=o.metrics_port, listen=o.listen)
            services = [running.enter_context(master)]
            etcd = start_etcd(folder, port=o.etcd_port, peer_port=o.etcd_peer_port, listen=o.listen)
            services.append(running.enter_context(etcd))
            for service in services:
                print(f"{service.name} listens on {', '.join(service.addresses)}", flush=True)  # noqa: T201
            print("Ctrl-C stops both", flush=True)  # noqa: T201
            while not asked:
                for service in services:
                    if service.process.poll() is not None:
                        code = service.process.returncode
                        raise ConfigError(f"{service.name} ended with status {code}: {service.last_words()}")
                time.sleep(_POLL_S)
        print("stopped", flush=True)  # noqa: T201
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _needed() -> tuple[_Needed, ...]:
    return (
        _Needed("libibverbs.so.1", "libibverbs1", _has_library("libibverbs.so.1")),
        _Needed("etcd", "etcd-server", shutil.which("etcd") is not None),
        _Needed("PostgreSQL", "postgresql", _program_path("initdb") is not None),
    )


def _has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _program(name: str, how_to_get: str) -> str:
    """Beside this interpreter, or on the path."""
    found = _program_path(name)
    if found is None:
        raise ConfigError(f"{name} is not installed; {how_to_get}")
    return found


def _program_path(name: str) -> str | None:
    beside = Path(sys.executable).with_name(name)
    # Debian keeps PostgreSQL's, of each version, off the path.
    versions = sorted(str(path) for path in Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(beside) if beside.exists() else shutil.which(name) or (versions[-1] if versions else None)


def _started(
    name: str, command: Sequence[str], ports: dict[str, tuple[str, int]], *, user: str | None = None
) -> Service:
    for what, (host, port) in ports.items():
        if _answers(host, port):
            raise ConfigError(f"{name}: somebody listens on {host}:{port} already, its port for {what}")
    log = tempfile.TemporaryFile()  # noqa: SIM115  (the service closes it)
    # A group of its own: Ctrl-C in a terminal goes to this process, which stops them in turn.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, user=user
    )
    service = Service(name, tuple(f"{host}:{port} ({what})" for what, (host, port) in ports.items()), process, log)
    until = time.monotonic() + _READY_S
    while not all(_answers(host, port) for host, port in ports.values()):
        has_ended = process.poll() is not None
        if has_ended or time.monotonic() > until:
            words = service.last_words()
            service.stop()
            state = f"ended with status {process.returncode}" if has_ended else f"does not answer within {_READY_S:g} s"
            raise ConfigError(f"{name} {state}: {words}")
        time.sleep(_POLL_S)
    return service


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1.0).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
