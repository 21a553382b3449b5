"""Virtual KV: which pages are mapped before they are needed, and which stay mapped after; one file a policy beside it.

With `kv_layout="virtual"` a running request has a slot, a contiguous range of addresses, and page i of the slot shows
the i-th KV block of the request's table. A page that is not mapped when its step comes is mapped first, and the step
waits for that; a page that shows the right block already costs nothing:

    mapped ahead    while the step before computes, for decoding requests that are about to enter their next page
    mapped still    a request that ended leaves its slot as it is; one that gets the same blocks takes the slot over

A policy says how much of either. Whatever it says, a request reads its own blocks. A policy is a frozen, keyword-only
dataclass whose annotated fields are its knobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NewType, Protocol

SlotId = NewType("SlotId", int)
# Of a plan that stays as it is until somebody enters a page, comes or goes.
FOR_EVER = 1 << 30


class FreeSlotView(Protocol):
    """A slot that no request has, and that has pages mapped."""

    @property
    def id(self) -> SlotId: ...
    @property
    def num_pages(self) -> int:
        """Mapped, from the first on; at least 1."""
        ...

    @property
    def freed_at(self) -> int:
        """The last step, by number, that was planned when its request left it."""
        ...


class PagesView(Protocol):
    """The slots of an instance, when a step has been planned and its own pages are found.

    Slots come in no promised order: sort by a key that ends in the id.
    """

    @property
    def free_slots(self) -> Sequence[FreeSlotView]: ...
    @property
    def num_mapped_pages(self) -> int:
        """Of all slots."""
        ...

    @property
    def num_used_pages(self) -> int:
        """Those that hold blocks of running requests."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        ...

    @property
    def steps_to_entering(self) -> int | None:
        """After so many steps of nothing but decoding, at least 1, somebody enters a page; None if nobody decodes."""
        ...

    def num_entering(self, num_steps: int) -> int:
        """Decoding requests that enter their next page within so many further steps."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePlan:
    """What is mapped and unmapped while the step computes.

    Attributes:
        num_ahead: for so many decoding requests, in the order in which they enter their next pages, those are mapped.
        reclaim: of free slots, how many pages stay mapped, from the first on; a slot that is not named keeps all.
        holds_for: for how many further steps of nothing but decoding, in which nobody enters a page, comes or goes, the
            policy would map and unmap nothing.
        reason: in one phrase.
    """

    num_ahead: int = 0
    reclaim: Mapping[SlotId, int] = field(default_factory=dict)
    holds_for: int = 0
    reason: str


class PagesPolicy(Protocol):
    """Which pages are mapped that no step needs yet, or any more."""

    decides: ClassVar[str]  # "pages"
    # Flags that make xLLM do so, whatever the knobs say. A policy without them cannot be exported.
    # xllm_flags: ClassVar[Mapping[str, bool | str]]

    def decide(self, view: PagesView) -> PagePlan:
        """A legal plan (see `pages_checks.pages_violations`). Pure."""
        ...


def reclaimed(slots: Sequence[FreeSlotView], most_pages: int) -> dict[SlotId, int]:
    """What leaves `most_pages` mapped in free slots: those that were freed last keep theirs."""
    left, plan = most_pages, dict[SlotId, int]()
    for slot in sorted(slots, key=lambda s: (-s.freed_at, s.id)):
        kept = min(slot.num_pages, left)
        left -= kept
        if kept < slot.num_pages:
            plan[slot.id] = kept
    return plan
