"""xLLM's own scheduler tests, as acceptance tests of its policies here.

Ported from tests/core/scheduler/scheduler_policy_test.cpp at 3906f5a. There one block of a pool is kept for padding,
so its `num_blocks=N` is N - 1 blocks here. Its tests run without prefix cache, and so do these.
"""

from __future__ import annotations

from tests.small_runs import HandDriven, request
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.batch.prefill_first import PrefillFirst
from xllm_lab.records import FinishReason
from xllm_lab.step_time import TERMS, StepTime
from xllm_lab.workload import Priority

# y = 0.5 x^2 + 10 x for a prompt of x tokens, in whatever unit the budgets are in.
PARABOLA = StepTime(tuple({"token_us": 10.0, "attention_us": 1.0}.get(t, 0.0) for t in TERMS))


def host(policy: BatchPolicy, *, num_blocks: int, block_size: int, budget: int) -> HandDriven:
    """An instance of xLLM's tests; `num_blocks` as they count them."""
    config = InstanceConfig(
        max_tokens_per_batch=budget,
        max_seqs_per_batch=256,
        block_size=block_size,
        num_kv_blocks=num_blocks - 1,
        enable_prefix_cache=False,
        max_model_len=100_000,
    )
    return HandDriven(config, policy, step_time=PARABOLA)


def test_resource_not_enough_for_tokens() -> None:
    """ResourceNotEnough, case 1: a budget of one token goes to the first request."""
    one = host(DecodeFirst(max_tokens_per_chunk=1024), num_blocks=16, block_size=16, budget=1)
    one.add(request(0, prompt=1, output=1), request(1, prompt=100, output=10))
    assert one.step() == {0: 1}


def test_resource_not_enough_for_blocks() -> None:
    """ResourceNotEnough, case 2: a single usable block of 8 tokens.

    xLLM keeps the prompt of 1000 tokens waiting and fails it once nothing else runs; here it is rejected as it
    arrives, because the whole pool could never hold it.
    """
    one = host(DecodeFirst(max_tokens_per_chunk=1024), num_blocks=2, block_size=8, budget=1000)
    one.add(request(0, prompt=1, output=1), request(1, prompt=1000, output=100))
    assert one.step() == {0: 1}
    assert one.record(1).finish_reason is FinishReason.REJECTED


def test_normal_schedule() -> None:
    """NormalSchedule: batches of 3, 3, 5, 6 and 7; what the decodes leave lifts the chunk limit of a long prompt.

    xLLM's test declares the first long prompt computed when 9995 of its 10000 tokens are; here it takes another step
    for the last 5 before the second long prompt comes. Were it still chunking, the second would wait in xLLM too: the
    footprint gate counts a chunking prompt's blocks both as used and as reserved.
    """
    one = host(DecodeFirst(max_tokens_per_chunk=1024), num_blocks=1024, block_size=32, budget=10_000)
    one.add(*(request(i, prompt=100 * (i + 1), output=10 * (i + 1)) for i in range(3)))
    assert one.step() == {0: 100, 1: 200, 2: 300}
    assert one.scheduler.ledger.num_used_blocks == 4 + 7 + 10
    assert one.step() == {0: 1, 1: 1, 2: 1}
    one.add(request(3, prompt=400, output=40), request(4, prompt=500, output=50))
    assert one.step() == {0: 1, 1: 1, 2: 1, 3: 400, 4: 500}
    one.add(request(5, prompt=10_000, output=10))
    assert one.step() == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 10_000 - 5}
    assert one.step()[5] == 5
    one.add(request(6, prompt=10_000, output=10))
    seven = one.step()
    assert (len(seven), seven[6] >= 1024) == (7, True)


def test_preempt_schedule() -> None:
    """PreemptSchedule: two prompts fill the pool; the older one's next block costs the younger one its KV."""
    one = host(DecodeFirst(max_tokens_per_chunk=1024), num_blocks=9, block_size=32, budget=10_000)
    one.add(request(0, prompt=127, output=10), request(1, prompt=127, output=10))
    assert [one.step(), one.step()] == [{0: 127, 1: 127}, {0: 1, 1: 1}]
    free_blocks = one.scheduler.ledger.num_free_blocks
    assert one.step() == {0: 1}
    assert one.scheduler.ledger.num_free_blocks > free_blocks
    assert (one.records.steps[-1].preempted, one.records.steps[-1].num_waiting) == ([1], 1)
    assert one.step() == {0: 1}, "the preempted one must not evict the runner"


def test_priority_schedule() -> None:
    """PrioritySchedule: the normal prompt goes before the low ones; a high one joins, and a low one gives way.

    Which low one runs is the older here; xLLM's heap does not say.
    """
    one = host(DecodeFirst(max_tokens_per_chunk=1024, order="priority"), num_blocks=12, block_size=32, budget=10_000)
    one.add(
        request(0, prompt=127, output=10, priority=Priority.LOW),
        request(1, prompt=127, output=10, priority=Priority.LOW),
        request(2, prompt=127, output=10, priority=Priority.NORMAL),
    )
    assert list(one.step()) == [2, 0]
    one.add(request(3, prompt=32, output=10, priority=Priority.HIGH))
    assert sorted(one.step()) == [0, 2, 3]
    assert list(one.step()) == [3, 2]


def test_latency_schedule() -> None:
    """LatencySchedule: three decodes leave time for a chunk of the fourth prompt, not for all of it.

    `max_global_ttft_ms`, 350 in xLLM's test, is left out: its decode-first policy ignores it in a step without
    decodes, where ours would keep to it.
    """
    assert (PARABOLA.request_us(10, 0), PARABOLA.request_us(2, 0)) == (150.0, 22.0)
    policy = DecodeFirst(max_tokens_per_chunk=4, max_tpot_us=150)
    one = host(policy, num_blocks=12, block_size=32, budget=10_000)
    one.add(*(request(i, prompt=10, output=10) for i in range(3)))
    assert len(one.step()) == 3
    one.add(request(3, prompt=10, output=10))
    assert one.step() == {0: 1, 1: 1, 2: 1, 3: 4}


def test_full_footprint_admission_gate() -> None:
    """FullFootprintAdmissionGate: chunks of both would fit, the whole prompts would not.

    A prefill instance of a disaggregated pair batches as PrefillFirst does. The outputs are one token long: xLLM's
    ten would make the second request larger than the pool, which a decode instance elsewhere does not mind.
    """
    one = host(PrefillFirst(max_tokens_per_chunk=4), num_blocks=9, block_size=4, budget=100)
    one.add(request(0, prompt=8, output=1), request(1, prompt=32, output=1))
    assert one.step() == {0: 4}


def test_full_footprint_admits_both_when_they_fit() -> None:
    """FullFootprintAdmitsBothWhenFits."""
    one = host(PrefillFirst(max_tokens_per_chunk=4), num_blocks=9, block_size=4, budget=100)
    one.add(request(0, prompt=8, output=1), request(1, prompt=8, output=1))
    assert one.step() == {0: 4, 1: 4}


def test_a_budget_too_small_for_anything_still_serves_one_at_a_time() -> None:
    """Ours alone: xLLM schedules nobody when the budget is less than the constant time of a step."""
    slow = StepTime((500.0, *PARABOLA.weights[1:]))
    policy = DecodeFirst(max_ttft_us=1, max_tpot_us=1)
    one = HandDriven(InstanceConfig(), policy, step_time=slow)
    one.add(request(0), request(1))
    assert [one.step() for _ in range(4)] == [{0: 4}, {0: 1}, {1: 4}, {1: 1}]
