"""The catalog: every kind of policy is found by what it decides, and built by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xllm_lab.errors import ConfigError
from xllm_lab.policies.catalog import (
    decisions,
    make_batch_policy,
    make_draft_policy,
    make_failover_policy,
    make_route_policy,
    make_shapes_policy,
    policies,
    policy_name,
)
from xllm_lab.policies.route.least_loaded import LeastLoaded

MAKERS: dict[str, Callable[..., Any]] = {
    "batch": make_batch_policy,
    "draft": make_draft_policy,
    "failover": make_failover_policy,
    "route": make_route_policy,
    "shapes": make_shapes_policy,
}


def test_a_policy_belongs_to_one_decision() -> None:
    """Batches come first where nobody says which."""
    assert decisions() == tuple(MAKERS)
    assert policies() == policies("batch")
    classes = [cls for decides in decisions() for cls in policies(decides).values()]
    assert len(classes) == len(set(classes))


@pytest.mark.parametrize("decides", MAKERS)
def test_every_policy_can_be_made_by_its_name(decides: str) -> None:
    """With the values that it comes with."""
    for name, cls in policies(decides).items():
        made = MAKERS[decides](name)
        assert made == cls()
        assert policy_name(made) == name
        assert made.decides == decides


def test_knobs_are_given_as_texts_or_values() -> None:
    """As the command line and a file do."""
    assert make_route_policy("least-loaded", {"load": "tokens"}) == LeastLoaded(load="tokens")
    assert make_route_policy("prefix-affinity", {"max_load_factor": "2"}).max_load_factor == 2.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("decides", MAKERS)
def test_unknown_names_and_knobs_are_refused(decides: str) -> None:
    """With what is accepted."""
    names = ", ".join(policies(decides))
    with pytest.raises(ConfigError) as refused:
        MAKERS[decides]("luck")
    assert str(refused.value) == f"unknown {decides} policy 'luck'; accepted: {names}"
    with pytest.raises(ConfigError, match="has no knob 'speed'; accepted: "):
        MAKERS[decides](next(iter(policies(decides))), {"speed": 1})
