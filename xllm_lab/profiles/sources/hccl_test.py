"""What `hccl_test` prints: the mean time of one collective at each message size.

    data_size(Bytes): | aveg_time(us): | alg_bandwidth(GB/s): | check_result:
    8192              | 12.50          | 0.65536              | success

The third column is the first divided by the second, in 10^9 bytes a second; where it is not, a unit is wrong. The name
of the collective is that of the program, `all_reduce_test`, looked for in the text above the table (a log often starts
with the command line), then in the file's name. The number of ranks is that of `-np` or `-n` on the command line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from xllm_lab.errors import ProfileError
from xllm_lab.profiles.profile import CollectiveRow, Profile
from xllm_lab.profiles.sources._collectives import collective_name
from xllm_lab.profiles.sources._csv import refusal, shown
from xllm_lab.profiles.sources._tally import Unused

NAME = "hccl-test"
HOLDS = "the text that hccl_test prints"

_HEADER = re.compile(
    r"data_size\(Bytes\):?\s*\|\s*ave?g_time\(us\):?\s*\|\s*alg_bandwidth\(GB/s\):?\s*\|\s*check_result"
)
_PROGRAM = re.compile(
    r"(all_reduce|all_gather_v|all_gather|reduce_scatter_v|reduce_scatter|alltoallv|alltoall|broadcast|"
    r"reduce|scatter)(?:_test)\b"
)
_RANKS = re.compile(r"(?:^|\s)(?:-np|-n)\s+(\d+)\b")
_RESULTS = ("success", "failed", "NULL")
_SNIFFED_BYTES = 1 << 20
# Bandwidths are printed with five decimals.
_ROUNDING_GB_PER_S = 1e-5
_ROUNDING_FRAC = 0.02


def recognises(path: Path) -> bool:
    """Whether the header stands in the first megabyte."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _HEADER.search(file.read(_SNIFFED_BYTES).decode("utf-8", errors="replace")) is not None


def read(path: Path) -> Profile:
    """The collectives in a log; ProfileError names the line of what cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); {HOLDS} is accepted") from error
    unused = Unused()
    rows = tuple(_rows(path, lines, unused))
    if not rows:
        raise ProfileError(f"{path}: holds no measured size; {HOLDS} is accepted")
    notes = [] if rows[0].num_ranks else ["the number of ranks is not recorded"]
    return Profile(
        source=NAME,
        path=path,
        collectives=rows,
        units={f"{path.name}: aveg_time": "us"},
        left_out=unused.rows(),
        notes=tuple(notes),
    )


def _rows(path: Path, lines: list[str], unused: Unused) -> Iterator[CollectiveRow]:
    named = _PROGRAM.search(path.name.replace(".", "_test ", 1))
    name, num_ranks, inside = named[1] if named else "", None, False
    for number, line in enumerate(lines, start=1):
        if _HEADER.search(line):
            if not name:
                accepted = "the command, such as all_reduce_test, above the table or in the file's name"
                raise refusal(path, number, "which collective was measured is not told", accepted)
            inside = True
        elif inside and "|" in line:
            size, us, result = _cells(path, number, line)
            if result == "failed":
                unused.add(path.name, "the result was checked and wrong", round(us * 1e3))
            else:
                yield CollectiveRow(
                    collective=collective_name(name),
                    num_ranks=num_ranks,
                    message_bytes=size,
                    total_us=us,
                    min_us=us,
                    max_us=us,
                )
        else:
            inside = False
            program, ranks = _PROGRAM.search(line), _RANKS.search(line)
            name = program[1] if program else name
            num_ranks = int(ranks[1]) if program and ranks else num_ranks


def _cells(path: Path, number: int, line: str) -> tuple[int, float, str]:
    cells = [cell.strip() for cell in line.split("|")]
    try:
        size, us, bandwidth, result = int(cells[0]), float(cells[1]), float(cells[2]), cells[3]
    except (ValueError, IndexError):
        found = f"row is {shown(line.strip())}"
        raise refusal(path, number, found, "bytes | microseconds | GB/s | success, failed or NULL") from None
    if result not in _RESULTS:
        raise refusal(path, number, f"check_result is {shown(result)}", ", ".join(_RESULTS))
    if size < 1 or not 0 < us < math.inf:
        raise refusal(path, number, f"row is {shown(line.strip())}", "at least 1 byte in more than 0 us")
    expected = size / us / 1e3
    if abs(bandwidth - expected) > _ROUNDING_FRAC * expected + _ROUNDING_GB_PER_S:
        accepted = f"{expected:.5f}, the bytes by the time,"
        raise refusal(path, number, f"alg_bandwidth(GB/s) is {bandwidth:g}", accepted)
    return size, us, result
