"""The policies of an instance: one for each decision, in its place, and back from plain data."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from tests.laws import VOCAB_SIZE
from tests.small_runs import EqualSteps, instance_config, request
from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.catalog import policies
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.of_instance import BESIDE, DECISIONS, Policies, policies_from
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.records import Records
from xllm_lab.sim.fleet import Fleet
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.workload import Workload


def test_fields_are_decisions_that_policies_make() -> None:
    """And only the first has to be said."""
    assert DECISIONS == ("batch", *BESIDE) == tuple(f.name for f in fields(Policies))
    assert all(policies(decides) for decides in DECISIONS)
    assert Policies(Fcfs()) == Policies(Fcfs(), shapes=EAGER, draft=OFF)


def test_a_policy_in_the_place_of_another_is_refused() -> None:
    """Which types would tell a reader of code, and nobody tells a notebook."""
    with pytest.raises(ConfigError, match="xllm-buckets decides 'shapes'; accepted here: 'batch'"):
        Policies(XllmBuckets())  # type: ignore[arg-type]


def test_plain_data_is_read_back() -> None:
    """A decision that nobody wrote down does nothing: older files stay readable when a kind is added."""
    own = Policies(Fcfs(), shapes=XllmBuckets(acl_graph_decode_batch_size_limit=9))
    assert policies_from(own.as_dict()) == own
    assert policies_from({"batch": {"name": "fcfs"}}) == Policies(Fcfs())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"shapes": {"name": "eager"}}, "there is no batch policy"),
        ({"batch": {"name": "fcfs"}, "luck": {"name": "good"}}, "'luck' of an instance; accepted: batch, shapes"),
        ({"batch": {"name": "eager"}}, "unknown batch policy 'eager'; accepted: decode-first"),
    ],
)
def test_other_data_is_refused(value: dict[str, dict[str, str]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        policies_from(value)


def test_a_host_without_drafts_says_so(tmp_path: Path) -> None:
    """It would serve, and quietly not do what it was told."""
    drafting = Policies(Fcfs(), draft=Fixed())
    work, config = Workload(requests=(request(0),)), instance_config()
    with pytest.raises(ConfigError, match="draft policy fixed: nothing is known of what becomes of drafts here"):
        run_simulation(work, config, drafting, EqualSteps(), vocab_size=VOCAB_SIZE)
    with pytest.raises(ConfigError, match="draft policy fixed: nothing is known of what becomes of drafts here"):
        Fleet(
            work,
            FleetConfig(num_instances=2),
            config,
            drafting,
            EqualSteps(),
            recorder=Records(),
            vocab_size=VOCAB_SIZE,
        )
