"""Slots as a pages policy meets them, drawn by number for `contract`: none, many, freed at once, nobody decoding."""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass

from xllm_lab.policies.pages import SlotId


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnSlot:
    """A `FreeSlotView`."""

    id: SlotId
    num_pages: int
    freed_at: int


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnPagesView:
    """A `PagesView`, and its number.

    Attributes:
        entering: after how many steps each decoding request enters its next page, in order.
    """

    number: int
    free_slots: list[DrawnSlot]
    num_mapped_pages: int
    num_used_pages: int
    block_size: int
    entering: list[int]

    @property
    def steps_to_entering(self) -> int | None:
        return self.entering[0] if self.entering else None

    def num_entering(self, num_steps: int) -> int:
        return bisect.bisect_right(self.entering, num_steps)


def drawn_pages_view(number: int) -> DrawnPagesView:
    """The view of that number, at least 0: always the same one, in new objects."""
    rng = random.Random(f"pages view {number}")
    block_size = rng.choice((1, 2, 16, 128))
    slots = [
        DrawnSlot(id=SlotId(i), num_pages=rng.choice((1, 1, 2, 30, 400)), freed_at=rng.choice((-1, 3, 3, 99)))
        for i in rng.sample(range(50), rng.choice((0, 1, 2, 7)))
    ]
    entering = sorted(rng.randint(1, block_size) for _ in range(rng.choice((0, 0, 1, 3, 60))))
    num_used = len(entering) + rng.choice((0, 0, 500))
    return DrawnPagesView(
        number=number,
        free_slots=slots,
        num_mapped_pages=num_used + sum(s.num_pages for s in slots) + rng.choice((0, 2)),
        num_used_pages=num_used,
        block_size=block_size,
        entering=entering,
    )
