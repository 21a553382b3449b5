"""The state machine of moving experts, by hand: whatever the host's speed and the steps' kinds, causes come first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.errors import ConfigError
from xllm_lab.policies.experts import ExpertsPlan, ExpertsView
from xllm_lab.rebalancing import Change, ExpertLayout, Rebalancing, placements
from xllm_lab.records import Records
from xllm_lab.step import NO_DECODES, Step

LAYOUT = ExpertLayout(layers=(3, 7), num_experts=4, num_devices=2, expert_bytes=10, prepare_timeout_us=500)
STEP_US = 10


class Turning:
    """Each time it is asked, the experts of one layer change places."""

    decides: ClassVar[str] = "experts"
    num_redundant_experts, interval_us = 0, 60

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        layer = view.layers[view.now_us // STEP_US % 2]
        return ExpertsPlan(slots={layer.id: (*layer.slots[1:], layer.slots[0])}, reason="turns")


class ByHand:
    """A `Mover` that is ready so long after it was asked, change by change."""

    layout, row_units, next_us = LAYOUT, 1, None

    def __init__(self, delays_us: list[int]) -> None:
        self._delays_us, self._ready_us = delays_us, 0
        self.is_busy = False

    def prepare(self, change: Change, now_us: int) -> None:
        assert not self.is_busy, "two changes at a time"
        self.is_busy = True
        self._ready_us = now_us + self._delays_us[change.number % len(self._delays_us)]

    def ready_us(self, now_us: int) -> int | None:
        return self._ready_us if self._ready_us <= now_us else None

    def drop(self, now_us: int) -> None:
        self.is_busy = False


def step_at(index: int, now_us: int) -> Step:
    return Step(index, now_us, NO_DECODES, (), (), (), (), "", 0, 0, 0, 0, 0, 0)


def run(delays_us: list[int], only_decodes: list[bool], *, plans_ahead: bool) -> tuple[Records, list[Step]]:
    """Steps of `STEP_US`, one after another; planned as they start, or as the one before does."""
    records, mover = Records(), ByHand(delays_us)
    subject = Rebalancing(Turning(), mover)
    subject.serve(records, 0)
    planned, done = list[Step](), list[Step]()
    for index, decodes in enumerate(only_decodes):
        planned.append(step_at(index, index * STEP_US))
        subject.look(max(0, index - plans_ahead) * STEP_US)
        subject.place(planned[-1], only_decodes=decodes)
        experts = planned[-1].experts
        assert experts is not None
        if experts.activates is not None:
            mover.is_busy = False
            assert decodes, "a change begins with a prompt"
        while len(planned) > plans_ahead:
            step = planned.pop(0)
            step.ends_us = ((step.index + 1) * STEP_US,)
            step.expert_rows_LP = np.full((2, 4), step.index, np.int64)
            subject.completed(step)
            done.append(step)
    subject.finish()
    return records, done


@given(
    st.lists(st.integers(0, 900), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=150),
    st.booleans(),
)
def test_a_change_is_decided_then_prepared_then_begun(
    delays_us: list[int], only_decodes: list[bool], plans_ahead: bool
) -> None:
    """In this order, one at a time; each step runs under one placement, and all rows are counted under it."""
    records, steps = run(delays_us, only_decodes, plans_ahead=plans_ahead)
    free_us = 0
    for d in records.decisions:
        assert d.decided_us >= free_us
        delay_us = delays_us[d.decision % len(delays_us)]
        if d.dropped_us is not None:
            assert d.dropped_us == d.decided_us + 500
            assert (d.ready_us, d.active_us) == (None, None)
            free_us = d.dropped_us
        if d.active_us is not None:
            assert d.ready_us is not None
            assert d.decided_us + delay_us <= d.ready_us <= d.active_us
            assert d.ready_us <= d.decided_us + 500
            free_us = d.active_us
    lay = placements(LAYOUT, 0, records.decisions)
    for step in steps:
        assert step.experts is not None
        begun = sum(d.active_step is not None and d.active_step <= step.index for d in records.decisions)
        assert step.experts.placement == begun
        assert step.experts.slots == lay[begun]
        assert all(sorted(own) == [0, 1, 2, 3] for own in step.experts.slots)
    for load in records.expert_loads:
        number = load.placement
        own = [s.index for s in steps if s.ends_us[0] <= load.end_us and s.experts and s.experts.placement == number]
        before = [
            x.slot_tokens_LP[0, 0] for x in records.expert_loads if x.placement == number and x.end_us < load.end_us
        ]
        assert int(load.slot_tokens_LP[0, 0]) == sum(own) - int(sum(before))
    assert sum(load.num_steps for load in records.expert_loads) == len(steps)


def test_who_is_late_is_given_up_and_the_next_is_tried() -> None:
    """A change that takes longer than the limit is dropped at the limit; one that does not holds."""
    records, _ = run([10_000, 30], [True] * 80, plans_ahead=False)
    late, *others = records.decisions
    assert (late.decided_us, late.dropped_us) == (60, 560)
    assert others[0].decided_us == 600
    assert others[0].active_us == 630


def test_a_change_waits_for_a_step_that_only_decodes() -> None:
    records, _ = run([0], [False] * 20 + [True], plans_ahead=False)
    (only,) = records.decisions
    assert (only.decided_us, only.ready_us, only.active_us, only.active_step) == (60, 60, 200, 20)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"num_experts": 5}, "5 experts on 2 devices"),
        ({"num_groups": 3}, "4 experts on 3 groups"),
        ({"num_nodes": 3}, "2 devices on 3 nodes"),
        ({"num_devices": 0}, "4 experts on 0 devices"),
    ],
)
def test_what_does_not_divide_is_refused(layout: dict[str, int], message: str) -> None:
    shape = {"num_experts": 4, "num_devices": 2, "expert_bytes": 1, **layout}
    with pytest.raises(ConfigError, match=message):
        ExpertLayout(layers=(0,), **shape)
