"""Whole runs: what is delivered and decided, in which order; and the laws, over every policy and many workloads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws import is_repeatable, obey_the_laws
from tests.small_runs import (
    EqualSteps,
    StoppingSteps,
    batch_policies,
    busy_workloads,
    instance_config,
    request,
    run,
    run_audited,
    tight_configs,
)
from xllm_lab.errors import PolicyError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPlan, BatchPolicy, BatchView
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.records import FinishReason, Records
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import Completion, Idle, WorkloadFeed, serve
from xllm_lab.workload import ClosedLoop, Request, Workload, prompt_token_ids

timings = st.sampled_from((EqualSteps(), StoppingSteps()))


def workload(*requests: Request, loop: ClosedLoop | None = None) -> Workload:
    return Workload(requests=requests, closed_loop=loop)


def tokens(records: Records) -> list[dict[int, int]]:
    return [dict(zip(s.ids, s.num_tokens, strict=True)) for s in records.steps]


# The test that has found most: it gets more examples than the others.
@settings(max_examples=3 * settings().max_examples)
@given(busy_workloads(), tight_configs(), batch_policies(), timings)
def test_every_run_obeys_the_laws(
    sent: Workload, config: InstanceConfig, policy: BatchPolicy, timing: EqualSteps
) -> None:
    """Whatever arrives, whoever decides, however tight it is; the ledger is sound at every step."""
    obey_the_laws(sent, config, run_audited(sent, config, policy, timing))


@given(busy_workloads(), tight_configs(), batch_policies(), timings)
def test_runs_are_repeatable(sent: Workload, config: InstanceConfig, policy: BatchPolicy, timing: EqualSteps) -> None:
    """The same inputs leave the same records."""
    is_repeatable(lambda: run(sent, config, policy, timing))


@given(busy_workloads(), tight_configs(), batch_policies(), timings)
def test_the_simulator_adds_nothing_of_its_own(
    sent: Workload, config: InstanceConfig, policy: BatchPolicy, timing: EqualSteps
) -> None:
    """A process in simulated time and a loop by hand leave the same records."""
    assert run(sent, config, policy, timing) == run_audited(sent, config, policy, timing)


@given(busy_workloads(), tight_configs(), batch_policies())
def test_no_policy_sees_how_long_an_output_will_be(sent: Workload, config: InstanceConfig, policy: BatchPolicy) -> None:
    """Requests that want more tokens are served in the same steps until the first of them would have ended."""
    patient = [replace(r, cancel_us=None) for r in sent.requests if r.prompt.num_tokens + 12 < config.num_kv_tokens]
    if not patient or max(r.prompt.num_tokens for r in patient) + 13 > config.max_model_len:
        return
    short = replace(sent, requests=tuple(patient), closed_loop=None)
    long = replace(short, requests=tuple(replace(r, output_tokens=r.output_tokens + 1) for r in patient))
    first = run(short, config, policy)
    end_us = min(r.finish_us for r in first.requests if r.finish_us is not None)
    others = {s.start_us: s for s in run(long, config, policy).steps}
    for step in first.steps:
        if step.start_us < end_us:
            assert others[step.start_us] == step


def test_nothing_is_computed_between_arrivals() -> None:
    """The instance sleeps until the next request comes."""
    records = run(workload(request(0, output=1), request(1, 500, output=1)), instance_config(), Fcfs())
    assert [(s.start_us, s.end_us) for s in records.steps] == [(0, 10), (500, 510)]


def test_a_request_that_arrives_during_a_step_waits_for_its_end() -> None:
    """Steps are not interrupted."""
    records = run(workload(request(0, output=1), request(1, 3, output=1)), instance_config(), Fcfs())
    assert [r.first_scheduled_us for r in records.requests] == [0, 10]


def test_requests_of_one_moment_are_taken_in_order_of_id() -> None:
    """However the workload lists them."""
    few = instance_config(max_seqs_per_batch=1)
    records = run(workload(request(7, output=1), request(3, output=1), request(5, output=1)), few, Fcfs())
    assert tokens(records) == [{3: 4}, {5: 4}, {7: 4}]


def test_a_client_that_leaves_as_it_arrives_is_recorded() -> None:
    """At equal times a request arrives before its client goes away."""
    records = run(workload(request(0, 20, cancel_us=20)), instance_config(), Fcfs())
    assert [(r.finish_reason, r.finish_us) for r in records.requests] == [(FinishReason.CANCELLED, 20)]
    assert records.steps == []


def test_a_client_that_leaves_during_a_step_is_noticed_at_its_end() -> None:
    """And keeps the token of that step."""
    records = run(workload(request(0, cancel_us=3, output=5)), instance_config(), Fcfs())
    (record,) = records.requests
    assert (record.finish_us, list(record.token_times_us)) == (10, [10])


def test_nobody_waits_for_a_client_that_is_served_to_go_away() -> None:
    """An engine would sleep, in real time, with nothing left to do."""
    sent = workload(request(0, cancel_us=10**12, output=1), request(1, 500, output=1))
    scheduler = Scheduler(instance_config(), Fcfs(), Records())
    conversation = serve(scheduler, WorkloadFeed(sent), lambda r: prompt_token_ids(r, vocab_size=99, seed=0))
    step = next(conversation)
    assert not isinstance(step, Idle)
    command = conversation.send(Completion((10,), EqualSteps().sampled(step)))
    assert command == Idle(500)
    obey_the_laws(sent, instance_config(), run(sent, instance_config(), Fcfs()))


def test_a_closed_loop_sends_when_the_last_answer_came() -> None:
    """Two clients, three requests: the third is sent by whoever is served first, after thinking."""
    sent = workload(
        request(0, output=2), request(1, output=1), request(2, output=1), loop=ClosedLoop(num_clients=2, think_us=5)
    )
    records = run(sent, instance_config(), Fcfs())
    assert [r.arrival_us for r in records.requests] == [0, 0, 15]


def test_a_closed_loop_survives_rejected_and_cancelled_requests() -> None:
    """A client whose request ends in any way sends its next one, with the same patience."""
    client = ClosedLoop(num_clients=1)
    sent = workload(request(0, prompt=65), request(1, cancel_us=0), request(2, cancel_us=3), request(3), loop=client)
    records = run(sent, instance_config(), Fcfs())
    ends = [(r.finish_reason, r.arrival_us, r.finish_us) for r in records.requests]
    assert ends == [
        (FinishReason.REJECTED, 0, 0),
        (FinishReason.CANCELLED, 0, 0),
        (FinishReason.CANCELLED, 0, 10),
        (FinishReason.LENGTH, 10, 30),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lazy:
    """Serves nobody."""

    decides: ClassVar[str] = "batch"

    def decide(self, view: BatchView) -> BatchPlan:
        return BatchPlan(reason="tomorrow")


def test_a_policy_that_starves_everyone_is_an_error_not_a_hang() -> None:
    """When nothing more can happen, waiting requests will wait for ever."""
    with pytest.raises(PolicyError, match="policy lazy leaves 2 requests waiting for ever at 30 us"):
        run(workload(request(0), request(1, 30)), instance_config(), Lazy())


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """Computes more than there is."""

    decides: ClassVar[str] = "batch"

    def decide(self, view: BatchView) -> BatchPlan:
        return BatchPlan(tokens={r.id: r.num_tokens + 1 for r in view.waiting}, reason="more")


def test_an_illegal_plan_stops_the_run() -> None:
    """The message says which rule was broken."""
    with pytest.raises(PolicyError, match="policy greedy at step 0: gives request 0 5 tokens, 1 to 4 can be computed"):
        run(workload(request(0)), instance_config(), Greedy())
