"""Progress of long work, on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from xllm_lab.records import Records, RequestRecord

# How often a bar is drawn, and how long work lasts before it is drawn at all.
TERMINAL_S, LOG_S = 0.5, 5.0


class ProgressRecords(Records):
    """Records that move a bar by one for every request that ended."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self.bar = bar

    def request(self, record: RequestRecord) -> None:
        super().request(record)
        self.bar.update()


def watched(total: int, what: str, *, show: bool = True) -> ProgressRecords:
    """Records with a bar over `total` requests."""
    return ProgressRecords(bar=bar(total, what, show=show))


def bar(total: int, what: str, *, show: bool = True) -> Any:
    """A bar that stays when it is full; short work draws none."""
    interval_s = TERMINAL_S if sys.stderr.isatty() else LOG_S
    return tqdm(
        total=total, desc=what, disable=not show, mininterval=interval_s, delay=interval_s, file=sys.stderr, ncols=88
    )


def tell(line: str) -> None:
    """One line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
