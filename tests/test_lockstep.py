"""The lockstep against a naive model: every member counts for itself, and notes each tick it takes part in."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.small_runs import request
from xllm_lab import lockstep
from xllm_lab.ledger import Ledger
from xllm_lab.lockstep import Lockstep
from xllm_lab.policies.api import admission_key, ceil_div
from xllm_lab.request_state import RequestState, new_record
from xllm_lab.step import NO_DECODES


def decoding(number: int, *, block_size: int, arrival_us: int = 0, prompt: int = 4, output: int = 9) -> RequestState:
    """A request whose prompt was computed in one step, which is still under way."""
    one = request(number, arrival_us, prompt=prompt, output=output)
    ledger = Ledger(1, block_size, enable_prefix_cache=False)
    state = RequestState(one, np.zeros(prompt, dtype=np.int32), ledger, new_record(one))
    state.admit(arrival_us)
    assert state.compute(prompt)
    return state


@dataclass(eq=False)
class Member:
    """What the model knows of a request.

    Attributes:
        computed, missing, times_us: when it joined; output tokens that were neither there nor under way.
        ticks: numbers of those that it took part in.
    """

    state: RequestState
    computed: int
    missing: int
    times_us: list[int]
    is_draining: bool = False
    ticks: list[int] = field(default_factory=list)

    @property
    def num_computed(self) -> int:
        return self.computed + len(self.ticks)

    @property
    def num_missing(self) -> int:
        return self.missing - len(self.ticks)

    def last_tick(self, scheduled: int) -> int | None:
        """The one with which it has all its tokens; None if the last was under way when it joined."""
        return None if not self.missing else self.ticks[-1] if self.is_draining else scheduled + self.num_missing

    def blocks(self, num_ticks: int, block_size: int) -> int:
        """Blocks that its next ticks take."""
        return ceil_div(self.num_computed + num_ticks, block_size) - ceil_div(self.num_computed, block_size)

    def is_full_after(self, tick: int, block_size: int) -> bool:
        return tick in self.ticks and (self.computed + self.ticks.index(tick) + 1) % block_size == 0


class Ticking(RuleBasedStateMachine):
    """Requests join, advance, end as foreseen or by surprise, leave, and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.members: list[Member] = []
        self.outside: list[RequestState] = []
        self.ends_us: list[int] = []  # of the ticks that are over
        self.scheduled = self.num_requests = 0

    @initialize(block_size=st.sampled_from((1, 2, 3, 8)), foresees=st.booleans())
    def begin(self, block_size: int, foresees: bool) -> None:
        self.block_size, self.foresees = block_size, foresees
        self.lockstep = Lockstep(block_size)

    @property
    def active(self) -> list[Member]:
        return sorted((m for m in self.members if not m.is_draining), key=lambda m: admission_key(m.state))

    @rule(arrival_us=st.integers(0, 2), prompt=st.integers(1, 9), output=st.integers(1, 14))
    def join(self, arrival_us: int, prompt: int, output: int) -> None:
        """The first token of a prompt is under way; it may be all that the request wants."""
        number, self.num_requests = self.num_requests, self.num_requests + 1
        self._join(decoding(number, block_size=self.block_size, arrival_us=arrival_us, prompt=prompt, output=output))

    @precondition(lambda self: self.outside)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """With what it had, and what is under way."""
        self._join(self.outside.pop(data.draw(st.integers(0, len(self.outside) - 1))))

    @precondition(lambda self: self.active)
    @rule(num_ticks=st.integers(1, 9))
    def advance(self, num_ticks: int) -> None:
        """Ticks are scheduled, and who has all its tokens then may be foreseen."""
        ends = [m for m in self.active if m.missing] if self.foresees else []
        num_ticks = min([num_ticks, *(m.num_missing for m in ends)])
        taken = {m.state.id: m.blocks(num_ticks, self.block_size) for m in self.active}
        # Nobody holds a block yet: what `advance` gives out is what it thinks the ticks take.
        ledger = Ledger(sum(taken.values()), self.block_size, enable_prefix_cache=False)
        for request_id in taken:
            ledger.attach(request_id, ())
        self.lockstep.advance(num_ticks, ledger)
        assert {request_id: len(ledger.block_table(request_id)) for request_id in taken} == taken
        for member in self.active:
            member.ticks.extend(range(self.scheduled + 1, self.scheduled + num_ticks + 1))
        self.scheduled += num_ticks
        if self.foresees:
            drained = self.lockstep.drain()
            assert {s.id for s in drained} == {m.state.id for m in ends if m.num_missing == 0}
            for member in ends:
                member.is_draining = member.state.is_draining = member.num_missing == 0

    @precondition(lambda self: len(self.ends_us) < self.scheduled)
    @rule(num_ticks=st.integers(1, 12))
    def tick_over(self, num_ticks: int) -> None:
        """Ticks are over, at most to the next end; who has all its tokens leaves."""
        first = len(self.ends_us) + 1
        last_ticks = {m: tick for m in self.members if (tick := m.last_tick(self.scheduled)) is not None}
        over = min(first + num_ticks - 1, self.scheduled, *last_ticks.values())
        new = [10 * tick for tick in range(first, over + 1)]
        self.ends_us += new
        self.lockstep.tick_over(new)
        for tick in range(first, over + 1):
            full = [m.state.id for m in self.members if m.is_full_after(tick, self.block_size)]
            assert sorted(s.id for s in self.lockstep.at_clock(tick)) == sorted(full)
        done = sorted((m for m, tick in last_ticks.items() if tick == over), key=lambda m: m.state.id)
        assert self.lockstep.ended() == [m.state for m in done]
        for member in done:
            self._leave(member)

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Cancelled, or preempted, or scheduled by itself: it may come back unless it has all its tokens."""
        member = self.members[data.draw(st.integers(0, len(self.members) - 1))]
        self._leave(member)
        if member.num_missing >= 0 and not member.is_draining:
            self.outside.append(member.state)

    @invariant()
    def decodes_are_those_of_the_active(self) -> None:
        """In order of admission, with their counts."""
        decodes, computed = self.lockstep.decodes(), [m.num_computed for m in self.active]
        if not computed:
            assert decodes == NO_DECODES
            return
        assert decodes.ids == tuple(m.state.id for m in self.active)
        assert [offset + decodes.clock for offset in decodes.offsets] == computed
        assert (decodes.kv_tokens, decodes.max_kv_tokens) == (sum(computed), max(computed))
        later = decodes.later(3)
        assert [offset + later.clock for offset in later.offsets] == [c + 3 for c in computed]
        assert (later.kv_tokens, later.max_kv_tokens) == (sum(computed) + 3 * len(computed), max(computed) + 3)

    @invariant()
    def members_show_their_own_counts(self) -> None:
        """Without anybody having touched them. Nobody reads the counts of one that takes part no more."""
        assert list(self.lockstep.members) == [m.state for m in self.active]
        assert len(self.lockstep) == len(self.active)
        for member in self.active:
            assert member.state.num_computed_tokens == member.num_computed
            assert member.state.num_tokens == member.num_computed + 1
            assert member.state.num_drawn == member.num_computed + 1 - member.state.num_prompt_tokens

    @invariant()
    def blocks_are_foreseen(self) -> None:
        """For any number of ticks, and any number of blocks."""
        each = [sum(m.blocks(n, self.block_size) for m in self.active) for n in range(3 * self.block_size + 2)]
        assert [self.lockstep.num_blocks(n) for n in range(len(each))] == each
        per_tick = [after - before for before, after in pairwise(each)]
        assert [self.lockstep.blocks_per_tick(n) for n in range(len(each))] == [per_tick[:n] for n in range(len(each))]
        for num_blocks in range(each[-1]) if self.active else ():
            assert self.lockstep.most_ticks(num_blocks) == sum(taken <= num_blocks for taken in each) - 1
        assert self.active or self.lockstep.most_ticks(9) == 0

    @invariant()
    def ends_are_foreseen(self) -> None:
        """The next one among the active; and whether somebody's last tokens are under way."""
        ends = [tick for m in self.active if (tick := m.last_tick(self.scheduled)) is not None]
        assert self.lockstep.next_end() == min(ends, default=None)
        assert self.lockstep.has_draining or not any(m.is_draining for m in self.members)

    def _join(self, state: RequestState) -> None:
        missing = state.request.output_tokens - state.num_drawn
        self.members.append(Member(state, state.num_computed_tokens, missing, list(state.record.token_times_us)))
        self.lockstep.join(state)

    def _leave(self, member: Member) -> None:
        self.members.remove(member)
        self.lockstep.leave(member.state)
        member.state.is_draining = False
        ended = [self.ends_us[tick - 1] for tick in member.ticks if tick <= len(self.ends_us)]
        assert list(member.state.record.token_times_us) == member.times_us + ended
        assert member.is_draining or member.state.num_computed_tokens == member.num_computed
        assert member.state.lockstep is None


@pytest.mark.parametrize("most_ends", [0, 5, 1 << 14])
def test_members_are_as_if_each_counted_for_itself(most_ends: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few ends of ticks are kept."""
    monkeypatch.setattr(lockstep, "_MOST_ENDS", most_ends)
    run_state_machine_as_test(Ticking)


def test_ends_that_nobody_needs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a long run would keep one for each of its steps."""
    monkeypatch.setattr(lockstep, "_MOST_ENDS", 5)
    ticking, old, young = Lockstep(4), decoding(0, block_size=4), decoding(1, block_size=4)
    ticking.join(old)
    ticking.clock += 4
    ticking.tick_over([10, 20, 30, 40])
    ticking.leave(old)
    ticking.join(young)
    ticking.clock += 3
    ticking.tick_over([50, 60, 70])
    assert list(ticking._ends) == [50, 60, 70]
    ticking.leave(young)
    assert (list(old.record.token_times_us), list(young.record.token_times_us)) == ([10, 20, 30, 40], [50, 60, 70])
