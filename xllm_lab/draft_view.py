"""What a draft policy sees of a step that a batch policy has planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xllm_lab.draft_time import DraftTime
from xllm_lab.live_view import LiveView
from xllm_lab.policies.api import BatchPlan, blocks_to_take, is_decoding
from xllm_lab.policies.draft import Tally
from xllm_lab.request_state import RequestState
from xllm_lab.step_time import StepTime
from xllm_lab.tallies import Tallies


@dataclass(slots=True, kw_only=True)
class PlannedStep:
    """A `DraftView`: what a batch policy planned, and what that leaves."""

    now_us: int
    decoding: Sequence[RequestState]
    num_tokens: int
    num_waiting: int
    tokens_left: int
    blocks_left: int
    block_size: int
    methods: Sequence[str]
    times: DraftTimes | None
    tallies: Tallies

    def tally(self, method: str) -> Tally:
        return self.tallies.of(method)


class Load(NamedTuple):
    """A step in sums: what its time depends on."""

    num_tokens: int
    num_seqs: int
    num_logits: int
    attention: float
    kv_read: int


class DraftTimes:
    """A `DraftTimesView`: what the machine's fitted times say of a step."""

    def __init__(self, step_time: StepTime, draft_time: DraftTime, load: Load) -> None:
        self._step_time, self._load = step_time, load
        # As they are: a policy asks for every draft that it weighs.
        self.row_us, self.draft_us = step_time.row_us, draft_time.us

    @property
    def step_us(self) -> float:
        return self._step_time.load_us(*self._load)


def planned_step(view: LiveView, plan: BatchPlan, *, methods: Sequence[str], tallies: Tallies) -> PlannedStep | None:
    """A plan that is not carried out yet, and what it leaves; None if nobody in it may draft."""
    chunks, lost = _chunks(view, plan), set(plan.preempt)
    decoding = [s for s in view.decoding if s.id not in lost and s.most_drafts > 0] if plan.decode_all else []
    decoding += [r for r, _ in chunks if r.is_running and is_decoding(r) and r.most_drafts > 0]
    if not decoding:
        return None
    num_tokens, blocks = sum(plan.tokens.values()), sum(blocks_to_take(view, r, n) for r, n in chunks)
    if plan.decode_all:
        num_tokens += len(view.decoding)
        blocks += view.num_decode_blocks
    return PlannedStep(
        now_us=view.now_us,
        decoding=decoding,
        num_tokens=num_tokens,
        num_waiting=len(view.waiting) - sum(not r.is_running for r, _ in chunks),
        tokens_left=view.max_tokens_per_batch - num_tokens,
        blocks_left=max(0, view.num_free_blocks - blocks),
        block_size=view.block_size,
        methods=methods,
        times=None,
        tallies=tallies,
    )


def load_of(view: LiveView, plan: BatchPlan) -> Load:
    """The sums of a plan that is not carried out yet."""
    decoding = view.decoding if plan.decode_all else []
    kv_tokens = sum(s.num_computed_tokens for s in decoding)
    num_tokens = num_seqs = num_logits = len(decoding)
    attention, kv_read = kv_tokens + 0.5 * num_tokens, kv_tokens + num_tokens
    for request, new in _chunks(view, plan):
        computed = request.num_computed_tokens
        num_tokens += new
        num_seqs += 1
        num_logits += computed + new == request.num_tokens
        attention += new * (computed + 0.5 * new)
        kv_read += computed + new
    return Load(num_tokens, num_seqs, num_logits, attention, kv_read)


def _chunks(view: LiveView, plan: BatchPlan) -> list[tuple[RequestState, int]]:
    return [(r, n) for i, n in plan.tokens.items() if (r := view.find(i)) is not None]
