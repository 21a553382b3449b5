"""Warm-up is what came before the cache had what it will have, and a run that never got there says so."""

from __future__ import annotations

import pytest

from xllm_lab.policies.api import RequestId
from xllm_lab.records import RequestRecord
from xllm_lab.tuning.warm_up import after, num_warm_up


def requests(hits: list[float]) -> list[RequestRecord]:
    """Prompts of a thousand tokens, in order of arrival."""
    return [
        RequestRecord(
            id=RequestId(i),
            arrival_us=100 * i,
            prompt_tokens=1000,
            priority=2,
            ttft_slo_us=None,
            tpot_slo_us=None,
            e2e_slo_us=None,
            cached_tokens=round(1000 * hit),
            first_scheduled_us=100 * i,
        )
        for i, hit in enumerate(hits)
    ]


@pytest.mark.parametrize("hits", [[0.0] * 30, [0.7] * 30, [0.9, 0.0, 0.5] * 10, [0.5, 0.6], [0.4]])
def test_a_hit_rate_that_does_not_rise_has_no_warm_up(hits: list[float]) -> None:
    assert num_warm_up(requests(hits)) == 0


def test_the_rise_is_left_out() -> None:
    """It rises over eleven requests of fifty: what is left after the first tenth still rises, after two not."""
    assert num_warm_up(requests([0.08 * i for i in range(11)] + [0.8, 0.9, 0.85] * 13)) in (5, 10)


def test_a_hit_rate_that_rises_to_the_end_is_never_warm() -> None:
    assert num_warm_up(requests([i / 40 for i in range(40)])) is None


def test_a_falling_hit_rate_is_no_warm_up() -> None:
    """A cache that was full from the start loses what it had: that is not the cold one's doing."""
    assert num_warm_up(requests([1 - i / 40 for i in range(40)])) == 0


def test_who_never_ran_says_nothing_of_the_cache() -> None:
    some = requests([0.5] * 20)
    for request in some[:10]:
        request.first_scheduled_us, request.cached_tokens = None, 0
    assert num_warm_up(some) == 0


def test_the_first_to_arrive_are_left_out() -> None:
    """In whatever order they are given; the others come in order of id."""
    some = requests([0.0] * 6)
    for request in some:
        request.arrival_us = 1000 - request.arrival_us
    assert [r.id for r in after(some, 2)] == [0, 1, 2, 3]
