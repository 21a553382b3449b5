"""Roles: who computes prompts and who takes over; and that nobody changes sides and back for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.drawn_fleet_views import DrawnHeard, DrawnInstance, DrawnRolesView, drawn_roles_view
from xllm_lab.policies.fleet_checks import roles_violations
from xllm_lab.policies.roles import Role, RolesPlan
from xllm_lab.policies.roles.colocated import Colocated
from xllm_lab.policies.roles.slo_flip import SloFlip
from xllm_lab.policies.roles.static import Static
from xllm_lab.policies.routing import InstanceId

SECOND_US = 1_000_000


def heard(in_time: float = 1.0, steady: float = 1.0, *, num: int = 100, overdue: int = 0) -> DrawnHeard:
    """So many first tokens and ends, of which these fractions were as promised."""
    return DrawnHeard(
        since_us=0,
        num_first_tokens=num,
        num_in_time=round(num * in_time),
        num_overdue=overdue,
        num_ends=num,
        num_steady=round(num * steady),
    )


def view(roles: str, told: DrawnHeard | None = None, *, now_us: int = 60 * SECOND_US) -> DrawnRolesView:
    """Instances 0, 1, ... with roles by their first letters; those in capitals are up, and each has as many requests
    as its id."""
    names: dict[str, Role] = {"m": "mixed", "p": "prefill", "d": "decode"}
    usual = drawn_roles_view(0).instances[0]
    instances: list[DrawnInstance] = [
        replace(
            usual,
            id=InstanceId(k),
            role=names[letter.lower()],
            since_us=0,
            is_up=letter.isupper(),
            num_running=k,
            num_waiting=0,
            num_sent_since=0,
        )
        for k, letter in enumerate(roles)
    ]
    return DrawnRolesView(number=0, now_us=now_us, instances=instances, heard=told or heard())


def changed(plan: RolesPlan) -> dict[int, str]:
    return {int(i): role for i, role in plan.roles.items()}


@pytest.mark.parametrize(("num", "after"), [(1, "pddd"), (3, "pppd"), (4, "pppd"), (16, "pppd")])
def test_static_counts_from_the_first(num: int, after: str) -> None:
    """And leaves one on each side."""
    plan = Static(num_prefill=num).decide(view("MMMM"))
    assert [plan.roles[InstanceId(k)][0] for k in range(4)] == list(after)


def test_static_says_nothing_new_twice() -> None:
    """Whoever is up."""
    assert changed(Static().decide(view("PdD"))) == {}
    assert changed(Static().decide(view("M"))) == {}


def test_colocated_takes_roles_back() -> None:
    """A fleet that had some."""
    assert changed(Colocated().decide(view("PMD"))) == {0: "mixed", 2: "mixed"}


def test_slo_flip_begins_with_halves() -> None:
    """The smaller one computes prompts."""
    prefill, decode = {0: "prefill", 1: "prefill"}, {2: "decode", 3: "decode", 4: "decode"}
    assert changed(SloFlip().decide(view("MMMMM"))) == prefill | decode


def test_the_idlest_of_who_can_give_goes_over() -> None:
    """To whom is in need, either way."""
    assert changed(SloFlip().decide(view("PPDD", heard(in_time=0.5)))) == {2: "prefill"}
    assert changed(SloFlip().decide(view("PPDD", heard(steady=0.5)))) == {0: "decode"}


@pytest.mark.parametrize(
    ("roles", "told", "now_us"),
    [
        ("PPDD", heard(in_time=0.5, steady=0.9), 60 * SECOND_US),
        ("PPDD", heard(in_time=0.85, steady=1.0), 60 * SECOND_US),
        ("PPDD", heard(in_time=0.5), 4 * SECOND_US),
        ("PPPD", heard(in_time=0.5), 60 * SECOND_US),
        ("PPdD", heard(in_time=0.5), 60 * SECOND_US),
        ("PPDD", heard(in_time=0.5, num=7), 60 * SECOND_US),
        ("pDdD", heard(steady=0.2), 60 * SECOND_US),
    ],
    ids=["both in need", "within the band", "too soon", "the last one", "the last that is up", "too few", "nobody up"],
)
def test_nobody_goes_over(roles: str, told: DrawnHeard, now_us: int) -> None:
    """For a reason."""
    assert changed(SloFlip().decide(view(roles, told, now_us=now_us))) == {}


def test_going_back_takes_longer_than_going_on() -> None:
    """Instance 1 went over last: another may follow it soon, and none come back."""
    late, slow = heard(in_time=0.5), heard(steady=0.5)
    for now_s, told, goes in ((6, late, True), (6, slow, False), (31, slow, True), (4, late, False)):
        fleet = view("PPDD", told, now_us=now_s * SECOND_US)
        fleet.instances[1].since_us = 1
        assert bool(changed(SloFlip().decide(fleet))) == goes


def test_first_tokens_that_are_overdue_count_as_late() -> None:
    """Nothing has to be heard of them: a queue that does not move is the worst."""
    assert changed(SloFlip().decide(view("PPDD", heard(num=20, overdue=0)))) == {}
    assert changed(SloFlip().decide(view("PPDD", heard(num=20, overdue=20)))) == {2: "prefill"}


def test_a_side_with_nothing_to_do_can_give() -> None:
    """Nothing ended, because nobody asks for more than one token."""
    nothing_ends = replace(heard(in_time=0.2), num_ends=0, num_steady=0)
    idle = view("PPDD", nothing_ends)
    assert changed(SloFlip().decide(idle)) == {}  # they have requests, and nobody knows how those fare
    for instance in idle.instances:
        instance.num_running = 0
    assert changed(SloFlip().decide(idle)) == {2: "prefill"}


# As long as it takes for whoever flips to have flipped all that can.
ROUNDS = 20


@given(
    num=st.integers(2, 8),
    in_time=st.floats(0, 1),
    steady=st.floats(0, 1),
    policy=st.builds(SloFlip, low_frac=st.floats(0.5, 0.85), high_frac=st.floats(0.85, 1.0)),
)
def test_under_a_constant_load_roles_come_to_rest(num: int, in_time: float, steady: float, policy: SloFlip) -> None:
    """Figures that stay as they are move instances one way only, and each at most once."""
    fleet, flips = view("M" * num, heard(in_time, steady)), list[tuple[int, str]]()
    for k in range(ROUNDS):
        fleet.now_us = k * policy.min_dwell_us
        plan = policy.decide(fleet)
        flips += changed(plan).items() if k else ()
        _apply(fleet, plan)
    assert len(flips) == len({i for i, _ in flips}) <= max(0, num - 2)
    assert len({role for _, role in flips}) <= 1


@given(
    figures=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=5, max_size=40),
    num=st.integers(2, 5),
    interval_us=st.sampled_from((SECOND_US // 3, SECOND_US, 7 * SECOND_US)),
)
def test_a_flip_back_needs_both_figures_to_cross_the_band(
    figures: list[tuple[float, float]], num: int, interval_us: int
) -> None:
    """Whatever they do meanwhile; and roles stay for as long as they are to."""
    policy, fleet, last_us = SloFlip(), view("M" * num), 0
    for k, (in_time, steady) in enumerate(figures):
        fleet.now_us, fleet.heard = k * interval_us, heard(in_time, steady)
        plan = policy.decide(fleet)
        if k and plan.roles:
            (role,) = plan.roles.values()
            needy, giver = (in_time, steady) if role == "prefill" else (steady, in_time)
            assert round(100 * needy) < 100 * policy.low_frac
            assert round(100 * giver) >= 100 * policy.high_frac
            assert fleet.now_us - last_us >= policy.min_dwell_us
            last_us = fleet.now_us
        _apply(fleet, plan)
        assert {i.role for i in fleet.instances} == {"prefill", "decode"}


def _apply(fleet: DrawnRolesView, plan: RolesPlan) -> None:
    for instance in fleet.instances:
        if instance.id in plan.roles:
            instance.role, instance.since_us = plan.roles[instance.id], fleet.now_us


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ({0: "prefill"}, ["leaves no instance that takes over"]),
        ({1: "decode", 0: "decode"}, ["leaves no instance that computes prompts"]),
        ({7: "decode"}, ["gives a role to instance 7, there are 0, 1"]),
        ({0: "cook"}, ["makes instance 0 a 'cook', mixed, prefill, decode are possible"]),
        ({0: "mixed"}, []),
    ],
)
def test_a_plan_that_leaves_a_stage_to_nobody_is_told(roles: dict[int, str], said: list[str]) -> None:
    """And one that names what there is not."""
    plan = RolesPlan(roles={InstanceId(i): role for i, role in roles.items()}, reason="")  # type: ignore[misc]
    assert roles_violations(view("MP"), plan) == said


def test_impossible_knobs_are_refused() -> None:
    """In one sentence."""
    with pytest.raises(ValueError, match=r"low_frac is 0.9 and high_frac 0.8, low_frac <= high_frac <= 1 is accepted"):
        SloFlip(low_frac=0.9, high_frac=0.8)
    with pytest.raises(ValueError, match="num_prefill is 0, at least 1 is accepted"):
        Static(num_prefill=0)
