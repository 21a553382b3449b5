"""The control loop of one serving instance: observe, decide, check, act, record. Both hosts drive this one.

    host                                   scheduler
    add(request), cancel(id)        -->    queues
    plan(now_us)                    -->    observe: the view; decide: the policy; check: the shared checks;
                                           act: preempt, admit, allocate blocks          --> Step, or None
    runs the step: the engine on a device, the simulator on a cost model
    complete(step, end_us, sampled) -->    record; append tokens; publish blocks; finish requests

A request is waiting (holds no KV), running (holds KV), or ended. Preemption by recompute sends it back to waiting.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from xllm_lab.errors import ConfigError, PolicyError, RequestTooLargeError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import Ledger
from xllm_lab.policies.api import (
    BatchPlan,
    BatchPolicy,
    ByAdmission,
    ByArrival,
    StepTimeView,
    admission_key,
    arrival_key,
)
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.checks import batch_violations
from xllm_lab.records import FinishReason, Recorder, StepRecord
from xllm_lab.request_state import RequestState
from xllm_lab.workload import Request, RequestId, TokenIds


class ScheduledChunk(NamedTuple):
    """One request's part of a step: its tokens [num_computed_tokens, num_computed_tokens + num_tokens)."""

    id: RequestId
    num_tokens: int
    num_computed_tokens: int
    samples: bool  # reaches the end of the known tokens, so the next one is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a host has to run, blocks allocated."""

    index: int
    start_us: int
    chunks: tuple[ScheduledChunk, ...]
    admitted: tuple[RequestId, ...]
    preempted: tuple[RequestId, ...]
    reason: str


class Sampled(NamedTuple):
    """A drawn token, and whether it ends the request."""

    token_id: int
    is_stop: bool = False


class _View(NamedTuple):
    """A `BatchView` over live objects."""

    now_us: int
    block_size: int
    num_blocks: int
    num_free_blocks: int
    max_tokens_per_batch: int
    max_seqs_per_batch: int
    running: ByAdmission[RequestState]
    waiting: ByArrival[RequestState]
    step_time: StepTimeView | None


class Scheduler:
    """One instance's queues, ledger and policy.

    Raises:
        ConfigError: at construction, if the policy needs step times and there are none.
    """

    def __init__(
        self,
        config: InstanceConfig,
        policy: BatchPolicy,
        recorder: Recorder,
        *,
        step_time: StepTimeView | None = None,
    ) -> None:
        if getattr(policy, "needs_step_time", False) and step_time is None:
            name = policy_name(policy)
            raise ConfigError(f"policy {name} needs step times, none are given; accepted: a machine's calibration")
        self.config = config
        self.policy = policy
        self.ledger = Ledger(config.num_kv_blocks, config.block_size, enable_prefix_cache=config.enable_prefix_cache)
        self._recorder = recorder
        self._step_time = step_time
        self._num_steps = 0
        self._running: ByAdmission[RequestState] = ByAdmission()
        self._waiting: ByArrival[RequestState] = ByArrival()
        self._live: dict[RequestId, RequestState] = {}

    @property
    def num_live(self) -> int:
        """Requests that arrived and have not ended."""
        return len(self._live)

    def is_live(self, request: RequestId) -> bool:
        return request in self._live

    def state(self, request: RequestId) -> RequestState:
        return self._live[request]

    def add(self, request: Request, prompt_ids: TokenIds, now_us: int) -> None:
        """A request arrives. One that can never run here ends at once, and its record says so."""
        assert request.id not in self._live, f"request {request.id} arrived twice"
        state = RequestState(request, prompt_ids, self.ledger)
        self._live[request.id] = state
        try:
            self.config.refuse_if_too_large(request)
        except RequestTooLargeError:
            self._end(state, now_us, FinishReason.REJECTED)
            return
        bisect.insort(self._waiting, state, key=arrival_key)

    def cancel(self, request: RequestId, now_us: int) -> bool:
        """The client went away. False if the request had ended, or never came."""
        state = self._live.get(request)
        if state is None:
            return False
        self._leave_queue(state)
        self._end(state, now_us, FinishReason.CANCELLED)
        return True

    def plan(self, now_us: int) -> Step | None:
        """Decide the next step and allocate its blocks; None if nothing can run.

        Raises:
            PolicyError: the policy returned an illegal plan; nothing was changed.
        """
        preempted: list[RequestId] = []
        while self._live:
            plan = self._decide(now_us)
            preempted += plan.preempt
            for request_id in plan.preempt:
                self._preempt(self._live[request_id])
            if plan.tokens and (not plan.preempt or self._still_fits(plan, now_us)):
                return self._act(plan, tuple(preempted), now_us)
            if not plan.preempt:
                break
            # What a preemption frees is an estimate: two victims that shared blocks free more together than the policy
            # could count, and a victim's blocks that an admitted prompt takes over free none. It gets another look.
        return None

    def complete(self, step: Step, end_us: int, sampled: Mapping[RequestId, Sampled]) -> tuple[RequestId, ...]:
        """Take a step's results: `sampled` has a token for each chunk that `samples`. Returns the requests it ended.

        A request cancelled while the step ran is skipped.
        """
        assert end_us > step.start_us, f"step {step.index} ends at {end_us}, not after its start {step.start_us}"
        self._record(step, end_us)
        ended: list[RequestId] = []
        for chunk in step.chunks:
            state = self._live.get(chunk.id)
            if state is None:
                continue
            self._advance(state, chunk)
            if chunk.samples and (reason := _take_token(state, sampled[chunk.id], end_us)):
                self._leave_queue(state)
                self._end(state, end_us, reason)
                ended.append(chunk.id)
        return tuple(ended)

    def _observe(self, now_us: int) -> _View:
        return _View(
            now_us,
            self.config.block_size,
            self.config.num_kv_blocks,
            self.ledger.num_free_blocks,
            self.config.max_tokens_per_batch,
            self.config.max_seqs_per_batch,
            self._running,
            self._waiting,
            self._step_time,
        )

    def _decide(self, now_us: int) -> BatchPlan:
        view = self._observe(now_us)
        plan = self.policy.decide(view)
        if broken := batch_violations(view, plan):
            raise PolicyError(f"policy {policy_name(self.policy)} at step {self._num_steps}: {'; '.join(broken)}")
        return plan

    def _still_fits(self, plan: BatchPlan, now_us: int) -> bool:
        return not batch_violations(self._observe(now_us), replace(plan, preempt=()))

    def _act(self, plan: BatchPlan, preempted: tuple[RequestId, ...], now_us: int) -> Step:
        admitted = tuple(i for i in plan.tokens if not self._live[i].is_running)
        # All prefixes first: growing a table may evict the very blocks that the policy counted as cached.
        for request_id in admitted:
            self._admit(self._live[request_id], now_us)
        chunks = tuple(self._allocate(self._live[i], n) for i, n in plan.tokens.items())
        self._num_steps += 1
        return Step(
            index=self._num_steps - 1,
            start_us=now_us,
            chunks=chunks,
            admitted=admitted,
            preempted=preempted,
            reason=plan.reason,
        )

    def _preempt(self, state: RequestState) -> None:
        self._leave_queue(state)
        self.ledger.release(state.id)
        state.is_running = False
        state.num_computed = 0
        state.record.num_preemptions += 1
        bisect.insort(self._waiting, state, key=arrival_key)

    def _admit(self, state: RequestState, now_us: int) -> None:
        self._leave_queue(state)
        num_cached = self.ledger.attach(state.id, state.reusable_keys()) * self.ledger.block_size
        state.is_running = True
        state.num_computed = num_cached
        state.admitted_us = now_us
        if state.record.first_scheduled_us is None:
            state.record.first_scheduled_us = now_us
            state.record.cached_tokens = min(num_cached, state.num_prompt_tokens)
        bisect.insort(self._running, state, key=admission_key)

    def _allocate(self, state: RequestState, num_tokens: int) -> ScheduledChunk:
        end = state.num_computed + num_tokens
        self.ledger.grow(state.id, end)
        return ScheduledChunk(state.id, num_tokens, state.num_computed, end == state.num_tokens)

    def _advance(self, state: RequestState, chunk: ScheduledChunk) -> None:
        size = self.ledger.block_size
        first, last = chunk.num_computed_tokens // size, (chunk.num_computed_tokens + chunk.num_tokens) // size
        state.num_computed = chunk.num_computed_tokens + chunk.num_tokens
        if last > first and self.ledger.enable_prefix_cache:
            self.ledger.publish(state.id, first, state.block_keys(last)[first:])

    def _leave_queue(self, state: RequestState) -> None:
        if state.is_running:
            popped = self._running.pop(bisect.bisect_left(self._running, admission_key(state), key=admission_key))
        else:
            popped = self._waiting.pop(bisect.bisect_left(self._waiting, arrival_key(state), key=arrival_key))
        assert popped is state, f"request {state.id} is not where its queue's order says"

    def _end(self, state: RequestState, now_us: int, reason: FinishReason) -> None:
        self.ledger.release(state.id)
        del self._live[state.id]
        state.record.finish_us = now_us
        state.record.finish_reason = reason
        self._recorder.request(state.record)

    def _record(self, step: Step, end_us: int) -> None:
        self._recorder.step(
            StepRecord(
                step=step.index,
                start_us=step.start_us,
                end_us=end_us,
                ids=[c.id for c in step.chunks],
                num_tokens=[c.num_tokens for c in step.chunks],
                num_computed_tokens=[c.num_computed_tokens for c in step.chunks],
                num_logits=sum(c.samples for c in step.chunks),
                admitted=list(step.admitted),
                preempted=list(step.preempted),
                num_waiting=len(self._waiting),
                num_used_blocks=self.ledger.num_used_blocks,
                num_idle_blocks=self.ledger.num_idle_blocks,
                reason=step.reason,
            )
        )


def _take_token(state: RequestState, sampled: Sampled, now_us: int) -> FinishReason | None:
    state.record.output_token_ids.append(sampled.token_id)
    state.record.token_times_us.append(now_us)
    if sampled.is_stop:
        return FinishReason.STOP
    return FinishReason.LENGTH if state.record.output_tokens == state.request.output_tokens else None
