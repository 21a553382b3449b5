"""A configuration by names: a knob goes by its own where one part has it, and by its part's and its own always."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab import verbs
from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies import catalog
from xllm_lab.policies.api import Knob
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.catalog import fields_of, policies, policy_name
from xllm_lab.policies.draft.off import Off
from xllm_lab.policies.of_instance import BESIDE, DECISIONS, Policies
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.settings import DEFAULT, changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Thrifty(Fcfs):
    """As first come, first served."""

    depth: Annotated[int, Knob(1, 9)] = 1
    block_size: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses(Off):
    """As the one that never drafts."""

    decides: ClassVar[str] = "draft"
    depth: Annotated[int, Knob(1, 9)] = 3


@pytest.fixture
def namesakes(monkeypatch: pytest.MonkeyPatch) -> Candidate:
    """A configuration of two policies of this module, which share the name of a knob, and one with the instance."""
    every = (*catalog._modules(), sys.modules[__name__])
    monkeypatch.setattr(catalog, "_modules", lambda: every)
    return verbs.configure("thrifty", draft="guesses")


@given(data=st.data())
def test_a_knob_goes_by_its_name_and_by_its_parts_and_its_name(data: st.DataObject) -> None:
    """Whichever policies are chosen, both say the same; what is given is there."""
    names = {decides: data.draw(st.sampled_from(sorted(policies(decides)))) for decides in DECISIONS}
    start = changed(DEFAULT, names, {})
    parts: list[tuple[str, Any]] = [("instance", start.instance), *start.policies]
    part, owner = data.draw(st.sampled_from([(part, owner) for part, owner in parts if fields_of(type(owner))]))
    knob = data.draw(st.sampled_from(fields_of(type(owner))))
    setting = {f"{part}.{knob}": getattr(owner, knob)}
    assert changed(DEFAULT, names, setting) == start
    if sum(knob in fields_of(type(other)) for _, other in parts) == 1:
        assert changed(DEFAULT, names, {knob: getattr(owner, knob)}) == start


def test_settings_reach_the_part_that_has_them() -> None:
    """And what is not said is the default's, or the same policy's as it was."""
    own = verbs.configure("fcfs", {"block_size": "16"})
    assert own == Candidate(instance=InstanceConfig(block_size=16), policies=Policies(Fcfs()))
    graphs = changed(own, {"shapes": "xllm-buckets"}, {"shapes.acl_graph_decode_batch_size_limit": "9"})
    assert graphs.policies == Policies(Fcfs(), shapes=XllmBuckets(acl_graph_decode_batch_size_limit=9))
    assert changed(graphs, {"batch": None, "shapes": "xllm-buckets"}, {}) == graphs
    assert changed(graphs, {"shapes": "eager"}, {}) == own


def test_a_name_that_several_have_must_say_whose(namesakes: Candidate) -> None:
    """Of two policies, and of a policy and the instance."""
    names = {decides: policy_name(policy) for decides, policy in namesakes.policies}
    with pytest.raises(ConfigError, match=r"'depth' is ambiguous; accepted: batch\.depth or draft\.depth"):
        changed(DEFAULT, names, {"depth": 4})
    with pytest.raises(ConfigError, match=r"'block_size' is ambiguous; accepted: instance\.block_size or batch"):
        changed(DEFAULT, names, {"block_size": 4})
    made = changed(DEFAULT, names, {"draft.depth": "4", "batch.depth": 5, "instance.block_size": 32})
    assert made.policies == Policies(Thrifty(depth=5), draft=Guesses(depth=4))
    assert made.instance.block_size == 32


def test_an_unknown_setting_is_refused_with_all_that_are_accepted(namesakes: Candidate) -> None:
    """Each by the shortest name that says whose it is."""
    names = {decides: policy_name(policy) for decides, policy in namesakes.policies}
    with pytest.raises(ConfigError) as refused:
        changed(DEFAULT, names, {"width": 4})
    told, _, accepted = str(refused.value).partition("; accepted: ")
    assert told == "unknown setting 'width' for policies thrifty, eager, guesses, on-demand, device-only, static"
    assert {"batch.depth", "draft.depth", "instance.block_size", "num_kv_blocks"} <= set(accepted.split(", "))
    assert not {"depth", "block_size"} & set(accepted.split(", "))


def test_a_setting_that_is_given_twice_is_refused() -> None:
    """By either of its names."""
    with pytest.raises(ConfigError, match=r"instance\.block_size is given twice; accepted: once"):
        verbs.configure(settings={"block_size": 16, "instance.block_size": 32})


@pytest.mark.parametrize("name", ["luck", "batch"])
def test_an_unknown_decision_is_refused(name: str) -> None:
    """The batch policy has a place of its own."""
    with pytest.raises(ConfigError, match=f"unknown decision '{name}' of an instance; accepted: {', '.join(BESIDE)}"):
        verbs.configure(None, None, **{name: "fcfs"})
