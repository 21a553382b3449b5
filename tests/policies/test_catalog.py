"""The catalog: every kind of policy is found by what it decides, and built by name."""

from __future__ import annotations

import pytest

from xllm_lab.errors import ConfigError
from xllm_lab.policies.catalog import (
    decisions,
    make_policy,
    policies,
    policy_name,
)
from xllm_lab.policies.route.least_loaded import LeastLoaded

KINDS = ("batch", "cache", "draft", "experts", "failover", "pages", "roles", "route", "shapes")


def test_a_policy_belongs_to_one_decision() -> None:
    """Batches come first where nobody says which."""
    assert decisions() == KINDS
    assert policies() == policies("batch")
    classes = [cls for decides in decisions() for cls in policies(decides).values()]
    assert len(classes) == len(set(classes))


@pytest.mark.parametrize("decides", KINDS)
def test_every_policy_can_be_made_by_its_name(decides: str) -> None:
    """With the values that it comes with."""
    for name, cls in policies(decides).items():
        made = make_policy(decides, name)
        assert made == cls()
        assert policy_name(made) == name
        assert made.decides == decides


def test_knobs_are_given_as_texts_or_values() -> None:
    """As the command line and a file do."""
    assert make_policy("route", "least-loaded", {"load": "tokens"}) == LeastLoaded(load="tokens")
    assert make_policy("route", "prefix-affinity", {"max_load_factor": "2"}).max_load_factor == 2.0


@pytest.mark.parametrize("decides", KINDS)
def test_unknown_names_and_knobs_are_refused(decides: str) -> None:
    """With what is accepted."""
    names = ", ".join(policies(decides))
    with pytest.raises(ConfigError) as refused:
        make_policy(decides, "luck")
    assert str(refused.value) == f"unknown {decides} policy 'luck'; accepted: {names}"
    with pytest.raises(ConfigError, match="has no knob 'speed'; accepted: "):
        make_policy(decides, next(iter(policies(decides))), {"speed": 1})
