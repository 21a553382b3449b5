"""On which addresses a process waits for others, as the system tells."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"  # include/net/tcp_states.h


def listening_addresses(pid: int) -> set[str]:
    """`ADDRESS:PORT` of each listening TCP socket of a process; IPv6 addresses as the system writes them, in hex."""
    inodes = set()
    for file in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # the listing's own, if it is this process
            inodes.add(os.readlink(f"/proc/{pid}/fd/{file}").removeprefix("socket:[").rstrip("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTEN and rest[5] in inodes:
                address, port = local.split(":")
                found.add(f"{_readable(address)}:{int(port, 16)}")
    return found


def _readable(address: str) -> str:
    octets = bytes.fromhex(address)
    return ".".join(str(octet) for octet in reversed(octets)) if len(octets) == 4 else address
