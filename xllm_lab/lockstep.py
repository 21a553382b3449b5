"""Decoding requests that advance together, one token each per step: what changes for all of them is kept once.

A member's tokens in KV are `offset + clock`. A step moves the clock, whatever the number of members; only those whose
last block is full, or who have all their tokens, are looked at one by one.

    clock  0     1     2     3     4 ...              ticks that were scheduled
           |--A--|--A--|--A--|--A--|                  A joined at clock 0, and ends with tick 4
                 |--B--|--B--|--B--| ...              B joined at clock 1
    done   ------------------^                        ticks that are over; their ends are in `_ends`
"""

from __future__ import annotations

import bisect
import heapq
from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter

from xllm_lab.ledger import Ledger
from xllm_lab.policies.api import RequestId
from xllm_lab.policies.ordered import ByAdmission
from xllm_lab.request_state import RequestState
from xllm_lab.step import NO_DECODES, Decodes

_BY_ADMISSION = attrgetter("admission_order")
# How many ends of ticks are kept before those that no member needs any more are dropped.
_MOST_ENDS = 1 << 14


class Lockstep:
    """The members, in order of admission.

    Attributes:
        clock: ticks scheduled so far.
        done: ticks that are over; a step that is being planned while another runs is ahead of it.
    """

    __slots__ = (
        "_block_size",
        "_cached",
        "_draining",
        "_due",
        "_ends",
        "_first_end",
        "_last_ticks",
        "_member_ids",
        "_member_offsets",
        "_member_orders",
        "_num_due",
        "_num_joins",
        "_offset_sum",
        "_offsets",
        "clock",
        "done",
        "members",
    )

    def __init__(self, block_size: int) -> None:
        self.clock = self.done = 0
        self.members: ByAdmission[RequestState] = ByAdmission()
        self._block_size = block_size
        # By the clock modulo the block size: whose blocks are full then, and how many they are.
        self._due: list[dict[RequestId, RequestState]] = [{} for _ in range(block_size)]
        self._num_due = [0] * block_size
        self._member_orders: list[tuple[int, ...]] = []
        self._member_ids: list[RequestId] = []
        self._member_offsets: list[int] = []
        self._offsets: list[int] = []
        self._offset_sum = 0
        self._last_ticks: list[tuple[int, RequestId, int, RequestState]] = []
        self._num_joins = 0
        self._draining: list[tuple[int, RequestId, int, RequestState]] = []
        self._ends = array("q")
        self._first_end = 0
        self._cached: tuple[tuple[RequestId, ...], tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.members)

    @property
    def has_draining(self) -> bool:
        """Whether some who take part no more wait for their last ticks."""
        return bool(self._draining)

    def join(self, state: RequestState) -> None:
        """A decoding request takes part from the next tick on."""
        offset = state.num_computed_tokens - self.clock
        state.join(self, offset)
        place = bisect.bisect_left(self._member_orders, state.admission_order)
        self.members.insert(place, state)
        self._member_orders.insert(place, state.admission_order)
        self._member_ids.insert(place, state.id)
        self._member_offsets.insert(place, offset)
        bisect.insort(self._offsets, offset)
        self._offset_sum += offset
        due = -offset % self._block_size
        self._due[due][state.id] = state
        self._num_due[due] += 1
        self._cached = None
        # A token that is still being computed, and is the last, ends its request without us.
        if num_missing := state.most_output_tokens - state.num_drawn:
            self._num_joins += 1
            state.ticket = self._num_joins
            heapq.heappush(self._last_ticks, (self.clock + num_missing, state.id, state.ticket, state))

    def leave(self, state: RequestState) -> None:
        """A request goes on, or ends, by itself, with the tokens of all ticks that are over."""
        self.take_times(state)
        if not state.is_draining:
            self.retire(state)
        state.leave()

    def retire(self, state: RequestState) -> None:
        """A request takes part in no further tick, and still waits for those that are not over."""
        place = bisect.bisect_left(self._member_orders, state.admission_order)
        assert self.members[place] is state, f"request {state.id} is not where its order says"
        del self.members[place], self._member_orders[place], self._member_ids[place], self._member_offsets[place]
        del self._offsets[bisect.bisect_left(self._offsets, state.offset)]
        self._offset_sum -= state.offset
        due = -state.offset % self._block_size
        del self._due[due][state.id]
        self._num_due[due] -= 1
        self._cached = None

    def take_times(self, state: RequestState) -> None:
        """Write the ends of the member's ticks into its record."""
        if state.joined < self.done:
            state.record.token_times_us += self._ends[state.joined - self._first_end : self.done - self._first_end]

    def decodes(self) -> Decodes:
        """The decodes of the next tick."""
        if self._cached is None:
            self._cached = tuple(self._member_ids), tuple(self._member_offsets)
        ids, offsets = self._cached
        if not ids:
            return NO_DECODES
        kv_tokens = self._offset_sum + len(ids) * self.clock
        return Decodes(ids, offsets, self.clock, kv_tokens, self._offsets[-1] + self.clock)

    def num_blocks(self, num_ticks: int = 1) -> int:
        """Blocks that the next `num_ticks` ticks take."""
        if num_ticks == 1:
            return self._num_due[self.clock % self._block_size]
        rounds, rest = divmod(num_ticks, self._block_size)
        return rounds * len(self.members) + sum(self._next_round()[:rest])

    def blocks_per_tick(self, num_ticks: int) -> list[int]:
        """Blocks that each of the next `num_ticks` ticks takes."""
        return (self._next_round() * -(-num_ticks // self._block_size))[:num_ticks]

    def most_ticks(self, num_blocks: int) -> int:
        """How many ticks `num_blocks` are enough for; at most about a million."""
        if not self.members:
            return 0
        rounds = min(num_blocks // len(self.members), (1 << 20) // self._block_size)
        left = num_blocks - rounds * len(self.members)
        return rounds * self._block_size + bisect.bisect_right(list(accumulate(self._next_round())), left)

    def due(self, num_ticks: int) -> list[RequestState]:
        """Who takes a block with the tick after `num_ticks` more, in the order in which they take them."""
        return list(self._due[(self.clock + num_ticks) % self._block_size].values())

    @property
    def kv_tokens(self) -> int:
        """Tokens in KV of all members, at the clock."""
        return self._offset_sum + len(self.members) * self.clock

    def _next_round(self) -> list[int]:
        """Blocks that each of the next ticks takes, as many ticks as a block has tokens; then it begins again."""
        due = self.clock % self._block_size
        return self._num_due[due:] + self._num_due[:due]

    def advance(self, num_ticks: int, ledger: Ledger) -> None:
        """Move the clock; members whose blocks are full meanwhile take new ones."""
        clock, size = self.clock, self._block_size
        rounds, rest = divmod(num_ticks, size)
        if rounds:
            for state in self.members:
                ledger.extend(state.id, rounds)
        for now in range(clock, clock + rest):
            if full := self._due[now % size]:
                ledger.extend_each(full)
        self.clock = clock + num_ticks

    def at_clock(self, clock: int) -> list[RequestState]:
        """Requests whose blocks are all full when the clock stands there, in order of admission."""
        size = self._block_size
        found = [s for s in self._due[clock % size].values() if s.joined < clock]
        for _, _, ticket, state in self._draining:
            if ticket == state.ticket and state.joined < clock and (state.offset + clock) % size == 0:
                found.append(state)
        found.sort(key=_BY_ADMISSION)
        return found

    def next_end(self) -> int | None:
        """The tick with which the next request has all its tokens."""
        heap = self._last_ticks
        while heap and heap[0][2] != heap[0][3].ticket:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def drain(self) -> list[RequestState]:
        """Retire the members of whom every token is scheduled; returns them."""
        retired: list[RequestState] = []
        while (tick := self.next_end()) is not None and tick <= self.clock:
            entry = heapq.heappop(self._last_ticks)
            self.retire(entry[3])
            self._draining.append(entry)
            retired.append(entry[3])
        return retired

    def tick_over(self, ends_us: Sequence[int]) -> None:
        """The next ticks are over."""
        self.done += len(ends_us)
        self._ends.extend(ends_us)
        if len(self._ends) > _MOST_ENDS:
            kept = min((s.joined for s in self.members), default=self.done)
            kept = min(kept, self.done, *(entry[3].joined for entry in self._draining))
            del self._ends[: kept - self._first_end]
            self._first_end = kept

    def ended(self) -> list[RequestState]:
        """Requests that now have all their tokens, in order of id."""
        found: list[RequestState] = []
        while (tick := self.next_end()) is not None and tick <= self.done:
            found.append(heapq.heappop(self._last_ticks)[3])
        if self._draining:
            found += [
                state for tick, _, ticket, state in self._draining if tick <= self.done and ticket == state.ticket
            ]
            self._draining = [entry for entry in self._draining if entry[0] > self.done]
            found.sort(key=lambda state: state.id)
        return found
