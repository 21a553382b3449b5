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
    Scripted,
    StoppingSteps,
    batch_policies,
    busy_workloads,
    instance_config,
    plan_of,
    request,
    run,
    run_audited,
    tight_configs,
)
from xllm_lab.errors import PolicyError
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import BatchPlan, BatchPolicy, BatchView, by_admission
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.batch.vllm import Vllm
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


def test_planning_ahead_needs_room_for_the_wasted_row() -> None:
    """A request that just fits would lose its last token to itself, for ever; it is refused instead."""
    fits = request(0, prompt=7, output=10)
    for mode, reason in (("off", "length"), ("length_aware", "length"), ("on", "rejected")):
        config = instance_config(block_size=1, num_kv_blocks=16, async_scheduling=mode)
        (record,) = run(workload(fits), config, Vllm()).requests
        assert record.finish_reason == reason, mode


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


@dataclass(frozen=True, kw_only=True)
class SpelledOut:
    """What another policy plans, with `decode_all` as tokens: always, or depending on what is known by then."""

    decides: ClassVar[str] = "batch"

    policy: BatchPolicy
    always: bool

    def decide(self, view: BatchView) -> BatchPlan:
        plan = self.policy.decide(view)
        if not plan.decode_all or not (self.always or sum(r.num_tokens for r in view.decoding) % 3):
            return plan
        decodes = {r.id: 1 for r in by_admission(view.decoding)}
        return replace(plan, tokens={**decodes, **plan.tokens}, decode_all=False, holds_for=0)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
@given(sent=busy_workloads(), config=tight_configs(), policy=batch_policies())
def test_decoding_everything_is_only_a_short_way_to_say_so(
    mode: str, always: bool, sent: Workload, config: InstanceConfig, policy: BatchPolicy
) -> None:
    """Requests in lockstep, by themselves, and in and out of it leave the same records."""
    config, timing = replace(config, async_scheduling=mode), StoppingSteps()
    spelled_out = SpelledOut(policy=policy, always=always)
    assert run_audited(sent, config, spelled_out, timing) == run_audited(sent, config, policy, timing)


@given(busy_workloads(), tight_configs(), batch_policies(), timings, st.sampled_from(ASYNC_SCHEDULING[1:]))
def test_every_run_that_plans_ahead_obeys_the_laws(
    sent: Workload, config: InstanceConfig, policy: BatchPolicy, timing: EqualSteps, mode: str
) -> None:
    """Whatever the step under way brings: an end, a stop token, a client that went away."""
    ahead = replace(config, async_scheduling=mode)
    obey_the_laws(sent, ahead, run_audited(sent, ahead, policy, timing))


AHEAD = ASYNC_SCHEDULING[1:]


def planning(mode: str, **changes: int) -> InstanceConfig:
    return instance_config(async_scheduling=mode, **changes)


@pytest.mark.parametrize(("mode", "first_step"), [("off", 2), ("on", 3), ("length_aware", 3)])
def test_who_arrives_during_a_step_is_in_the_plan_after_the_next(mode: str, first_step: int) -> None:
    """Step 2 was planned when step 1 started; the arrival at 15 is seen when step 3 is."""
    records = run(workload(request(0, output=9), request(1, 15, output=1)), planning(mode), Fcfs())
    assert next(s.step for s in records.steps if 1 in s.ids) == first_step
    assert records.requests[1].first_scheduled_us == records.steps[first_step].start_us == 10 * first_step


@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        ("off", [{0: 4}, {0: 1}]),
        ("on", [{0: 4}, {0: 1}, {0: 1}]),
        ("length_aware", [{0: 4}, {0: 1}]),
    ],
)
def test_who_ends_by_length_has_a_row_in_vain_unless_that_is_foreseen(mode: str, steps: list[dict[int, int]]) -> None:
    """Its tokens and their times are the same; nothing comes of the row."""
    records = run(workload(request(0, output=2)), planning(mode), Fcfs())
    assert tokens(records) == steps
    (record,) = records.requests
    assert (list(record.token_times_us), record.finish_us) == ([10, 20], 20)


@pytest.mark.parametrize("mode", AHEAD)
def test_a_stop_token_is_foreseen_by_nobody(mode: str) -> None:
    """The third token of request 1 is one; the step after it was planned already."""
    records = run(workload(request(1, output=9)), planning(mode), Fcfs(), StoppingSteps())
    assert tokens(records) == [{1: 4}, {1: 1}, {1: 1}, {1: 1}]
    (record,) = records.requests
    assert (record.finish_reason, record.output_tokens) == (FinishReason.STOP, 3)
    assert record.finish_us == records.steps[2].end_us


@pytest.mark.parametrize("mode", AHEAD)
def test_a_row_in_vain_holds_no_block_of_a_request_that_ended(mode: str) -> None:
    """Somebody else may have them at once: two requests that fill the pool one after the other."""
    sent = workload(request(0, prompt=18, output=2), request(1, 0, prompt=18, output=2))
    config = planning(mode, num_kv_blocks=5, enable_prefix_cache=False)
    records = run_audited(sent, config, Fcfs())
    assert [r.finish_reason for r in records.requests] == [FinishReason.LENGTH] * 2
    assert [r.num_preemptions for r in records.requests] == [0, 0]


@pytest.mark.parametrize("mode", AHEAD)
def test_a_client_that_leaves_loses_the_token_under_way(mode: str) -> None:
    """It leaves during step 1, whose token it gets; step 2 was planned with it, and draws one for nobody."""
    records = run(workload(request(0, cancel_us=15, output=9)), planning(mode), Fcfs())
    assert tokens(records) == [{0: 4}, {0: 1}, {0: 1}]
    (record,) = records.requests
    assert (record.finish_reason, record.finish_us) == (FinishReason.CANCELLED, 20)
    assert list(record.token_times_us) == [10, 20]


@pytest.mark.parametrize(("mode", "recomputed", "times"), [("on", 5, [10, 40, 50]), ("length_aware", 6, [10, 20, 40])])
@pytest.mark.parametrize("decode_all", [False, True])
def test_who_loses_its_kv_keeps_the_token_under_way_only_if_length_aware(
    mode: str, recomputed: int, times: list[int], decode_all: bool
) -> None:
    """Step 2 takes the KV of 0 while step 1 still computes it: that token is drawn anew, or one more is recomputed."""
    decode = plan_of({}, decode_all=True) if decode_all else plan_of({0: 1})
    policy = Scripted(script=[plan_of({0: 4}), decode, plan_of({1: 4}, preempt=(0,))])
    config = planning(mode, enable_prefix_cache=False)
    records = run_audited(workload(request(0, output=3), request(1, output=1)), config, policy)
    assert tokens(records)[:3] == [{0: 4}, {0: 1}, {1: 4}]
    assert tokens(records)[3][0] == recomputed
    record = records.requests[0]
    assert (record.num_preemptions, list(record.token_times_us)) == (1, times)


@pytest.mark.parametrize(("policy", "admitted_in"), [(Vllm(), 3), (Fcfs(), 2)])
def test_who_drains_keeps_its_place_if_the_policy_says_so(policy: BatchPolicy, admitted_in: int) -> None:
    """Request 0 gets its last token from step 1, while which step 2 is planned; request 2 waits for its place."""
    sent = workload(request(0, output=2), request(1, output=9), request(2, output=1))
    records = run_audited(sent, planning("length_aware", max_seqs_per_batch=2), policy)
    assert next(s.step for s in records.steps if 2 in s.ids) == admitted_in


def test_who_drains_can_be_preempted_and_still_ends() -> None:
    """Request 1 has its only token under way when 0 needs a block: it gives its own up, and gets its token."""
    sent = workload(request(0, prompt=4, output=9), request(1, prompt=8, output=1))
    config = planning("length_aware", num_kv_blocks=3, enable_prefix_cache=False)
    records = run_audited(sent, config, Vllm())
    drained = records.requests[1]
    assert (drained.num_preemptions, list(drained.token_times_us), drained.finish_us) == (1, [10], 10)
    assert records.steps[1].preempted == [1]
    obey_the_laws(sent, config, records)


@pytest.mark.parametrize(("mode", "found"), [("on", 0), ("length_aware", 8)])
def test_a_prompt_under_way_can_be_shared_only_if_length_aware(mode: str, found: int) -> None:
    """Request 1 is let in while step 0 computes the same prompt."""
    config = planning(mode, max_tokens_per_batch=10)
    sent = workload(*(request(i, prompt=10, output=1, hashes=(7, 8)) for i in (0, 1)))
    records = run_audited(sent, config, Vllm())
    assert [r.cached_tokens for r in records.requests] == [0, found]
    obey_the_laws(sent, config, records)
