"""Bad policies, kept on purpose: each breaks one law of the contract, to prove that the law can see it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from xllm_lab.policies.api import (
    BatchPlan,
    BatchView,
    Packing,
    RequestView,
    arrival_key,
    by_arrival,
    num_missing_tokens,
)
from xllm_lab.policies.batch.fcfs import Fcfs


def packed(view: BatchView, requests: Iterable[RequestView]) -> BatchPlan:
    """As many as fit, in this order; and if none does, what a sound policy would do."""
    packing = Packing(view)
    for request in requests:
        if packing.tokens_left:
            packing.grant(request, min(packing.tokens_left, num_missing_tokens(request)))
    return packing.plan("packed") if packing else Fcfs().decide(view)


def everyone(view: BatchView) -> list[RequestView]:
    """Running ones first, each in order of arrival, so that a run ends."""
    return [*by_arrival(view.running), *by_arrival(view.waiting)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sin:
    decides: ClassVar[str] = "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class OverBudget(_Sin):
    """Gives everyone everything. Broken law: legal."""

    def decide(self, view: BatchView) -> BatchPlan:
        return BatchPlan(tokens={r.id: num_missing_tokens(r) for r in everyone(view)}, reason="all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Idler(_Sin):
    """Serves nobody on some days. Broken law: legal."""

    def decide(self, view: BatchView) -> BatchPlan:
        return BatchPlan(reason="holiday") if view.num_blocks % 7 == 0 else Fcfs().decide(view)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsIntoErrors(_Sin):
    """Forgets that there may be nothing to do. Broken law: legal."""

    def decide(self, view: BatchView) -> BatchPlan:
        oldest = min(everyone(view), key=arrival_key)
        return packed(view, [oldest])


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembers(_Sin):
    """Keeps memory to itself. Broken law: repeatable."""

    seen: list[int] = field(default_factory=list)

    def decide(self, view: BatchView) -> BatchPlan:
        self.seen.append(view.now_us)
        requests = everyone(view)
        return packed(view, requests if len(self.seen) % 2 else requests[::-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOfObjects(_Sin):
    """Iterates in the order of memory addresses. Broken law: repeatable."""

    def decide(self, view: BatchView) -> BatchPlan:
        return packed(view, set(everyone(view)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOfNames(_Sin):
    """Iterates in the order of hashed strings. Broken law: hash-free."""

    def decide(self, view: BatchView) -> BatchPlan:
        by_rank = {f"rank {rank}": request for rank, request in enumerate(everyone(view))}
        return packed(view, [by_rank[name] for name in set(by_rank)])


@dataclass(frozen=True, slots=True, kw_only=True)
class NoTieBreak(_Sin):
    """Sorts by priority alone. Broken law: order-free."""

    def decide(self, view: BatchView) -> BatchPlan:
        return packed(view, sorted((*view.running, *view.waiting), key=lambda r: r.priority))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenIdsFirst(_Sin):
    """Reads a meaning into ids. Broken law: identity-free."""

    def decide(self, view: BatchView) -> BatchPlan:
        return packed(view, sorted(everyone(view), key=lambda r: (r.id % 2, *arrival_key(r))))


@dataclass(frozen=True, slots=True, kw_only=True)
class SortsTheView(_Sin):
    """Puts the host's queue in order. Broken law: pure."""

    def decide(self, view: BatchView) -> BatchPlan:
        queue: Any = view.waiting
        queue.sort(key=arrival_key)
        return packed(view, everyone(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class MarksRequests(_Sin):
    """Raises the priority of whoever waits. Broken law: pure."""

    def decide(self, view: BatchView) -> BatchPlan:
        for request in view.waiting:
            marked: Any = request
            marked.priority = 1
        return packed(view, everyone(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class Thrashes(_Sin):
    """Whoever waits takes the place of whoever runs, and so for ever. Broken law: live."""

    def decide(self, view: BatchView) -> BatchPlan:
        packing = Packing(view)
        if not view.waiting or not view.running:
            return Fcfs().decide(view)
        for request in by_arrival(view.running):
            packing.preempt(request)
        for request in by_arrival(view.waiting):
            if packing.tokens_left:
                packing.grant(request, 1)
        return packing.plan("change places")


@dataclass(frozen=True, slots=True, kw_only=True)
class Starves(_Sin):
    """Never begins. Broken law: live."""

    def decide(self, view: BatchView) -> BatchPlan:
        # Drawn views are of later moments, so that no law but the one about whole runs can see it.
        return BatchPlan(reason="not yet") if view.now_us < 500 else Fcfs().decide(view)


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldsBackUntilTheyAreLong(_Sin):
    """Lets prompts in only beside long answers, and forgets that answers grow. Broken law: holds."""

    def decide(self, view: BatchView) -> BatchPlan:
        packing = Packing(view)
        is_short = any(r.num_tokens < r.num_prompt_tokens + 4 for r in view.decoding)
        if not view.prefilling and is_short and packing.grant_all_decoding():
            return packing.plan("let them grow", repeats=True)
        return replace(Fcfs().decide(view), holds_for=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldsBackTheYoung(_Sin):
    """Lets prompts in that have waited for long, and forgets that waiting takes time. Broken law: holds."""

    def decide(self, view: BatchView) -> BatchPlan:
        packing = Packing(view)
        is_young = all(view.now_us - r.arrival_us < 5 for r in view.waiting)
        if not view.prefilling and is_young and packing.grant_all_decoding():
            return packing.plan("let them age", repeats=True)
        return replace(Fcfs().decide(view), holds_for=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldsOneStepTooLong(_Sin):
    """Rests its prompts on every eighth decoded token, and counts to eight wrongly. Broken law: holds."""

    def decide(self, view: BatchView) -> BatchPlan:
        packing = Packing(view)
        most = max((r.num_tokens - r.num_prompt_tokens for r in view.decoding), default=0)
        if not view.prefilling and most % 8 and packing.grant_all_decoding():
            return replace(packing.plan("rest"), holds_for=8 - most % 8)
        return replace(Fcfs().decide(view), holds_for=0)
