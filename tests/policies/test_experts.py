"""Placements of experts: legal whatever was counted, repeatable, no slot changed in vain; and xLLM's own expectations.

The expectations are those of xLLM's tests/core/framework/eplb/eplb_policy_test.cpp at 3906f5a.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policies.experts_by_hand import experts_view, shares
from xllm_lab.drawn_experts_views import DrawnExpertsView, DrawnWindow
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.experts import ExpertsPlan, LayerId
from xllm_lab.policies.experts.hierarchical import Hierarchical
from xllm_lab.policies.experts.packing import copies_of, heaviest_first, load_per_copy, load_taken_off, packed
from xllm_lab.policies.experts.placement import by_device, contiguous, moved_slots, num_copies, peak, settled
from xllm_lab.policies.experts.round import faded
from xllm_lab.policies.experts.static import STATIC
from xllm_lab.policies.experts.xllm_balanced import XllmBalanced
from xllm_lab.policies.experts.xllm_greedy import XllmGreedy
from xllm_lab.policies.experts_checks import experts_violations

ADAPTIVE = [name for name in policies("experts") if name != "static"]
HOT = [100, 100, 100, *[3] * 12, 100]


@st.composite
def scenes(draw: st.DrawFn) -> DrawnExpertsView:
    """Any shape that can be placed, with loads from nothing to half of what 64 bits hold."""
    num_nodes = draw(st.integers(1, 3))
    num_devices = num_nodes * draw(st.integers(1, 4))
    share = draw(st.integers(1, 4))
    num_experts = num_devices * share
    redundant = draw(st.integers(0, num_experts - share))
    tokens = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 10**6), st.integers(0, 2**62))
    loads = draw(st.lists(tokens, min_size=num_experts, max_size=num_experts))
    names = draw(st.permutations(range(num_experts)))
    slots = [names[e] for e in contiguous(num_experts, num_devices, redundant)]
    groups = draw(st.sampled_from([g for g in range(1, num_experts + 1) if num_experts % g == 0]))
    return experts_view(loads, slots, num_devices, num_nodes=num_nodes, num_groups=groups)


@pytest.mark.parametrize("name", sorted(policies("experts")))
@given(view=scenes(), gate=st.sampled_from((0.0, 0.05, 0.3)))
def test_no_placement_loses_or_doubles_an_expert(name: str, view: DrawnExpertsView, gate: float) -> None:
    """Nor exceeds slots, nor differs when asked again; what it publishes has a lower peak than what was."""
    policy = make_policy("experts", name, {} if name == "static" else {"min_peak_gain_frac": gate})
    plan = policy.decide(view)
    assert experts_violations(view, plan) == []
    assert policy.decide(view) == plan
    (layer,) = view.layers
    for slots in plan.slots.values():
        loads = layer.windows[0].expert_tokens
        # What is there is judged by what its slots had, or by even shares of what its experts had; tokens are whole, so
        # that a slot may have one more or less.
        had = max(map(sum, by_device(layer.windows[0].slot_tokens, view.num_devices)))
        before = max(Fraction(had), peak(layer.slots, loads, view.num_devices))
        assert peak(slots, loads, view.num_devices) < before
        assert before - peak(slots, loads, view.num_devices) >= Fraction(gate) * before * Fraction(99, 100) - len(slots)


@pytest.mark.parametrize("name", ADAPTIVE)
@given(view=scenes())
def test_only_slots_change_that_must(name: str, view: DrawnExpertsView) -> None:
    """An expert that stays on a device stays in its slot, so that as few slots move as the devices' experts allow."""
    (layer,) = view.layers
    plan = make_policy("experts", name, {"min_peak_gain_frac": 0}).decide(view)
    for slots in plan.slots.values():
        devices = zip(by_device(layer.slots, view.num_devices), by_device(slots, view.num_devices), strict=True)
        assert moved_slots(layer.slots, slots) == sum(len(set(new) - set(old)) for old, new in devices)


@pytest.mark.parametrize("name", ADAPTIVE)
@given(view=scenes())
def test_a_placement_is_not_published_twice(name: str, view: DrawnExpertsView) -> None:
    """The same loads under the new placement are no reason for another."""
    (layer,) = view.layers
    loads = layer.windows[0].expert_tokens
    # Half the tokens of one slot are more than the gate otherwise.
    loads = tuple(1000 * tokens for tokens in loads)
    policy = make_policy("experts", name)
    plan = policy.decide(experts_view(loads, layer.slots, view.num_devices))
    for slots in plan.slots.values():
        assert policy.decide(experts_view(loads, slots, view.num_devices)).slots == {}


@pytest.mark.parametrize("name", ["xllm-balanced", "xllm-greedy"])
def test_hot_experts_get_copies(name: str) -> None:
    """16 experts, 4 devices of 5 slots: each expert has a slot, each slot an expert, no device one twice."""
    view = experts_view(HOT, contiguous(16, 4, 1), 4)
    (slots,) = make_policy("experts", name).decide(view).slots.values()
    assert experts_violations(view, ExpertsPlan(slots={LayerId(0): slots}, reason="")) == []
    assert [num_copies(slots, 16)[e] for e in (0, 1, 2, 15)] == [2, 2, 2, 2]
    assert peak(slots, HOT, 4) < peak(contiguous(16, 4, 1), HOT, 4)


def test_copies_are_counted_beyond_what_floats_tell_apart() -> None:
    """Loads of 2^62 + 100, 2^62 and 1 on 3 devices of 2 slots have 3, 2 and 1 copies."""
    loads = [2**62 + 100, 2**62, 1]
    assert copies_of(loads, 6, 3, load_taken_off) == [3, 2, 1]
    (slots,) = XllmBalanced().decide(experts_view(loads, contiguous(3, 3, 1), 3)).slots.values()
    assert num_copies(slots, 3) == [3, 2, 1]


def test_equal_loads_change_nothing() -> None:
    """Neither the first placement nor one that was made for other loads."""
    (skewed,) = XllmBalanced().decide(experts_view(HOT, contiguous(16, 4, 1), 4)).slots.values()
    for slots, num_devices in ((skewed, 4), (contiguous(16, 4), 4), (contiguous(8, 8), 8)):
        num_experts = 8 if num_devices == 8 else 16
        view = experts_view([100] * num_experts, slots, num_devices)
        for name in ("xllm-balanced", "xllm-greedy"):
            assert make_policy("experts", name).decide(view).slots == {}


def test_a_copy_goes_where_it_lightens_most_or_where_copies_are_heaviest() -> None:
    """The two rules part where one expert is far ahead: its third copy takes off a sixth of it only."""
    loads = [90, 40, 1]
    assert copies_of(loads, 5, 5, load_taken_off) == [2, 2, 1]
    assert copies_of(loads, 5, 5, load_per_copy) == [3, 1, 1]


def test_devices_without_room_for_the_last_copies_are_dealt_anew() -> None:
    """Where the last free slot is beside a copy, cyclic order finds a legal placement."""
    loads, copies = [1, 1, 9], [2, 2, 2]
    devices = packed([0, 1, 0, 1, 2, 2], loads, copies, 2)
    assert [sorted(own) for own in devices] == [[0, 1, 2], [0, 1, 2]]
    devices = packed([0, 1, 2, 2, 1, 1], [8, 4, 1], [1, 3, 2], 3)
    assert sorted(e for own in devices for e in own) == [0, 1, 1, 1, 2, 2]
    assert all(len(set(own)) == 2 for own in devices)


def test_older_intervals_fade_and_a_change_forgets_them() -> None:
    """Half for each interval in whole tokens; xLLM's policies read none from before it, the hierarchical all."""
    assert faded([[10, 0], [7, 4], [4, 4]], 0.5) == [14, 3]
    slots = contiguous(4, 2)
    view = experts_view([50, 50, 50, 50], slots, 2)
    old = DrawnWindow((4000, 4000, 0, 0), ())
    view.layers[0].windows.append(old)
    assert XllmBalanced().decide(view).slots == {}
    assert Hierarchical().decide(view).slots != {}
    view.layers[0].windows = [old]
    assert XllmBalanced().decide(view).slots == XllmGreedy().decide(view).slots == {}


@given(view=scenes())
def test_the_gate_keeps_small_gains_back(view: DrawnExpertsView) -> None:
    """A stricter gate publishes nothing that a laxer one does not; static nothing at all."""
    for name in ADAPTIVE:
        lax, strict = (make_policy("experts", name, {"min_peak_gain_frac": g}).decide(view) for g in (0.02, 0.2))
        assert strict.slots.items() <= lax.slots.items()
    assert STATIC.decide(view).slots == {}


def test_groups_go_to_nodes_whole() -> None:
    """Two nodes of two devices, four groups: the two heaviest are parted, and each node has two whole groups."""
    loads = [40, 40, 40, 40, 30, 30, 30, 30, 1, 1, 1, 1, 2, 2, 2, 2]
    view = experts_view(loads, contiguous(16, 4, 1), 4, num_nodes=2, num_groups=4)
    (slots,) = Hierarchical().decide(view).slots.values()
    nodes = [{e // 4 for e in slots[:10]}, {e // 4 for e in slots[10:]}]
    assert nodes in ([{0, 2}, {1, 3}], [{0, 3}, {1, 2}])
    # Three groups do not divide among two nodes: all devices are one node.
    odd = experts_view(loads[:12], contiguous(12, 4, 1), 4, num_nodes=2, num_groups=3)
    assert Hierarchical().decide(odd) == Hierarchical().decide(replace(odd, num_nodes=1, num_groups=1))


def test_first_placements_are_legal_and_others_refused() -> None:
    """Each expert once, and copies of others behind them."""
    assert contiguous(4, 2) == (0, 1, 2, 3)
    assert contiguous(4, 2, 1) == (0, 1, 2, 2, 3, 0)
    for wrong in ((5, 2, 0), (4, 2, 3), (4, 2, -1), (0, 1, 0)):
        with pytest.raises(ValueError, match="is accepted"):
            contiguous(*wrong)


def test_what_is_wrong_with_a_plan_is_told() -> None:
    """One sentence for each rule that it breaks."""
    view = experts_view([1, 1, 1, 1], contiguous(4, 2, 1), 2)

    def told(layer: int, *slots: int) -> list[str]:
        return experts_violations(view, ExpertsPlan(slots={LayerId(layer): slots}, reason=""))

    assert told(0, 0, 1, 3, 2, 3, 0) == []
    assert told(7, 0, 1, 2, 2, 3, 0) == ["places experts of layer 7, which has none"]
    assert told(0, 0, 1, 2, 3) == ["fills 4 slots of layer 0, there are 6"]
    assert told(0, 0, 1, 2, 2, 3, 0) == ["changes nothing in layer 0, which it names"]
    assert told(0, 0, 1, 2, 2, 0, 1) == ["leaves no slot of layer 0 to experts [3]"]
    assert told(0, 0, 0, 1, 2, 3, 0) == ["puts experts [0] twice on device 0 in layer 0"]
    assert told(0, 0, 1, 4, 2, 3, 0) == ["puts expert 4 into a slot of layer 0, there are 0 to 3"]


def test_who_stays_keeps_its_slot() -> None:
    """And who comes takes the slots of those who leave, in order."""
    assert settled([(3, 0, 1), (2, 3, 1)], (0, 1, 2, 2, 3, 0)) == (0, 1, 3, 2, 3, 1)
    assert shares([7, 1], (0, 1, 0)) == (4, 1, 3)
    assert heaviest_first([4, 9, 4], [1, 3, 1]) == [0, 2, 1]
