"""Drafts in simulated time: how many there would be, and how many of them would be kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xllm_lab.drafting import Asked
from xllm_lab.request_state import placeholder
from xllm_lab.workload import Request, RequestId


class Acceptance(Protocol):
    """What becomes of drafts, a function of who asks and where alone: the rest of the batch cannot move it."""

    @property
    def methods(self) -> Sequence[str]:
        """That it knows."""
        ...

    def outcome(self, request: Request, method: str, position: int, depth: int) -> tuple[int, int]:
        """(drafts, of these kept) when a request asks for up to `depth` behind its output token `position - 1`."""
        ...


class SimulatedDrafts:
    """A `Proposer` of placeholders; an acceptance process says how many."""

    def __init__(self, acceptance: Acceptance) -> None:
        self._acceptance = acceptance
        self._kept: dict[RequestId, int] = {}

    @property
    def methods(self) -> Sequence[str]:
        return self._acceptance.methods

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        made: list[Sequence[int]] = []
        for state, method, depth, _ in asked:
            drafted, self._kept[state.id] = self._acceptance.outcome(
                state.request, method, state.num_tokens - state.num_prompt_tokens, depth
            )
            assert 0 <= self._kept[state.id] <= drafted <= depth, f"{drafted} drafts of {depth} by {method}"
            made.append((placeholder(state.id),) * drafted)
        return made

    def forget(self, request: RequestId) -> None:
        self._kept.pop(request, None)

    def num_kept(self, request: RequestId) -> int:
        """Of the drafts that the request has in the step under way."""
        return self._kept.get(request, 0)
