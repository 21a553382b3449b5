"""The summary of a run on disk is that of its records, to the last bit, however many rows are read at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import VOCAB_SIZE
from tests.small_runs import STEP_TIME, batch_policies, busy_workloads, instance_config, request, tight_configs
from tests.test_determinism import CALIBRATION
from xllm_lab import summary_of_run
from xllm_lab.errors import RunError
from xllm_lab.exact_counts import _FEW, ExactCounts
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import Distribution, summarize
from xllm_lab.outages import Outage
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.failover.requeue import Requeue
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.routing import InstanceId
from xllm_lab.records import REQUEST_SCHEMA
from xllm_lab.run_writer import RunWriter
from xllm_lab.runs import Manifest, Run, describe
from xllm_lab.sim.fleet import Fleet
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.simulator import serve_alone
from xllm_lab.summary_of_run import summarize_run
from xllm_lab.workload import Slo, Workload

FIRST, SECOND = InstanceId(0), InstanceId(1)
FLEETS = (
    None,
    FleetConfig(num_instances=2),
    FleetConfig(num_instances=2, outages=(Outage(instance=FIRST, start_us=15, end_us=90),)),
    FleetConfig(
        num_instances=2,
        outages=(Outage(instance=FIRST, start_us=10, end_us=60), Outage(instance=SECOND, start_us=70, end_us=95)),
        failover=Requeue(),
    ),
)


def served(folder: Path, workload: Workload, config: InstanceConfig, policy: BatchPolicy, fleet: int = 0) -> Run:
    """As `simulate`, which refuses beforehand what would be rejected here."""
    machine, chosen = fitted_machine(CALIBRATION), FLEETS[fleet]
    timing = Predicted(machine.cost_of(config))
    with RunWriter(folder) as writer:
        known: dict[str, Any] = {"recorder": writer, "vocab_size": VOCAB_SIZE, "step_time": STEP_TIME}
        if chosen is None:
            serve_alone(workload, config, Policies(policy), timing, **known)
        else:
            instances = Fleet(workload, chosen, config, Policies(policy), timing, on_transfer=writer.transfer, **known)
            writer.low_water_us = instances.low_water_us
            instances.run()
    told = describe(config, Policies(policy), STEP_TIME, workload)
    return Run(folder, Manifest(host="simulator", timing={}, model={"vocab_size": VOCAB_SIZE}, **told))


@given(
    busy_workloads(), tight_configs(), batch_policies(), st.integers(0, len(FLEETS) - 1), st.sampled_from([1, 3, 1000])
)
def test_a_run_on_disk_has_the_summary_of_its_records(
    workload: Workload, config: InstanceConfig, policy: BatchPolicy, fleet: int, batch_rows: int
) -> None:
    """Served, cancelled, rejected and failed ones; alone and in a fleet with outages."""
    with tempfile.TemporaryDirectory() as folder, patch.object(summary_of_run, "_REQUESTS_AT_A_TIME", batch_rows):
        run = served(Path(folder), workload, config, policy, fleet)
        assert summarize_run(run) == summarize(run.records)


def test_what_failed_is_counted(tmp_path: Path) -> None:
    """An instance that goes down with a request, which nobody takes over."""
    run = served(
        tmp_path, Workload(requests=tuple(request(k, output=9) for k in range(4))), instance_config(), Fcfs(), 2
    )
    summary = summarize_run(run)
    assert (summary.num_requests, summary.num_served, summary.num_failed) == (4, 2, 2)


def test_a_summary_is_what_arithmetic_says(tmp_path: Path) -> None:
    """Of each request alone, in Python's own integers."""
    work = Workload(requests=tuple(request(k, 9 * k, output=5, slo=Slo(ttft_us=12)) for k in range(5)))
    run = served(tmp_path, work, instance_config(), Fcfs())
    summary, requests = summarize_run(run), run.records.requests
    gaps = sorted(b - a for r in requests for a, b in zip(r.token_times_us, r.token_times_us[1:], strict=False))
    assert summary.itl_us is not None
    assert summary.ttft_us is not None
    assert summary.itl_us.mean == pytest.approx(sum(gaps) / len(gaps), rel=1e-12)
    assert summary.ttft_us.mean == pytest.approx(sum(r.token_times_us[0] - r.arrival_us for r in requests) / 5)
    kept = [r for r in requests if r.token_times_us[0] - r.arrival_us <= 12]
    assert 0 < len(kept) < 5
    assert summary.slo_attainment_frac == len(kept) / 5


@given(
    st.lists(
        st.lists(st.integers(-3, 60) | st.integers(_FEW - 2, _FEW + 2) | st.integers(0, 1 << 45)), min_size=1
    ).filter(any)
)
def test_counted_integers_have_numpys_percentiles(parts: list[list[int]]) -> None:
    """To the last bit, in whatever parts they come."""
    counts = ExactCounts()
    for part in parts:
        counts.add(np.asarray(part, dtype=np.int64))
    values, each = counts.in_order()
    everything = [value for part in parts for value in part]
    assert np.repeat(values, each).tolist() == sorted(everything)
    assert (np.diff(values) > 0).all()
    assert Distribution.of_counts(values, each) == Distribution.of(everything)


def test_a_file_that_lacks_requests_is_refused(tmp_path: Path) -> None:
    """As reading its records is."""
    run = served(tmp_path, Workload(requests=(request(0), request(1))), instance_config(), Fcfs())
    path = run.path / "requests.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(RunError, match=r"requests.parquet: holds 1 requests, manifest.json says 2"):
        summarize_run(run)


def test_an_unknown_end_is_refused(tmp_path: Path) -> None:
    """With the file and what is accepted."""
    run = served(tmp_path, Workload(requests=(request(0),)), instance_config(), Fcfs())
    path = run.path / "requests.parquet"
    rows = [{**row, "finish_reason": "bored"} for row in pq.read_table(path).to_pylist()]
    pq.write_table(pq.read_table(path).from_pylist(rows, schema=REQUEST_SCHEMA), path)
    with pytest.raises(RunError, match=r"requests.parquet: finish_reason is 'bored'; accepted: length, stop"):
        summarize_run(run)
