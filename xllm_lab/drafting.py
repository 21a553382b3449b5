"""What a draft policy is asked of a planned step, and who makes the drafts. The same in engine and simulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from xllm_lab.request_state import RequestState
from xllm_lab.workload import RequestId


class Asked(NamedTuple):
    """A request that wants drafts.

    Attributes:
        state: its tokens, all of them known; the last is the only one that is not in KV.
        depth: at most so many drafts.
        block_table: KV blocks that hold its tokens and `depth` more.
    """

    state: RequestState
    method: str
    depth: int
    block_table: Sequence[int]


class Proposer(Protocol):
    """Makes drafts: in the engine of tokens, in the simulator as many as an engine might."""

    @property
    def methods(self) -> Sequence[str]:
        """Some of `policies.draft.METHODS`."""
        ...

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        """Drafts for each, at most `depth`, maybe none."""
        ...

    def forget(self, request: RequestId) -> None:
        """A request ended, or lost its KV and begins anew."""
        ...
