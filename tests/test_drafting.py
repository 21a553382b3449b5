"""Speculation in the control loop: what is kept counts, what is not leaves no trace, whatever else happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import is_repeatable, obey_the_laws
from tests.small_runs import (
    EqualSteps,
    StoppingSteps,
    WildDrafts,
    batch_policies,
    busy_workloads,
    instance_config,
    request,
    run_audited,
    tight_configs,
)
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.workload import Workload


@given(
    busy_workloads(),
    st.builds(replace, tight_configs(), async_scheduling=st.sampled_from(ASYNC_SCHEDULING)),
    batch_policies(),
    st.sampled_from((EqualSteps(), StoppingSteps())),
    st.sampled_from((EAGER, PowersOfTwo(), PowersOfTwo(graphs_prefill=True))),
)
def test_any_run_with_drafts_obeys_the_laws(
    workload: Workload,
    config: InstanceConfig,
    policy: BatchPolicy,
    timing: EqualSteps,
    shapes: ShapesPolicy,
) -> None:
    """Chunks, preemptions, prefix hits, clients that leave, planning ahead and graphs, all at once."""
    records = run_audited(workload, config, policy, timing, draft=WildDrafts(), shapes=shapes)
    obey_the_laws(workload, config, records)
    is_repeatable(lambda: run_audited(workload, config, policy, timing, draft=WildDrafts(), shapes=shapes))


@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
def test_a_request_alone_ends_in_fewer_steps(mode: str) -> None:
    """And with as many tokens, whose times come in bunches."""
    work = Workload(requests=(request(0, prompt=4, output=30),))
    config = instance_config(async_scheduling=mode, num_kv_blocks=32)
    plain = run_audited(work, config, DecodeFirst())
    drafted = run_audited(work, config, DecodeFirst(), draft=WildDrafts())
    (before,), (after,) = plain.requests, drafted.requests
    assert len(drafted.steps) < len(plain.steps)
    assert before.output_tokens == after.output_tokens == 30
    assert sum(after.num_accepted) == 30 - len({*after.token_times_us})
