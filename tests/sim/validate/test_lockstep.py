"""A group in lockstep: one clock, everyone's requests served, and nobody faster than alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws import obey_the_laws
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.vllm import Vllm
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.cost import Batch, Price
from xllm_lab.sim.validate.lockstep import run_lockstep
from xllm_lab.workload import Prompt, Request, RequestId, Workload


class OneMicrosecondAToken:
    """The step of a group takes as long as its largest batch has tokens."""

    def __init__(self) -> None:
        self.batches: list[Sequence[Batch]] = []

    def together(self, batches: Sequence[Batch]) -> Price:
        self.batches.append(batches)
        return Price(float(max(b.num_tokens for b in batches)))


def workload(first_id: int, requests: list[tuple[int, int, int]]) -> Workload:
    return Workload(
        requests=tuple(
            Request(id=RequestId(first_id + i), arrival_us=at, prompt=Prompt(num_tokens=p), output_tokens=o)
            for i, (at, p, o) in enumerate(requests)
        )
    )


requests = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=6)


@given(st.lists(requests, min_size=1, max_size=3), st.sampled_from(["off", "length_aware"]))
@settings(max_examples=60)
def test_all_are_served_on_one_clock(of_each: list[list[tuple[int, int, int]]], async_scheduling: str) -> None:
    config = InstanceConfig(
        max_tokens_per_batch=32,
        max_seqs_per_batch=4,
        block_size=4,
        num_kv_blocks=40,
        enable_prefix_cache=False,
        async_scheduling=async_scheduling,
    )
    workloads = [workload(100 * k, r) for k, r in enumerate(of_each)]
    cost = OneMicrosecondAToken()
    records, extrapolated_frac = run_lockstep(
        workloads, config, Policies(Vllm()), cost, lambda r: np.empty(0, np.int32)
    )
    assert extrapolated_frac == 0
    starts = [{s.start_us: s.end_us for s in found.steps} for found in records]
    for found, asked in zip(records, workloads, strict=True):
        obey_the_laws(asked, config, found)
    for one in starts:
        for other in starts:
            shared = set(one) & set(other)
            assert {t: one[t] for t in shared} == {t: other[t] for t in shared}
    assert all(1 <= len(b) <= len(workloads) for b in cost.batches)
