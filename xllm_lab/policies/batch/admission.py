"""What xLLM's policies share: queue order, decode with preemption, prefill admission, giving back what is left.

Rules and constants follow xLLM at 3906f5a, xllm/core/scheduler/scheduler_policy.cpp (schedule_prefill_from_queue,
schedule_decode_from_queue) and decode_first_policy.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from xllm_lab.policies.api import (
    BatchView,
    Packing,
    RequestView,
    arrival_key,
    by_admission,
    by_arrival,
    ceil_div,
    num_missing_tokens,
)

ORDERS = ("fcfs", "priority", "deadline", "sjf")


def queue_order(order: str) -> Callable[[RequestView], tuple[float, int, int]]:
    """xLLM's `priority_strategy`: fcfs, priority, deadline (earliest TTFT deadline), sjf (fewest missing tokens)."""
    rank: dict[str, Callable[[RequestView], float]] = {
        "fcfs": lambda r: 0,
        "priority": lambda r: r.priority,
        "deadline": lambda r: inf if r.ttft_slo_us is None else r.arrival_us + r.ttft_slo_us,
        "sjf": num_missing_tokens,
    }
    if order not in rank:
        raise ValueError(f"order is {order!r}, accepted: {', '.join(ORDERS)}")
    return lambda r: (rank[order](r), *arrival_key(r))


def waiting_in_order(view: BatchView, order: str) -> Sequence[RequestView]:
    return by_arrival(view.waiting) if order == "fcfs" else sorted(view.waiting, key=queue_order(order))


def prefilling_in_order(view: BatchView, order: str) -> list[RequestView]:
    """The chunk queue: running requests with an unfinished prompt."""
    return _running_in_order(view.prefilling, order)


def _running_in_order(requests: Sequence[RequestView], order: str) -> list[RequestView]:
    if not requests:
        return []
    return list(by_admission(requests)) if order == "fcfs" else sorted(requests, key=queue_order(order))


class Stopwatch:
    """The step's predicted time against a budget. Without a step-time model or a budget nothing is ever late."""

    __slots__ = ("_model", "budget_us", "is_unlimited", "spent_us")

    def __init__(self, view: BatchView, budget_us: float | None) -> None:
        self._model = view.step_time if budget_us is not None else None
        self.is_unlimited = self._model is None
        self.budget_us = inf if budget_us is None or self._model is None else budget_us
        self.spent_us = 0.0 if self._model is None else self._model.constant_us

    def has_time_for(self, request: RequestView, num_tokens: int, *, granted: int = 0) -> bool:
        """Whether `num_tokens` more for a request that has `granted` keep the step within its budget."""
        return self._model is None or self.spent_us + self._request_us(request, num_tokens, granted) <= self.budget_us

    def add(self, request: RequestView, num_tokens: int, *, granted: int = 0) -> None:
        if self._model is not None:
            self.spent_us += self._request_us(request, num_tokens, granted)

    def _request_us(self, request: RequestView, num_tokens: int, granted: int) -> float:
        if self._model is None:
            return 0.0
        computed = request.num_computed_tokens
        before_us = self._model.request_us(granted, computed) if granted else 0.0
        return self._model.request_us(granted + num_tokens, computed) - before_us


def decode_with_preemption(
    view: BatchView, packing: Packing, chunking: list[RequestView], order: str, watch: Stopwatch
) -> None:
    """One token for each decoding request, oldest first, while the budget lasts; the first one whatever it takes.

    When blocks run out, the youngest chunking request is preempted and leaves its list, then the youngest decoding
    one; a request never preempts itself.
    """
    if watch.is_unlimited and packing.grant_all_decoding():
        return
    decoding = _running_in_order(view.decoding, order)
    position = 0
    while position < len(decoding) and packing.tokens_left and packing.seqs_left:
        request = decoding[position]
        if packing and not watch.has_time_for(request, 1):
            break
        if packing.grant(request, 1):
            watch.add(request, 1)
            position += 1
        elif chunking:
            packing.preempt(chunking.pop())
        elif decoding[-1] is not request:
            packing.preempt(decoding.pop())
        else:
            break


class Admission:
    """Grants prompts from the front of a queue until one does not fit; nothing overtakes it.

    No prompt takes blocks while `watermark_frac` of the pool is in use, and a fresh one must leave room for the full
    footprint of everything admitted this step on top of `reserved_blocks`. These rules and the time budget wait while
    anything else runs; a prompt that has the machine to itself is never held back, so every request that fits the pool
    gets its turn.
    """

    def __init__(
        self,
        view: BatchView,
        packing: Packing,
        watch: Stopwatch,
        *,
        max_tokens_per_chunk: int,
        watermark_frac: float,
        reserved_blocks: float = 0.0,
    ) -> None:
        self.granted: list[RequestView] = []
        self._view, self._packing, self._watch = view, packing, watch
        self._chunk = max_tokens_per_chunk
        self._high_water_blocks = watermark_frac * view.num_blocks
        self._reserved_blocks = reserved_blocks

    def admit(self, queue: Sequence[RequestView], *, fresh: bool) -> None:
        """`fresh` requests hold no KV yet; the others continue a prompt."""
        packing, watch = self._packing, self._watch
        num_blocks, block_size = self._view.num_blocks, self._view.block_size
        runs_alone = not packing
        for request in queue:
            if packing.is_full:
                return
            if not runs_alone and num_blocks - packing.blocks_left >= self._high_water_blocks:
                return
            known = request.num_tokens
            footprint = ceil_div(known, block_size)
            if fresh and not runs_alone and self._reserved_blocks + footprint > num_blocks:
                return
            num_tokens = min(self._chunk, packing.tokens_left, known - request.num_computed_tokens)
            if not runs_alone and not watch.has_time_for(request, num_tokens):
                return
            if not packing.grant(request, num_tokens):
                return
            runs_alone = False
            watch.add(request, num_tokens)
            self._reserved_blocks += footprint
            self.granted.append(request)

    def give_back_the_rest(self) -> None:
        """Spend what is left of the budget on the prompts granted, in order, beyond their chunk limit.

        A prompt gets all that it lacks, or all tokens that are left, or none: when time runs out nobody gets more.
        """
        for request in self.granted:
            if not self._packing.tokens_left:
                return
            granted = self._packing.granted(request)
            more = min(self._packing.tokens_left, num_missing_tokens(request) - granted)
            if more <= 0:
                continue
            if not self._watch.has_time_for(request, more, granted=granted):
                return
            if self._packing.extend(request, more):
                self._watch.add(request, more, granted=granted)


def unblock_the_oldest(packing: Packing, chunking: list[RequestView], max_tokens: int) -> None:
    """If nothing could run because unfinished prompts hold all blocks, preempt the youngest until the oldest fits."""
    while chunking and not packing:
        oldest = chunking[0]
        if packing.grant(oldest, min(max_tokens, packing.tokens_left, num_missing_tokens(oldest))):
            return
        if len(chunking) == 1:
            return
        packing.preempt(chunking.pop())
