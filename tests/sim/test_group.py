"""A group steps together: one clock, all requests served, nobody ahead of anybody, and one alone as without a group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws import fleet_obeys_the_laws
from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.hardware import hardware
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.known_models import known_model
from xllm_lab.outages import Outage
from xllm_lab.policies.batch.vllm import Vllm as VllmBatch
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.roles.static import Static
from xllm_lab.policies.route.round_robin import RoundRobin
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.records import Records
from xllm_lab.runs import read_run
from xllm_lab.sim.cost import Batch, Price
from xllm_lab.sim.cost.host import HostedGroup, HostOverhead
from xllm_lab.sim.cost.roofline import RooflineCost
from xllm_lab.sim.cost.sharding import Sharding
from xllm_lab.sim.group import GroupTiming, Waves, fleet_of_group
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.machine import Deployment, roofline_machine
from xllm_lab.sim.simulator import run_simulation, simulate
from xllm_lab.workload import ClosedLoop, Prompt, Request, RequestId, Workload

QWEN = known_model("qwen3-30b-a3b")
PLAIN = Policies(VllmBatch())


def roofline(data: int) -> RooflineCost:
    return RooflineCost(hardware("ascend-910c"), QWEN, sharding=Sharding(data=data, expert=data))


class Watching:
    """A group's cost model that remembers what it was asked."""

    def __init__(self, data: int) -> None:
        self._cost = roofline(data)
        self.asked: list[Sequence[Batch]] = []

    def step(self, batch: Batch) -> Price:
        return self._cost.step(batch)

    def decode_steps(self, batch: Batch, num_steps: int) -> Any:
        return self._cost.decode_steps(batch, num_steps)

    def together(self, batches: Sequence[Batch]) -> Price:
        self.asked.append(batches)
        return self._cost.together(batches)


def config(**changed: Any) -> InstanceConfig:
    values: dict[str, Any] = {
        "max_tokens_per_batch": 64,
        "max_seqs_per_batch": 4,
        "block_size": 4,
        "num_kv_blocks": 60,
        "enable_prefix_cache": False,
        **changed,
    }
    return InstanceConfig(**values)


def workload(requests: list[tuple[int, int, int]], **more: Any) -> Workload:
    return Workload(
        requests=tuple(
            Request(id=RequestId(i), arrival_us=at, prompt=Prompt(num_tokens=p), output_tokens=o)
            for i, (at, p, o) in enumerate(requests)
        ),
        **more,
    )


def served(
    asked: Workload,
    size: int,
    instance: InstanceConfig,
    *,
    cost: Watching | None = None,
    policies: Policies = PLAIN,
    fleet: FleetConfig | None = None,
) -> Records:
    watching = cost or Watching(size)
    group = GroupTiming(size, watching, Waves())
    return run_simulation(
        *(asked, instance, policies, Predicted(watching)),
        vocab_size=QWEN.vocab_size,
        fleet=fleet or fleet_of_group(size),
        group=group,
    )


def by_instance(records: Records) -> dict[int, list[tuple[int, int]]]:
    spans = defaultdict(list)
    for step in records.steps:
        spans[step.instance].append((step.start_us, step.end_us))
    return spans


REQUESTS = st.lists(
    st.tuples(st.integers(0, 200_000), st.integers(1, 100), st.integers(1, 20)), min_size=1, max_size=12
)


@given(REQUESTS, st.integers(1, 4), st.sampled_from(["off", "length_aware"]), st.integers(1, 2))
@settings(max_examples=60)
def test_nobody_is_ahead_of_anybody(
    requests: list[tuple[int, int, int]], size: int, async_scheduling: str, num_groups: int
) -> None:
    """No instance's next step begins before all of its group ended theirs, and every token is served once."""
    asked, instance = workload(requests), config(async_scheduling=async_scheduling)
    fleet = FleetConfig(num_instances=size * num_groups, route=RoundRobin())
    records = served(asked, size, instance, fleet=fleet)
    fleet_obeys_the_laws(asked, fleet, instance, records, vocab_size=QWEN.vocab_size)
    spans = by_instance(records)
    for first in range(0, size * num_groups, size):
        waves = sorted({span for k in range(first, first + size) for span in spans.get(k, [])})
        assert all(end <= start for (_, end), (start, _) in pairwise(waves))


@given(REQUESTS, st.sampled_from(["off", "length_aware"]), st.booleans())
@settings(max_examples=40)
def test_a_group_of_one_is_an_instance(
    requests: list[tuple[int, int, int]], async_scheduling: str, in_graphs: bool
) -> None:
    """Bit for bit, though one skips steps that repeat themselves and the other takes each."""
    asked, instance = workload(requests), config(async_scheduling=async_scheduling)
    policies = Policies(VllmBatch(), shapes=PowersOfTwo()) if in_graphs else PLAIN
    fleet = FleetConfig(num_instances=1)
    together = served(asked, 1, instance, policies=policies, fleet=fleet)
    alone = run_simulation(
        *(asked, instance, policies, Predicted(roofline(1))), vocab_size=QWEN.vocab_size, fleet=fleet
    )
    assert [*together.steps] == [*alone.steps]
    assert [r.token_times_us for r in together.requests] == [r.token_times_us for r in alone.requests]


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 900)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from([None, 64]),
)
def test_more_is_never_cheaper(sizes: list[tuple[int, int]], who: int, graph_tokens: int | None) -> None:
    cost = roofline(4)
    batches = [Batch((), n, n * kv, kv, n, graph_tokens) for n, kv in sizes]
    who %= len(batches)
    n, kv = sizes[who]
    more = [*batches]
    more[who] = Batch((), min(n + 1, 64), (n + 1) * kv, kv, min(n + 1, 64), graph_tokens)
    assert cost.together(more).us >= cost.together(batches).us
    assert cost.together(batches) == cost.together(batches[::-1])
    if graph_tokens is None and len(batches) < 4:
        assert cost.together([*batches, Batch((), 1, 10, 10, 1)]).us >= cost.together(batches).us


def test_alike_instances_are_a_group_of_them() -> None:
    cost = roofline(4)
    for batch in (Batch((), 9, 900, 120, 9), Batch((), 9, 900, 120, 9, graph_tokens=16)):
        assert cost.together([batch] * 4).us == pytest.approx(cost.step(batch).us, rel=1e-12)


def test_who_has_nothing_computes_for_nobody_and_waits_for_all() -> None:
    """The second instance's request comes in the middle of a long prompt's step, and starts with the next one."""
    cost = Watching(2)
    asked = workload([(0, 60, 3), (10, 8, 2)])
    records = served(asked, 2, config(), cost=cost, fleet=FleetConfig(num_instances=2, route=RoundRobin()))
    first, second = by_instance(records)[0], by_instance(records)[1]
    assert second[0][0] == first[0][1]
    assert [len(b) for b in cost.asked] == [1, 2, 2]
    assert second[0][1] == first[1][1]


def test_a_group_replays_one_graph() -> None:
    """That of its largest batch; a batch too large for graphs makes all of them eager."""
    policies = Policies(VllmBatch(), shapes=PowersOfTwo())
    cost = Watching(2)
    asked = workload([(0, 3, 6), (0, 3, 6), (0, 3, 6)])
    records = served(asked, 2, config(), cost=cost, policies=policies)
    for wave in {s.start_us for s in records.steps}:
        assert len({s.graph_tokens for s in records.steps if s.start_us == wave}) == 1
    for batches in cost.asked:
        graph = {b.graph_tokens for b in batches}
        assert len(graph) == 1
        assert graph == {None} or next(iter(graph)) >= max(b.num_tokens for b in batches)  # type: ignore[operator]


def test_a_host_in_front_of_each_counts_once() -> None:
    batches = [Batch((), 2, 20, 10, 2), Batch((), 5, 50, 10, 5)]
    device = roofline(2).together(batches).us
    hosted = HostedGroup(roofline(2), HostOverhead(step_us=100.0, sequence_us=10.0))
    assert hosted.together(batches).us == pytest.approx(device + 150)


def test_a_deployment_with_data_parallelism_is_simulated_as_a_group(tmp_path: Path) -> None:
    """Its manifest says who decided, and how many batches were empty; skew makes it slower."""
    asked = workload([(0, 64, 40)] * 6, closed_loop=ClosedLoop(num_clients=3))
    instance = config(num_kv_blocks=200, max_tokens_per_batch=128)
    device = hardware("ascend-910c")
    ends = {}
    for name, more in {"even": {}, "alike": {"is_one_of_alike": True}}.items():
        deployment = Deployment(data_parallel=2, expert_parallel=2, **more)  # type: ignore[arg-type]
        simulate(asked, instance, PLAIN, roofline_machine(device, QWEN, deployment), out=tmp_path / name)
        run = read_run(tmp_path / name)
        ends[name] = max(r.finish_us for r in run.records.requests if r.finish_us is not None)
        if name == "even":
            assert run.manifest.fleet is not None
            assert run.manifest.fleet["route"]["policy"] == "vllm"
            assert run.manifest.timing["waves"]["num_waves"] > 0
            assert {r.instance for r in run.records.requests} == {0, 1}
        else:
            assert run.manifest.fleet is None


@pytest.mark.parametrize(
    ("fleet", "told"),
    [
        (FleetConfig(num_instances=3), "data_parallel is 2 and num_instances 3"),
        (FleetConfig(num_instances=2, outages=(Outage(instance=0, start_us=5, end_us=9),)), "outage"),  # type: ignore[arg-type]
        (FleetConfig(num_instances=2, roles=Static()), "have one role"),
    ],
)
def test_what_a_group_cannot_have_is_refused(fleet: FleetConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        served(workload([(0, 3, 2)]), 2, config(), fleet=fleet)


def test_virtual_kv_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_layout 'virtual'"):
        served(workload([(0, 3, 2)]), 2, config(kv_layout="virtual"))
