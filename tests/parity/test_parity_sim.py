"""The logic of parity, without an engine: a simulated run is presented as one, and replayed.

The pretended engine oversleeps, takes irregular steps, draws tokens that later prompts may share, and stops early.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given

from tests.laws import VOCAB_SIZE, obey_the_laws
from tests.small_runs import STEP_TIME, EqualSteps, batch_policies, busy_workloads, request, run, tight_configs
from tests.test_determinism import busy_workload
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPlan, BatchPolicy, BatchView, by_admission
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import FinishReason, Records, StepRecord
from xllm_lab.runs import Manifest, Run, describe, read_run, write_run
from xllm_lab.scheduler import Sampled
from xllm_lab.sim.parity import parity
from xllm_lab.step import Step
from xllm_lab.workload import ClosedLoop, RequestId, Workload

CONFIG = InstanceConfig(max_tokens_per_batch=24, max_seqs_per_batch=6, block_size=4, num_kv_blocks=20)


class PretendedEngine(EqualSteps):
    """Answers as a machine would: late, unevenly, and with tokens of its own."""

    def wake_us(self, until_us: int) -> int:
        return until_us + 3

    def end_us(self, step: Step) -> int:
        return step.start_us + 5 + 7 * step.index % 11 + sum(c.num_tokens for c in step.chunks)

    def sampled(self, step: Step) -> Mapping[RequestId, Sampled]:
        return {c.id: self._draw(c.id, c.num_computed_tokens + c.num_tokens) for c in step.chunks if c.samples}

    def _draw(self, request: RequestId, position: int) -> Sampled:
        return Sampled((13 * request + position) % VOCAB_SIZE, is_stop=request % 4 == 1 and position % 5 == 0)


def manifest(workload: Workload, config: InstanceConfig, policy: BatchPolicy) -> Manifest:
    told = describe(config, Policies(policy), STEP_TIME, workload)
    return Manifest(host="engine", timing={}, model={"vocab_size": VOCAB_SIZE}, versions={}, commit="", **told)


def engine_run(workload: Workload, config: InstanceConfig, policy: BatchPolicy) -> Run:
    """A run that claims to be an engine's; not on disk."""
    presented = Run(Path("pretended"), replace(manifest(workload, config, policy), hardware={}))
    presented.workload = workload
    presented.records = run(workload, config, policy, PretendedEngine())
    obey_the_laws(workload, config, presented.records)
    return presented


def first_difference(one: Records, other: Records) -> int:
    """Index of the first step that was decided differently, found without `parity`."""

    def decided(step: StepRecord) -> tuple[Any, ...]:
        return (step.start_us, step.ids, step.num_tokens, step.num_computed_tokens, step.admitted, step.preempted)

    pairs = zip(one.steps, other.steps, strict=False)
    return next(i for i, (a, b) in enumerate(pairs) if decided(a) != decided(b))


@pytest.mark.parametrize("name", policies("batch"))
@pytest.mark.parametrize("loop", [None, ClosedLoop(num_clients=7, think_us=4)], ids=["open", "closed"])
def test_a_run_replayed_with_its_own_policy_is_identical(name: str, loop: ClosedLoop | None, tmp_path: Path) -> None:
    """Through a run folder, with every kind of event in it."""
    policy = make_policy("batch", name)
    workload = replace(busy_workload(), closed_loop=loop)
    records = run(workload, CONFIG, policy, PretendedEngine())
    write_run(tmp_path / "run", manifest(workload, CONFIG, policy), workload, records)
    reasons = {r.finish_reason for r in records.requests}
    assert reasons >= {FinishReason.LENGTH, FinishReason.STOP, FinishReason.CANCELLED}
    assert any(r.num_preemptions for r in records.requests)
    assert any(r.cached_tokens for r in records.requests)
    outcome = parity(read_run(tmp_path / "run"))
    assert (outcome.is_identical, outcome.num_steps) == (True, len(records.steps))


@given(busy_workloads(), tight_configs(), batch_policies())
def test_any_run_replayed_with_its_own_policy_is_identical(
    workload: Workload, config: InstanceConfig, policy: BatchPolicy
) -> None:
    """Whatever arrives and whoever decides."""
    assert parity(engine_run(workload, config, policy)).is_identical


def test_a_request_that_comes_and_goes_while_the_engine_oversleeps_is_no_difference() -> None:
    """The engine noticed both at once, and had nothing to run; so has the simulator."""
    workload = Workload(requests=(request(0, 10, cancel_us=11),))
    presented = engine_run(workload, CONFIG, DecodeFirst())
    assert [r.finish_us for r in presented.records.requests] == [13]
    assert parity(presented).is_identical


def test_another_knob_is_found_at_the_first_step_it_changes() -> None:
    """With what each of the two decided there."""
    ours, theirs = DecodeFirst(max_tokens_per_chunk=1000), DecodeFirst(footprint_margin=2.0, watermark_frac=0.5)
    presented = engine_run(busy_workload(), CONFIG, ours)
    step = first_difference(presented.records, run(busy_workload(), CONFIG, theirs, PretendedEngine()))
    outcome = parity(presented, policies=Policies(theirs))
    assert (outcome.is_identical, outcome.step) == (False, step)
    assert step > 0
    assert outcome.engine is not None
    assert outcome.simulator is not None
    assert outcome.engine.start_us == outcome.simulator.start_us == presented.records.steps[step].start_us
    assert outcome.engine != outcome.simulator


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Decides as `DecodeFirst`, until it is asked for the plan of a step that it packs in another order."""

    decides: ClassVar[str] = "batch"
    at_us: int
    gives_up: bool = False
    policy: DecodeFirst = field(default_factory=DecodeFirst)

    def decide(self, view: BatchView) -> BatchPlan:
        plan = self.policy.decide(view)
        if view.now_us < self.at_us:
            return plan
        if self.gives_up:
            return BatchPlan(reason=plan.reason)
        decodes = {r.id: 1 for r in by_admission(view.decoding)} if plan.decode_all else {}
        packed = list({**decodes, **plan.tokens}.items())
        return BatchPlan(tokens=dict(reversed(packed)), preempt=plan.preempt, reason=plan.reason)


def crowded_step(records: Records) -> StepRecord:
    """A late step of several requests."""
    return [s for s in records.steps if len(s.ids) > 2][-1]


def test_the_same_tokens_in_another_order_are_another_decision() -> None:
    """A batch's order decides which rows are computed where, and so, in the end, its numbers."""
    presented = engine_run(busy_workload(), CONFIG, DecodeFirst())
    step = crowded_step(presented.records)
    outcome = parity(presented, policies=Policies(Changed(at_us=step.start_us)))
    assert outcome.step == step.step
    assert outcome.engine is not None
    assert outcome.simulator is not None
    assert outcome.simulator.tokens == outcome.engine.tokens[::-1]


def test_a_policy_that_gives_up_is_found_where_it_does() -> None:
    """It decided nothing where the engine's decided something."""
    presented = engine_run(busy_workload(), CONFIG, DecodeFirst())
    step = crowded_step(presented.records)
    outcome = parity(presented, policies=Policies(Changed(at_us=step.start_us, gives_up=True)))
    assert (outcome.step, outcome.simulator) == (step.step, None)
    assert outcome.engine is not None
    assert outcome.engine.start_us == step.start_us


def test_a_policy_that_goes_on_is_found_behind_the_engines_last_step() -> None:
    """The engine decided nothing any more: its last step is missing from the records."""
    presented = engine_run(busy_workload(), CONFIG, DecodeFirst())
    removed = presented.records.steps.pop()
    outcome = parity(presented)
    assert (outcome.step, outcome.engine) == (removed.step, None)
    assert outcome.simulator is not None


def test_a_changed_token_is_found_where_it_changes_a_decision() -> None:
    """Another stop shows at the step after it."""
    presented = engine_run(busy_workload(), CONFIG, DecodeFirst())
    stopped = next(r for r in presented.records.requests if r.finish_reason is FinishReason.STOP)
    stopped.finish_reason = FinishReason.LENGTH
    outcome = parity(presented)
    assert outcome.step is not None
    assert presented.records.steps[outcome.step].start_us >= (stopped.finish_us or 0)


def test_a_simulated_run_is_refused() -> None:
    """It would agree with itself, and prove nothing."""
    presented = engine_run(busy_workload(), CONFIG, DecodeFirst())
    presented.manifest = replace(presented.manifest, host="simulator")
    with pytest.raises(ConfigError, match="is a simulator run; accepted: an engine run"):
        parity(presented)
