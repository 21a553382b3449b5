"""Virtual KV as bookkeeping: which block each page of each slot shows. Ids and counts, no addresses.

    slot 0    | 7 | 3 | 4 |            a running request with the table [7, 3, 4]
    slot 1    | 7 | 3 | 9 | 5 |        another with the table [7, 3, 9]: it shares a prefix, and block 5 is a guess at
    slot 2    | 8 | 6 |                what it takes next. A request that ended left slot 2 as it was

A mapping is another name of a block and holds nothing: the ledger may give block 8 to anybody. It is wrong only as page
i of a request whose table has another block there, and that is compared whenever a table changes; so nothing has to be
unmapped in time. A slot whose request ended while a later step was planned stays as it is until that step is over: a
row computed in vain writes where the request's pages were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from xllm_lab.policies.api import RequestId
from xllm_lab.policies.pages import SlotId
from xllm_lab.step import PageRun


class FreeSlot(NamedTuple):
    """A `FreeSlotView`."""

    id: SlotId
    num_pages: int
    freed_at: int


class Slots:
    """The slots of one instance.

    Attributes:
        num_pages: that a slot has addresses for.
        num_mapped, num_used: pages, of all slots; of those, pages that hold the blocks of running requests.
    """

    def __init__(self, num_slots: int, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_mapped = self.num_used = 0
        self._num_slots = num_slots
        self._pages: list[list[int]] = []  # of each slot that was ever taken: its first pages are the mapped ones
        self._slot_of: dict[RequestId, int] = {}
        self._used: dict[RequestId, int] = {}
        self._empty: list[int] = []  # free, and nothing mapped
        self._free: dict[int, int] = {}  # with pages; when they were freed
        self._leaving: dict[int, int] = {}  # left by their requests with that step under way
        self._over = -1

    @property
    def is_settled(self) -> bool:
        """Whether no slot waits for a step to be over."""
        return not self._leaving

    def slot(self, request: RequestId) -> int:
        """Where a running request is."""
        return self._slot_of[request]

    def num_table_pages(self, request: RequestId) -> int:
        """Pages of a request's table, as `follow` was told last; 0 of one that has none."""
        return self._used.get(request, 0)

    def pages(self, slot: int) -> Sequence[int]:
        """The blocks that its mapped pages show."""
        return self._pages[slot]

    def free_slots(self) -> list[FreeSlot]:
        """With pages, by id."""
        return [FreeSlot(SlotId(s), len(self._pages[s]), at) for s, at in sorted(self._free.items())]

    def follow(self, request: RequestId, table: Sequence[int], first: int) -> tuple[list[PageRun], list[int]]:
        """A request's table changed from place `first` on.

        Returns:
            What has to be mapped, in runs as long as can be; and the pages that were found right, of those that it did
            not have before.
        """
        slot = self._slot_of.get(request)
        if slot is None:
            slot, first = self._take(table), 0
            self._slot_of[request] = slot
        assert len(table) <= self.num_pages, f"request {request} needs {len(table)} pages, a slot has {self.num_pages}"
        pages, found, wrong = self._pages[slot], list[int](), list[int]()
        for page in range(first, len(table)):
            (found if page < len(pages) and pages[page] == table[page] else wrong).append(page)
        for page in wrong:
            self._show(pages, page, table[page])
        self._use(request, len(table))
        return runs(slot, ((page, table[page]) for page in wrong)), found

    def guess(self, request: RequestId, block: int, *, is_next: bool) -> PageRun | None:
        """Map a running request's next page to the block that it may get. None if there is nothing to map.

        Args:
            is_next: it enters the page in the next step: an older guess is corrected. Any other is left alone.
        """
        slot, page = self._slot_of[request], self._used[request]
        pages = self._pages[slot]
        if page == self.num_pages or (page < len(pages) and (pages[page] == block or not is_next)):
            return None
        self._show(pages, page, block)
        return PageRun(slot, page, block, 1)

    def leave(self, request: RequestId, last_step: int) -> None:
        """A request is gone, or lost its KV; `last_step` is the last that was planned."""
        slot = self._slot_of.pop(request, None)
        if slot is not None:
            self.num_used -= self._used.pop(request)
            self._leaving[slot] = last_step
            self.over(self._over)

    def over(self, step: int) -> None:
        """Steps up to this one are over."""
        self._over = step
        for slot, last in list(self._leaving.items()):
            if last <= step:
                del self._leaving[slot]
                self._put(slot, last)

    def reclaim(self, kept: Mapping[SlotId, int]) -> list[PageRun]:
        """Unmap pages of free slots but for the first so many."""
        made = []
        for slot, count in sorted(kept.items()):
            pages, freed_at = self._pages[slot], self._free.pop(slot)
            made.append(PageRun(slot, count, -1, len(pages) - count))
            self.num_mapped -= len(pages) - count
            del pages[count:]
            self._put(slot, freed_at)
        return made

    def audit(self, tables: Mapping[RequestId, Sequence[int]]) -> None:
        """Assert that every page of a running request shows its block, and that slots and counts add up."""
        assert {r: len(t) for r, t in tables.items()} == self._used, "pages in use are not those of the tables"
        for request, table in tables.items():
            shown = self._pages[self._slot_of[request]][: len(table)]
            assert shown == list(table), f"request {request} has blocks {list(table)} and sees {shown}"
        whose = [*self._slot_of.values(), *self._empty, *self._free, *self._leaving]
        assert sorted(whose) == list(range(len(self._pages))), "a slot is lost, or had twice"
        assert len(self._pages) <= self._num_slots, "more slots than there are"
        assert sum(map(len, self._pages)) == self.num_mapped, "mapped pages are miscounted"
        assert sum(self._used.values()) == self.num_used, "used pages are miscounted"
        assert not any(self._pages[s] for s in self._empty), "an empty slot has pages"
        assert all(self._pages[s] for s in self._free), "a free slot has no pages"

    def _take(self, table: Sequence[int]) -> int:
        """The free slot that shows the most of a table, if any does; else an empty one, a new one, the oldest."""
        best, slot = 0, -1
        for free, _ in sorted(self._free.items()):
            right = sum(a == b for a, b in zip(self._pages[free], table, strict=False))
            if right > best:
                best, slot = right, free
        if slot < 0 and self._empty:
            return self._empty.pop()
        if slot < 0 and len(self._pages) < self._num_slots:
            self._pages.append([])
            return len(self._pages) - 1
        if slot < 0:
            assert self._free, f"all {self._num_slots} slots are taken"
            slot = min(self._free, key=lambda s: (self._free[s], s))
        del self._free[slot]
        return slot

    def _put(self, slot: int, freed_at: int) -> None:
        if self._pages[slot]:
            self._free[slot] = freed_at
        else:
            self._empty.append(slot)

    def _use(self, request: RequestId, num_pages: int) -> None:
        self.num_used += num_pages - self._used.get(request, 0)
        self._used[request] = num_pages

    def _show(self, pages: list[int], page: int, block: int) -> None:
        if page < len(pages):
            pages[page] = block
        else:
            assert page == len(pages), "a hole in a slot"
            pages.append(block)
            self.num_mapped += 1


def runs(slot: int, shown: Iterable[tuple[int, int]]) -> list[PageRun]:
    """Pages and their blocks, in order, as runs in which both count up by one."""
    return list(_runs(slot, shown))


def _runs(slot: int, shown: Iterable[tuple[int, int]]) -> Iterator[PageRun]:
    run: PageRun | None = None
    for page, block in shown:
        if run is not None and (page, block) == (run.page + run.num_pages, run.block + run.num_pages):
            run = run._replace(num_pages=run.num_pages + 1)
            continue
        if run is not None:
            yield run
        run = PageRun(slot, page, block, 1)
    if run is not None:
        yield run
