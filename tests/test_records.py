"""Records as tables, and back."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.small_runs import batch_policies, busy_workloads, run, tight_configs
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.records import Records, records_from, request_table, step_table, table_of_steps
from xllm_lab.workload import Workload


@given(busy_workloads(), tight_configs(), batch_policies(), st.sampled_from(ASYNC_SCHEDULING))
def test_records_survive_being_written_down(
    sent: Workload, config: InstanceConfig, policy: BatchPolicy, mode: str
) -> None:
    """Any run: what is read is what was written, and written again it is the same tables."""
    made = run(sent, replace(config, async_scheduling=mode), policy)
    requests, steps = request_table(made.requests), step_table(made.spans)
    read = records_from(requests, steps)
    assert read == made
    assert request_table(read.requests).equals(requests)
    assert table_of_steps(read.steps).equals(steps)


def test_nothing_is_a_table_too() -> None:
    """A run of which every client went away has no step."""
    nothing = Records()
    assert step_table(nothing.spans).equals(table_of_steps(nothing.steps))
    assert records_from(request_table([]), step_table([])) == nothing
