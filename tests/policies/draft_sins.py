"""Bad draft policies, kept on purpose: each breaks one law of the contract. See `sins`."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

from xllm_lab.policies.draft import METHODS, Ask, DecodingView, DraftPlan, DraftView, Room, drafting_key


def one_method(view: DraftView) -> str | None:
    return next((m for m in METHODS if m in view.methods), None)


def granted(view: DraftView, requests: list[DecodingView], method: str | None, depth: int = 2) -> DraftPlan:
    """Drafts for those, in this order, as far as there is room."""
    room = Room(view)
    for request in requests:
        if method is not None:
            room.grant(request, method, depth)
    return room.plan("so be it")


def in_order(view: DraftView) -> list[DecodingView]:
    return sorted(view.decoding, key=drafting_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class _DraftSin:
    decides: ClassVar[str] = "draft"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftsBeyondTheEnd(_DraftSin):
    """Gives everybody three drafts, as if there were always room for them. Broken law: legal."""

    def decide(self, view: DraftView) -> DraftPlan:
        asks = {r.id: Ask(view.methods[0], 3) for r in view.decoding} if view.methods else {}
        return DraftPlan(asks=asks, reason="three each")


@dataclass(frozen=True, slots=True, kw_only=True)
class TakesMtpForGranted(_DraftSin):
    """Drafts by a module that the model may not have. Broken law: legal."""

    def decide(self, view: DraftView) -> DraftPlan:
        return granted(view, in_order(view), "mtp")


@dataclass(frozen=True, slots=True, kw_only=True)
class DividesByDrafts(_DraftSin):
    """Forgets that there may have been none. Broken law: legal."""

    def decide(self, view: DraftView) -> DraftPlan:
        good = [r for r in in_order(view) for d, a in [r.tally("ngram")] if a[0] / d[0] > 0.5]
        return granted(view, good, one_method(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternates(_DraftSin):
    """Drafts in every second step, by its own count. Broken law: repeatable."""

    steps: list[int] = field(default_factory=list)

    def decide(self, view: DraftView) -> DraftPlan:
        self.steps.append(view.now_us)
        return granted(view, in_order(view) if len(self.steps) % 2 else [], one_method(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstListedFirst(_DraftSin):
    """Serves requests as they are listed until there is no room. Broken law: order-free."""

    def decide(self, view: DraftView) -> DraftPlan:
        return granted(view, list(view.decoding), one_method(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstListedMethod(_DraftSin):
    """Takes the first method that is listed. Broken law: order-free."""

    def decide(self, view: DraftView) -> DraftPlan:
        return granted(view, in_order(view), view.methods[0] if view.methods else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TriesEveryThirdId(_DraftSin):
    """Explores by id. Broken law: identity-free."""

    def decide(self, view: DraftView) -> DraftPlan:
        return granted(view, [r for r in in_order(view) if r.id % 3 == 0], one_method(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetsTheCounts(_DraftSin):
    """Begins a new count where it begins to draft. Broken law: pure."""

    def decide(self, view: DraftView) -> DraftPlan:
        for request in view.decoding:
            reset: Any = request
            reset.tallies = {}
        return granted(view, in_order(view), one_method(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExploresByDice(_DraftSin):
    """As the textbook on bandits has it. Broken law: clockless."""

    def decide(self, view: DraftView) -> DraftPlan:
        return granted(view, [r for r in in_order(view) if random.random() < 0.1], one_method(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOfMethods(_DraftSin):
    """Takes whichever method a set has first. Broken law: hash-free."""

    def decide(self, view: DraftView) -> DraftPlan:
        return granted(view, in_order(view), next(iter(set(view.methods)), None))
