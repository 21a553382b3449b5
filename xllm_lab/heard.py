"""What a router hears of latencies: with each handover a first token, with each end the rest of a request.

It hears of them when they have happened, in any host, and of nothing before. Requests that wait for their first token
longer than was promised it can count, as it knows when they came.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from xllm_lab.metrics import is_served, tpot_us, ttft_us
from xllm_lab.policies.api import RequestId
from xllm_lab.records import RequestRecord


class HeardLately(NamedTuple):
    """A `Heard`."""

    since_us: int
    num_first_tokens: int
    num_in_time: int
    num_overdue: int
    num_ends: int
    num_steady: int


class Hearing:
    """What was heard within `window_us`, and since roles changed last."""

    def __init__(self, window_us: int) -> None:
        self._window_us = window_us
        self._since_us = 0
        self._live: dict[RequestId, RequestRecord] = {}
        self._awaited: dict[RequestId, RequestRecord] = {}  # of whose first token nothing was heard
        # When it was heard, and whether the promise was kept.
        self._first_tokens: deque[tuple[int, bool]] = deque()
        self._ends: deque[tuple[int, bool]] = deque()

    def begins(self, record: RequestRecord) -> None:
        """A request is routed, for the first time or again."""
        if record.id not in self._live:
            self._live[record.id] = self._awaited[record.id] = record

    def first_token(self, record: RequestRecord, now_us: int) -> None:
        """A request is handed over, or ended with tokens."""
        if self._awaited.pop(record.id, None) is not None:
            slo_us = record.ttft_slo_us
            self._first_tokens.append((now_us, slo_us is None or ttft_us(record) <= slo_us))

    def ends(self, request: RequestId, now_us: int) -> None:
        """A request ended, for whatever reason."""
        record = self._live.pop(request)
        if record.output_tokens:
            self.first_token(record, now_us)
        self._awaited.pop(request, None)
        if is_served(record):
            us, slo_us = tpot_us(record), record.tpot_slo_us
            self._ends.append((now_us, us is None or slo_us is None or us <= slo_us))

    def begin_anew(self, now_us: int) -> None:
        """What was heard before was of other roles."""
        self._since_us = now_us
        self._first_tokens.clear()
        self._ends.clear()

    def lately(self, now_us: int) -> HeardLately:
        """As a policy sees it."""
        since_us = max(self._since_us, now_us - self._window_us)
        for heard in (self._first_tokens, self._ends):
            while heard and heard[0][0] < since_us:
                heard.popleft()
        return HeardLately(
            since_us=since_us,
            num_first_tokens=len(self._first_tokens),
            num_in_time=sum(kept for _, kept in self._first_tokens),
            num_overdue=sum(_is_overdue(r, now_us) for r in self._awaited.values()),
            num_ends=len(self._ends),
            num_steady=sum(kept for _, kept in self._ends),
        )


def _is_overdue(record: RequestRecord, now_us: int) -> bool:
    return record.ttft_slo_us is not None and now_us - record.arrival_us > record.ttft_slo_us
