"""Every method of drafting that one run of the engine has, as one `Proposer`."""

# Shapes: d drafts of a request, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from xllm_lab.drafting import Asked, Proposer
from xllm_lab.engine.clock import Clock
from xllm_lab.engine.runner import Runner
from xllm_lab.request_state import RequestState
from xllm_lab.workload import RequestId

Maker = Callable[[Runner], Proposer]


@runtime_checkable
class Draws(Protocol):
    """A proposer that draws drafts by chance, for requests that are not greedy."""

    def probabilities(self, request: RequestId) -> Tensor | None:
        """What a request's drafts made last were drawn from, shape [d, V]; None if they were not drawn by chance."""
        ...


class Prefill(NamedTuple):
    """A prompt that the target computes tokens of in a step; `num_tokens` of the request are then in its KV."""

    state: RequestState
    block_table: Sequence[int]
    num_tokens: int


@runtime_checkable
class Follows(Protocol):
    """A proposer that can compute prompts while the target does."""

    def follow(self, prefills: Sequence[Prefill]) -> Callable[[], None] | None:
        """Told of a step before it is launched: what launches the proposer's part of it, which must be called before
        the next drafts are asked for; None if there is none."""
        ...


class EngineDrafts:
    """Asks each method for its requests, and takes the time.

    Args:
        makers: of each method that there is, what opens it beside what runs the target's steps.
        wanted: those that may be asked for; no others are opened.

    Attributes:
        draft_us: how long the host waited for the drafts made last. What a proposer computed beside the target's steps
            is in it only as far as it was not done by then.
    """

    def __init__(self, makers: Mapping[str, Maker], wanted: Collection[str]) -> None:
        self._makers, self._wanted = makers, wanted
        self._by_method: dict[str, Proposer] = {}
        self._clock: Clock | None = None
        self.draft_us = 0

    @property
    def methods(self) -> Sequence[str]:
        return tuple(self._makers)

    def serve(self, clock: Clock, runner: Runner) -> None:
        """A run begins: its clock, and what runs its steps.

        Raises:
            ConfigError: the memory of a method does not fit.
        """
        self._clock = clock
        self._by_method = {method: make(runner) for method, make in self._makers.items() if method in self._wanted}

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        assert self._clock is not None, "drafts are asked for, and no run has begun"
        started_us = self._clock.now_us()
        made: dict[RequestId, Sequence[int]] = {}
        for method, proposer in self._by_method.items():
            if mine := [a for a in asked if a.method == method]:
                made |= zip([a.state.id for a in mine], proposer.propose(mine), strict=True)
        self.draft_us = self._clock.now_us() - started_us
        return [made[a.state.id] for a in asked]

    def follow(self, prefills: Sequence[Prefill]) -> Sequence[Callable[[], None]]:
        """As `Follows`, of every method that may be asked for."""
        if not prefills:
            return ()
        works = [p.follow(prefills) for p in self._by_method.values() if isinstance(p, Follows)]
        return [work for work in works if work is not None]

    def probabilities(self, request: RequestId, method: str) -> Tensor | None:
        """As `Draws`; None by a method that does not draw."""
        proposer = self._by_method[method]
        return proposer.probabilities(request) if isinstance(proposer, Draws) else None

    def forget(self, request: RequestId) -> None:
        for proposer in self._by_method.values():
            proposer.forget(request)
