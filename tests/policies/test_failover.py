"""Failover policies: who starts over, how often, and who does not."""

from __future__ import annotations

import pytest

from xllm_lab.drawn_fleet_views import DrawnFailoverView, drawn_failover_view
from xllm_lab.policies.failover import FailoverPolicy
from xllm_lab.policies.failover.cancel import Cancel
from xllm_lab.policies.failover.requeue import Requeue


def action(policy: FailoverPolicy, *, failovers: int = 0, up: int = 2) -> str:
    view: DrawnFailoverView = drawn_failover_view(0)
    view.request.num_failovers = failovers
    view.num_up_instances = up
    return policy.decide(view).action


def test_cancel_cancels() -> None:
    """As xllm-service does."""
    assert {action(Cancel(), failovers=n, up=up) for n in (0, 5) for up in (0, 3)} == {"cancel"}


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_request_starts_over_so_often_and_no_more(most: int) -> None:
    """Counted from its first fresh start."""
    actions = [action(Requeue(max_failovers=most), failovers=n) for n in range(5)]
    assert actions == ["requeue"] * most + ["cancel"] * (5 - most)


def test_with_nobody_up_it_waits_or_ends() -> None:
    """As one likes."""
    assert action(Requeue(), up=0) == "requeue"
    assert action(Requeue(waits_for_repair=False), up=0) == "cancel"
    assert action(Requeue(waits_for_repair=False), up=1) == "requeue"


def test_a_negative_bound_is_refused() -> None:
    """It would mean nothing."""
    with pytest.raises(ValueError, match="max_failovers is -1, at least 0 is accepted"):
        Requeue(max_failovers=-1)
