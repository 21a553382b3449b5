"""What a drafting model's KV holds of each request, and in which blocks.

Its pool has the target's blocks and block tables, so that a rejected draft needs no rollback: its row is overwritten.

    tokens known   0 .................... n
    rows in KV     0 ............ known | drafts that were computed     right, as far as the target drew the same
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from xllm_lab.drafting import Asked
from xllm_lab.ledger import BlockKey
from xllm_lab.policies.api import ceil_div
from xllm_lab.request_state import RequestState
from xllm_lab.workload import RequestId


class _Held(NamedTuple):
    num_known: int
    drafts: Sequence[int]  # read by the rows behind


class SyncedRows:
    """Bookkeeping of one pool; row p of a request is in the slot of its token p.

    A full block is remembered by its key: who gets it from the prefix cache need not compute it again.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._held: dict[RequestId, _Held] = {}
        # Of blocks, and so no more than the pool has.
        self._key_of: dict[int, BlockKey] = {}
        self._writer_of: dict[int, RequestId] = {}

    @property
    def num_requests(self) -> int:
        return len(self._held)

    def count(self, asked: Asked) -> int:
        """Leading rows of a request that are in KV and right."""
        state, table = asked.state, asked.block_table
        held = self._held.get(state.id)
        if held is None:
            return self._num_shared(state, table) * self._block_size
        known, drafts = held
        drawn = state.token_ids(known, min(known + len(drafts), state.num_tokens)).tolist()
        for row, (draft, token) in enumerate(zip(drafts, drawn, strict=False), known):
            # A block of rejected drafts may have been another request's since.
            if draft != token or self._writer_of.get(table[row // self._block_size]) != state.id:
                return row
        return known + len(drawn)

    def write(self, asked: Asked, start: int, end: int) -> None:
        """Rows [start, end) of a request are about to be computed."""
        for block in asked.block_table[start // self._block_size : ceil_div(end, self._block_size)]:
            self._key_of.pop(block, None)
            self._writer_of[block] = asked.state.id

    def keep(self, asked: Asked, first_row: int, num_known: int, drafts: Sequence[int]) -> None:
        """Rows of known tokens are in KV from `first_row` on, and behind them those that read `drafts`."""
        self._held[asked.state.id] = _Held(num_known, drafts)
        size, keys = self._block_size, asked.state.reusable_keys()
        for block in range(first_row // size, min(num_known // size, len(keys))):
            self._key_of[asked.block_table[block]] = keys[block]

    def forget(self, request: RequestId) -> None:
        """It ended, or lost its KV. What it shared stays."""
        self._held.pop(request, None)

    def _num_shared(self, state: RequestState, table: Sequence[int]) -> int:
        keys = state.reusable_keys()
        for index, (key, block) in enumerate(zip(keys, table, strict=False)):
            if self._key_of.get(block) != key:
                return index
        return len(keys)
