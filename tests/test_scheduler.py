"""The control loop of one instance, told in scenes of a few steps. Blocks hold four tokens, a step has sixteen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.small_runs import HandDriven, Scripted, instance_config, plan_of, request
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.policies.api import BatchPlan, RequestId
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.batch.prefill_first import PrefillFirst
from xllm_lab.policies.batch.unified_slo import UnifiedSlo
from xllm_lab.records import FinishReason, Records
from xllm_lab.scheduler import Scheduler


def test_leftover_budget_goes_to_the_next_prompt() -> None:
    """A long prompt is cut; what its last piece leaves over starts the next request."""
    host = HandDriven(instance_config(), Fcfs())
    host.add(request(0, prompt=40), request(1, prompt=4))
    assert [host.step() for _ in range(5)] == [{0: 16}, {0: 16}, {0: 8, 1: 4}, {0: 1, 1: 1}, {}]


def test_decodes_go_first_and_a_prompt_takes_what_they_leave() -> None:
    """The default policy: a decoding request loses no step to the prompt that came after it."""
    host = HandDriven(instance_config(), DecodeFirst())
    host.add(request(0, prompt=4, output=3))
    first = host.step()
    host.add(request(1, prompt=20, output=1))
    assert [first, *(host.step() for _ in range(2))] == [{0: 4}, {0: 1, 1: 15}, {0: 1, 1: 5}]


def test_prompts_have_the_step_to_themselves() -> None:
    """Prefill-first: decodes stall while there is a prompt to compute."""
    host = HandDriven(instance_config(), PrefillFirst())
    host.add(request(0, prompt=4, output=2))
    host.step()
    host.add(request(1, prompt=20, output=1))
    assert [host.step() for _ in range(3)] == [{1: 16}, {1: 4}, {0: 1}]


def test_a_prompt_finds_the_blocks_of_one_that_ended() -> None:
    """Full blocks of equal tokens are not computed again; the last token always is."""
    host = HandDriven(instance_config(), Fcfs())
    host.add(request(0, prompt=8, hashes=(1, 2), output=1))
    host.step()
    host.add(request(1, prompt=8, hashes=(1, 2), output=1))
    assert host.step() == {1: 4}
    assert host.record(1).cached_tokens == 4


def test_without_a_prefix_cache_nothing_is_found() -> None:
    """The switch is a switch."""
    host = HandDriven(instance_config(enable_prefix_cache=False), Fcfs())
    host.add(request(0, prompt=8, hashes=(1, 2), output=1))
    host.step()
    host.add(request(1, prompt=8, hashes=(1, 2), output=1))
    assert host.step() == {1: 8}


def test_a_preempted_request_goes_on_from_its_cached_prefix() -> None:
    """The youngest gives way to the oldest; of its full blocks the last is evicted, the others remain."""
    host = HandDriven(instance_config(num_kv_blocks=5, max_tokens_per_batch=32), Fcfs())
    host.add(request(0, prompt=8, output=2), request(1, prompt=12, output=2))
    assert [host.step() for _ in range(3)] == [{0: 8, 1: 12}, {0: 1}, {1: 5}]
    assert host.record(1).num_preemptions == 1


def test_a_victims_block_is_not_counted_as_freed_and_as_shared() -> None:
    """Its blocks are freed by the preemption and taken by a newcomer in one breath: the policy gets another look."""
    greedy = plan_of({1: 8, 2: 8}, preempt=(0,))
    policy = Scripted(script=[plan_of({0: 8}), greedy, plan_of({1: 8})])
    host = HandDriven(instance_config(num_kv_blocks=4), policy)
    host.add(request(0, prompt=8, hashes=(1, 2), output=9))
    host.step()
    host.add(request(1, prompt=16, hashes=(1, 2), output=1), request(2, prompt=8))
    assert host.step() == {1: 8}
    assert policy.seen[-1]["waiting"] == [(0, 9, 8, 2), (1, 16, 8, 2), (2, 8, 0, 0)]
    assert host.records.steps[-1].preempted == [0]


def test_cancelling_a_waiting_request_ends_it_unserved() -> None:
    """It was never scheduled, and its record says so."""
    host = HandDriven(instance_config(), Fcfs())
    host.add(request(0))
    assert host.scheduler.cancel(RequestId(0), 7)
    record = host.record(0)
    assert (record.finish_reason, record.finish_us, record.first_scheduled_us) == (FinishReason.CANCELLED, 7, None)
    assert host.step() == {}


def test_cancelling_a_running_request_frees_its_blocks() -> None:
    """It keeps the tokens it had."""
    host = HandDriven(instance_config(), Fcfs())
    host.add(request(0, output=9))
    host.step()
    assert host.scheduler.cancel(RequestId(0), host.now_us)
    assert host.record(0).output_tokens == 1
    assert host.scheduler.ledger.num_used_blocks == 0
    host.scheduler.ledger.audit()


def test_cancelling_a_preempted_request_leaves_nothing_behind() -> None:
    """It waits like a fresh one, and leaves like one."""
    policy = Scripted(script=[plan_of({0: 4}), plan_of({1: 4}, preempt=(0,))])
    host = HandDriven(instance_config(), policy)
    host.add(request(0, output=9), request(1, output=1))
    host.step()
    host.step()
    assert host.scheduler.cancel(RequestId(0), host.now_us)
    assert host.scheduler.num_live == 0
    host.scheduler.ledger.audit()


def test_a_request_cancelled_while_its_step_runs_gets_no_token() -> None:
    """The step goes on for the others."""
    host = HandDriven(instance_config(), Fcfs())
    host.add(request(0), request(1))
    step = host.plan()
    assert step is not None
    host.scheduler.cancel(RequestId(0), 3)
    host.finish(step)
    assert host.record(0).output_tokens == 0
    assert host.scheduler.state(RequestId(1)).num_tokens == 5
    host.scheduler.ledger.audit()


def test_cancelling_a_request_that_ended_or_never_came_does_nothing() -> None:
    """There is one record, and it tells of the real end."""
    host = HandDriven(instance_config(), Fcfs())
    host.add(request(0, output=1))
    host.step()
    assert not host.scheduler.cancel(RequestId(0), host.now_us)
    assert not host.scheduler.cancel(RequestId(5), host.now_us)
    assert [r.finish_reason for r in host.records.requests] == [FinishReason.LENGTH]


@pytest.mark.parametrize(
    "too_large", [request(0, prompt=60, output=41), request(0, prompt=64, output=2)], ids=["context", "pool"]
)
def test_a_request_that_can_never_run_is_rejected_as_it_arrives(too_large: Any) -> None:
    """It never waits, so that it cannot block the others."""
    host = HandDriven(instance_config(max_model_len=100), Fcfs())
    host.now_us = 40
    host.add(too_large, request(1))
    record = host.record(0)
    assert (record.finish_reason, record.arrival_us, record.finish_us) == (FinishReason.REJECTED, 40, 40)
    assert host.step() == {1: 4}


def test_a_request_that_fills_the_pool_to_its_last_token_runs() -> None:
    """The last token is drawn and never computed, so it needs no room."""
    host = HandDriven(instance_config(), Fcfs())
    host.add(request(0, prompt=63, output=2))
    while host.step():
        pass
    assert host.record(0).output_tokens == 2


ILLEGAL = {
    "unknown request": plan_of({9: 1}),
    "no tokens": plan_of({0: 0}),
    "fewer than none": plan_of({0: -1}),
    "more than it lacks": plan_of({0: 2}),
    "more than it lacks, waiting": plan_of({2: 5}),
    "preempts a waiting request": plan_of({}, preempt=(2,)),
    "preempts an unknown request": plan_of({}, preempt=(9,)),
    "preempts twice": plan_of({2: 4}, preempt=(0, 0)),
    "preempts and schedules": plan_of({0: 1}, preempt=(0,)),
    "too many tokens": plan_of({0: 1, 1: 1, 3: 15}),
    "too many sequences": plan_of({0: 1, 1: 1, 2: 1, 3: 1, 4: 1}),
    "too many blocks": plan_of({2: 4, 3: 12}),
    "decodes twice": plan_of({0: 1}, decode_all=True),
    "decodes what it preempts": plan_of({}, preempt=(1,), decode_all=True),
    "too many tokens beside decodes": plan_of({3: 15}, decode_all=True),
    "too many blocks beside decodes": plan_of({3: 5}, decode_all=True),
    "holds without decoding everything": plan_of({0: 1}, holds_for=1),
    "holds while it computes two prompts": plan_of({2: 1, 3: 1}, decode_all=True, holds_for=1),
    "holds until it finishes a prompt": plan_of({2: 2}, decode_all=True, holds_for=1),
}


@pytest.mark.parametrize("plan", ILLEGAL.values(), ids=ILLEGAL.keys())
def test_an_illegal_plan_changes_nothing(plan: BatchPlan) -> None:
    """The error names policy and step; the next decision sees the very same picture."""
    policy = Scripted(script=[plan_of({0: 4, 1: 4}), plan])
    host = HandDriven(instance_config(num_kv_blocks=5), policy)
    host.add(request(0, output=9), request(1, output=9))
    host.step()
    host.add(request(2), request(3, prompt=18), request(4))
    with pytest.raises(PolicyError, match="policy scripted at step 1: "):
        host.plan()
    host.scheduler.ledger.audit()
    policy.script.append(plan_of({0: 1}))
    host.plan()
    assert policy.seen[-1] == policy.seen[-2]


def test_a_policy_that_needs_step_times_is_refused_without() -> None:
    """At construction, with what would be accepted."""
    with pytest.raises(ConfigError, match="policy unified-slo needs step times, none are given; accepted: "):
        Scheduler(instance_config(), UnifiedSlo(), Records())


def test_a_step_must_last() -> None:
    """A step of no time would stall the simulated clock."""
    host = HandDriven(instance_config(), Fcfs())
    host.add(request(0))
    step = host.plan()
    assert step is not None
    with pytest.raises(AssertionError, match="step 0 ends at 0, not after 0"):
        host.scheduler.complete(step, (0,), {})
