"""Fleets with roles: what a handover is, and what becomes of it; roles that follow a load that shifts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import VOCAB_SIZE, fleet_obeys_the_laws
from tests.perfetto_trace import PerfettoTrace
from tests.sim.test_fast_forward import Uneven
from tests.sim.test_fleet import fleets, roles, served
from tests.small_runs import STEP_TIME, busy_workloads, instance_config, request, tight_configs
from xllm_lab.decisions import DecisionLog
from xllm_lab.errors import PolicyError
from xllm_lab.fleet_config import FleetConfig, LinkConfig
from xllm_lab.hardware import hardware
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import meets_slo, summarize
from xllm_lab.outages import Outage
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.failover.requeue import Requeue
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.roles import RolesPlan, RolesPolicy, RolesView
from xllm_lab.policies.roles.colocated import Colocated
from xllm_lab.policies.roles.slo_flip import SloFlip
from xllm_lab.policies.roles.static import Static
from xllm_lab.policies.routing import InstanceId
from xllm_lab.records import FinishReason, Records, RoleChange
from xllm_lab.request_columns import columns_of
from xllm_lab.run_writer import ROLES_FILE
from xllm_lab.sim.fleet import Fleet
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.machine import Deployment, Machine, model_of, roofline_machine
from xllm_lab.sim.simulator import simulate
from xllm_lab.timeline_file import write_timeline
from xllm_lab.workload import ClosedLoop, Request, Slo, Workload, stream

SECOND_US = 1_000_000


def pair(**changes: object) -> FleetConfig:
    """Instance 0 computes prompts, instance 1 takes over."""
    usual: dict[str, object] = {"num_instances": 2, "heartbeat_us": 0, "roles": Static(), "role_interval_us": 5}
    return FleetConfig(**{**usual, **changes})  # type: ignore[arg-type]


def told(work: Workload, fleet: FleetConfig, config: InstanceConfig | None = None) -> tuple[Records, DecisionLog]:
    """What was served, and what the router decided."""
    records, log = Records(), DecisionLog()
    log.sees_index = False
    Fleet(
        *(work, fleet, config or instance_config(), Policies(Fcfs()), Predicted(Uneven())),
        recorder=records,
        vocab_size=VOCAB_SIZE,
        step_time=STEP_TIME,
        on_decision=log.listener(),
    ).run()
    return records.sort(), log


def test_the_first_token_comes_from_one_and_the_others_from_another() -> None:
    """A microsecond after it was drawn the request is on its way, with its token, and is computed anew there."""
    work = Workload(requests=(request(0, prompt=8, output=4),))
    records, _ = told(work, pair(), instance_config(max_tokens_per_batch=32))
    (record,) = records.requests
    first, second, *_ = records.steps
    assert (record.prefill_instance, record.instance, record.handed_over_us) == (0, 1, first.end_us)
    assert (record.finish_reason, record.token_times_us[0]) == (FinishReason.LENGTH, first.end_us)
    assert (second.instance, second.start_us, second.num_tokens) == (1, first.end_us + 1, [9])
    assert [s.instance for s in records.steps] == [0, 1, 1, 1]
    assert summarize(records).num_handed_over == 1


def test_what_was_prefilled_stays_in_the_prefix_cache() -> None:
    """The same prompt again finds all of it but its last token's block, where it was computed."""
    work = Workload(requests=tuple(request(k, 500 * k, prompt=9, output=3, hashes=(1, 2, 3)) for k in range(2)))
    records, _ = told(work, pair())
    assert [r.cached_tokens for r in records.requests] == [0, 8]
    assert {r.prefill_instance for r in records.requests} == {0}


def test_a_link_is_crossed_twice() -> None:
    """With the prompt, and with the prompt and the first token."""
    link = LinkConfig(latency_us=7, bytes_per_s=1_000_000)
    _, transfers = served(Workload(requests=(request(0, prompt=4),)), pair(link=link), instance_config(), Fcfs())
    assert [(int(t.link), t.num_bytes) for t in transfers] == [(0, 16), (1, 20)]


@pytest.mark.parametrize(("cancel_us", "instance"), [(3, 0), (12, 0), (14, 0), (40, 1)])
def test_a_client_may_go_away_while_it_is_handed_over(cancel_us: int, instance: int) -> None:
    """During the step that draws the first token, on the way, and later: it ends once, with the tokens it had."""
    work = Workload(requests=(request(0, prompt=8, output=30, cancel_us=cancel_us), request(1, prompt=3, output=9)))
    link = LinkConfig(latency_us=5)
    records, _ = told(work, pair(link=link), instance_config(max_tokens_per_batch=32))
    gone, stays = records.requests
    assert (gone.finish_reason, gone.instance) == (FinishReason.CANCELLED, instance)
    assert stays.finish_reason is FinishReason.LENGTH


@given(work=busy_workloads(), fleet=fleets(), config=tight_configs(), role=roles(), think_us=st.sampled_from((0, 3)))
def test_clients_in_a_closed_loop_go_on(
    work: Workload, fleet: FleetConfig, config: InstanceConfig, role: RolesPolicy, think_us: int
) -> None:
    """Whoever ends, wherever: the next request of its client comes, and each ends once."""
    work = replace(work, closed_loop=ClosedLoop(num_clients=3, think_us=think_us))
    fleet = replace(fleet, roles=role)
    records, _ = served(work, fleet, config, Fcfs())
    fleet_obeys_the_laws(work, fleet, config, records)


@pytest.mark.parametrize("route", ["round-robin", "least-loaded"])
def test_each_stage_takes_turns_of_its_own(route: str) -> None:
    """Two decisions a request, and yet both of two prefill instances are used, and both of two others."""
    work = Workload(requests=tuple(request(k, 400 * k, prompt=4, output=3) for k in range(8)))
    fleet = pair(num_instances=4, roles=Static(num_prefill=2), route=make_policy("route", route, {}))
    records, _ = told(work, fleet)
    assert [r.prefill_instance for r in records.requests] == [0, 1] * 4
    assert [r.instance for r in records.requests] == [2, 3] * 4


def test_a_side_that_is_down_is_stood_in_for() -> None:
    """To the end, and the decision says why; nothing waits, and nothing is handed over then."""
    down = (Outage(instance=InstanceId(0), start_us=300, end_us=900),)
    work = Workload(requests=tuple(request(k, 200 * k, prompt=4, output=3) for k in range(8)))
    records, log = told(work, pair(outages=down, failover=Requeue()))
    assert [r.prefill_instance for r in records.requests] == [0, 0, None, None, None, 0, 0, 0]
    reasons = [d.out_of_role for d in log.decisions if d.stage == "prefill"]
    assert reasons == [None, None, *["nobody is up who computes prompts"] * 3, None, None, None]


def test_who_takes_over_may_fail() -> None:
    """The request goes on with the only one that is up, though it computes prompts, and keeps its tokens."""
    down = (Outage(instance=InstanceId(1), start_us=40, end_us=9000),)
    work = Workload(requests=(request(0, prompt=8, output=12),))
    records, log = told(work, pair(outages=down, failover=Requeue()), instance_config(max_tokens_per_batch=32))
    (record,) = records.requests
    assert (record.instance, record.prefill_instance, record.num_failovers) == (0, 0, 1)
    assert record.finish_reason is FinishReason.LENGTH
    assert [d.out_of_role for d in log.decisions if d.stage == "decode"] == [None, "nobody is up who takes over"]


def test_who_is_sent_for_the_first_token_is_handed_over_though_roles_change() -> None:
    """What an instance has it finishes as it began."""

    class Late:
        """Everybody does both, from the second decision on."""

        decides: ClassVar[str] = "roles"

        def decide(self, view: RolesView) -> RolesPlan:
            return (Colocated() if view.now_us else Static()).decide(view)

    work = Workload(requests=(request(0, prompt=12, output=4), request(1, 100, prompt=12, output=4)))
    records, _ = told(work, pair(roles=Late()))
    assert [r.prefill_instance for r in records.requests] == [0, None]


def test_roles_without_anybody_for_a_stage_are_refused() -> None:
    """In one line, with the policy's name."""

    class OneSide:
        decides: ClassVar[str] = "roles"

        def decide(self, view: RolesView) -> RolesPlan:
            return RolesPlan(roles={i.id: "prefill" for i in view.instances}, reason="")

    with pytest.raises(PolicyError, match="policy one-side at 0 us: leaves no instance that takes over"):
        told(Workload(requests=(request(0),)), pair(roles=OneSide()))


def test_a_router_hears_of_latencies_with_handovers_and_ends() -> None:
    """And of who waits too long it knows without hearing anything."""
    slo = Slo(ttft_us=25, tpot_us=1)
    work = Workload(requests=tuple(request(k, 0, prompt=12, output=3, slo=slo) for k in range(3)))
    _, log = told(work, pair(role_interval_us=1), instance_config(max_tokens_per_batch=12, num_kv_blocks=64))
    heard = [d.heard for d in log.decisions if d.heard is not None]
    assert [max(h[k] for h in heard) for k in range(1, 6)] == [3, 1, 2, 3, 0]
    assert heard[-1].num_overdue == 0


@pytest.fixture(scope="module")
def machine() -> Machine:
    """16 ms a decode of one, 30 ms of 200; 2000 tokens of a prompt in 130 ms."""
    return roofline_machine(hardware("ascend-910b3"), model_of("qwen3-8b"), Deployment())


PROMISE = Slo(ttft_us=SECOND_US, tpot_us=40_000)
SHIFT_US, END_US = 25 * SECOND_US, 85 * SECOND_US


def shifting() -> Workload:
    """First long prompts that ask for one token, then short ones that ask for many."""
    long = [_one(k, us, 2000, 1) for k, us in enumerate(range(0, SHIFT_US, SECOND_US // 18))]
    short = [_one(len(long) + k, us, 100, 300) for k, us in enumerate(range(SHIFT_US, END_US, SECOND_US // 60))]
    return Workload(requests=(*long, *short))


def _one(number: int, arrival_us: int, prompt: int, output: int) -> Request:
    return request(number, arrival_us, prompt=prompt, output=output, slo=PROMISE)


ROOMY = InstanceConfig(
    max_tokens_per_batch=4096, max_seqs_per_batch=256, block_size=16, num_kv_blocks=12_000, enable_prefix_cache=False
)


def kept_frac(records: Records, start_us: int, end_us: int) -> float:
    """Of the requests that came in a time, those that were served as promised."""
    came = [r for r in records.requests if start_us <= r.arrival_us < end_us]
    return sum(int(meets_slo(columns).sum()) for columns in columns_of(came)) / len(came)


def through(work: Workload, machine: Machine, role: RolesPolicy) -> tuple[Records, list[RoleChange]]:
    """Four instances serve it."""
    records, changes = Records(), list[RoleChange]()
    fleet = FleetConfig(num_instances=4, route=make_policy("route", "least-loaded"), roles=role)
    Fleet(
        *(work, fleet, ROOMY, Policies(DecodeFirst()), machine.predicts(ROOMY, fast_forward=True)),
        recorder=records,
        vocab_size=machine.model["vocab_size"],
        on_role=changes.append,
    ).run()
    return records, changes


def test_roles_follow_a_load_that_shifts(machine: Machine) -> None:
    """Each static split fails one half; instances that change sides keep the promises of both, when they have."""
    last_us = 10 * SECOND_US
    ends = (SHIFT_US, END_US)
    kept: dict[str, list[float]] = {}
    policies: dict[str, RolesPolicy] = {
        "flip": SloFlip(),
        "prompts": Static(num_prefill=3),
        "tokens": Static(num_prefill=1),
    }
    flips: dict[str, list[tuple[bool, str]]] = {}
    for name, role in policies.items():
        records, changes = through(shifting(), machine, role)
        kept[name] = [kept_frac(records, end - last_us, end) for end in ends]
        flips[name] = [(c.us > SHIFT_US, c.role) for c in changes if c.us]
    assert flips == {"flip": [(False, "prefill"), (True, "decode"), (True, "decode")], "prompts": [], "tokens": []}
    assert min(kept["flip"]) > 0.95
    assert kept["prompts"][0] > 0.95
    assert max(kept["prompts"][1], kept["tokens"][0]) < 0.2


def constant(prompt: int, output: int, rate_per_s: int) -> Workload:
    """Ninety seconds of it."""
    gaps = stream(3, "constant load").exponential(SECOND_US / rate_per_s, size=90 * rate_per_s)
    return Workload(requests=tuple(_one(k, int(us), prompt, output) for k, us in enumerate(gaps.cumsum())))


@pytest.mark.parametrize(("prompt", "output", "rate_per_s"), [(1000, 100, 10), (2000, 1, 18), (200, 300, 30)])
def test_under_a_load_that_can_be_served_nobody_goes_back(
    machine: Machine, prompt: int, output: int, rate_per_s: int
) -> None:
    """Who flips, flips one way, and then promises are kept."""
    records, changes = through(constant(prompt, output, rate_per_s), machine, SloFlip())
    assert len({c.role for c in changes if c.us}) <= 1
    assert kept_frac(records, 45 * SECOND_US, 90 * SECOND_US) > 0.95


def test_under_a_load_that_cannot_be_served_roles_do_not_flutter(machine: Machine) -> None:
    """The starved side looks as if it could give, whichever it is; and yet nobody goes back so soon."""
    work = constant(1000, 100, 30)
    fluttering, calm = (
        [c for c in through(work, machine, policy)[1] if c.us]
        for policy in (SloFlip(min_dwell_us=SECOND_US, min_return_us=0), SloFlip())
    )
    assert len(fluttering) > len(calm) > 1
    turns = [b.us - a.us for a, b in pairwise(calm) if a.role != b.role]
    assert all(us >= SloFlip().min_return_us for us in turns)


def test_a_run_keeps_its_roles_and_shows_them(machine: Machine, tmp_path: Path) -> None:
    """In roles.parquet and on the timeline; a run without roles has no such file."""
    work = Workload(requests=tuple(request(k, 100_000 * k, prompt=100, output=20) for k in range(6)))
    own = {"num_instances": 3, "role_interval_us": 1000}
    runs = {
        name: simulate(
            *(work, ROOMY, Policies(DecodeFirst()), machine),
            out=tmp_path / name,
            fleet=FleetConfig(**own, roles=role),  # type: ignore[arg-type]
        )
        for name, role in (("static", Static()), ("colocated", Colocated()))
    }
    assert not (runs["colocated"].path / ROLES_FILE).exists()
    told = pq.read_table(runs["static"].path / ROLES_FILE).to_pylist()
    assert [(c["us"], c["instance"], c["role"]) for c in told] == [
        (0, 0, "prefill"),
        (0, 1, "decode"),
        (0, 2, "decode"),
    ]
    assert {r.prefill_instance for r in runs["static"].records.requests} == {0}
    trace = PerfettoTrace(write_timeline(runs["static"], tmp_path / "static.pftrace.gz"))
    shown = {track.name: [(s.name, s.start_ns) for s in track.slices] for track in trace.children(trace.named("roles"))}
    roles_shown = {"0": "prefill", "1": "decode", "2": "decode"}
    assert shown == {f"role of instance {k}": [(role, 0)] for k, role in roles_shown.items()}
    running = {k: trace.named("running", trace.named(f"instance {k}")).samples for k in range(3)}
    assert max(value for _, value in running[0]) == 1
    assert running[0][0][0] < running[1][0][0]
