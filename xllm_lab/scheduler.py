"""The control loop of one serving instance: observe, decide, check, act, record. Both hosts drive this one.

    host                                   scheduler
    add(request), cancel(id)        -->    queues
    plan(now_us)                    -->    observe: the view; decide: the policy; check: the shared checks;
                                           act: preempt, admit, allocate blocks          --> Step, or None
    runs the step: the engine on a device, the simulator on a cost model
    complete(step, ends, sampled)   -->    record; append tokens; publish blocks; finish requests
    copied(ends)                    -->    blocks that moved between tiers can be found; who waited for them waits

A request is waiting (holds no KV), loading (as waiting, and its blocks are on their way from the host: no policy sees
it), running (holds KV: prefilling or decoding), or ended. Preemption by recompute sends it back to waiting. With async
scheduling the next step is planned while this one runs; tokens are then counted before they are there, and a running
request that has all of them scheduled is draining: it holds KV, and computes no more.

A draft policy is asked once the batch policy's plan is legal. A step with drafts is not planned ahead of: how many
tokens it brings decides the next one. So is a step after which somebody wants to draft, behind a token still unknown;
unless drafts did not come when they were asked for last.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from operator import add, attrgetter
from typing import Literal, NamedTuple

from xllm_lab.copies import CopyEnd
from xllm_lab.drafting import Drafting
from xllm_lab.errors import ConfigError, PolicyError, RequestTooLargeError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import Ledger
from xllm_lab.live_view import LiveView
from xllm_lab.lockstep import Lockstep
from xllm_lab.policies.api import (
    BatchPlan,
    BatchPolicy,
    StepTimeView,
    arrival_key,
    ceil_div,
)
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.checks import batch_violations
from xllm_lab.policies.draft import Ask
from xllm_lab.rebalancing import Rebalancing
from xllm_lab.records import FinishReason, Recorder, RequestRecord
from xllm_lab.request_state import NO_QUEUE, RequestState, new_record, placeholder
from xllm_lab.step import NO_DECODES, Decodes, Draft, ScheduledChunk, Step
from xllm_lab.step_shape import Shapes
from xllm_lab.tiering import Tiering
from xllm_lab.virtual_kv import VirtualKv
from xllm_lab.workload import Request, RequestId, TokenIds

# How a request leaves an instance: it ends, or goes on elsewhere.
Leaving = FinishReason | Literal["handed over"]
_BY_ARRIVAL, _BY_ADMISSION = attrgetter("arrival_order"), attrgetter("admission_order")


class Sampled(NamedTuple):
    """A drawn token, whether it ends the request, and the drafts before it that are kept."""

    token_id: int
    is_stop: bool = False
    accepted: Sequence[int] = ()


class Scheduler:
    """One instance's queues, ledger and policy.

    Raises:
        ConfigError: at construction, if the policy needs step times and there are none.

    Args:
        shapes: says in which graph a step runs; None: eagerly.
        drafting: says who drafts; None: nobody.
        pages: says what of virtual KV is mapped; None: KV is paged.
        tiering: says what is copied between the tiers of KV; None: nothing.
        experts: says where experts lie; None: they are not divided among devices.
    """

    def __init__(
        self,
        config: InstanceConfig,
        policy: BatchPolicy,
        recorder: Recorder,
        *,
        step_time: StepTimeView | None = None,
        shapes: Shapes | None = None,
        drafting: Drafting | None = None,
        pages: VirtualKv | None = None,
        tiering: Tiering | None = None,
        experts: Rebalancing | None = None,
        instance: int = 0,
    ) -> None:
        if getattr(policy, "needs_step_time", False) and step_time is None:
            name = policy_name(policy)
            raise ConfigError(f"policy {name} needs step times, none are given; accepted: a machine's calibration")
        self.config = config
        self.policy = policy
        self.instance = instance
        self.shapes = shapes
        self.drafting = drafting
        self.pages = pages
        self.tiering = tiering
        self.experts = experts
        self._recorder = recorder
        self.ledger = self._new_ledger()
        self._under_way: Step | None = None
        self._num_steps = self._num_recorded = 0
        self._live: dict[RequestId, RequestState] = {}
        self._lockstep = Lockstep(config.block_size)
        # Decoding requests outside the lockstep; and those that left it with a tick under way: which turn it was, and
        # the tokens in KV after it.
        self._singles: dict[RequestId, RequestState] = {}
        self._owed: list[tuple[RequestState, int, int]] = []
        # Who lost its KV since the last step was planned; usually in the plan of the next one.
        self._victims: list[RequestId] = []
        # Who lost its KV with a token under way, which it still gets.
        self._due: list[RequestState] = []
        # Who left with its first token, to go on elsewhere: since somebody asked; and before, while its KV goes ahead.
        self._handed_over: list[RequestState] = []
        self._pushing: dict[RequestId, RequestState] = {}
        self._view = LiveView(config, self._live, step_time)
        self.is_index_watched = False  # somebody reads the prefix index from outside
        self._chunk: ScheduledChunk | None = None  # of the plan made last, if that may be repeated
        self._foresees_length = config.async_scheduling == "length_aware"

    @property
    def num_live(self) -> int:
        """Requests that arrived and have not ended."""
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        return len(self._view.waiting) + len(self._view.loading)

    @property
    def is_copying(self) -> bool:
        """Whether copies are under way, whose ends may let requests run."""
        return self.tiering is not None and self.tiering.is_copying

    def num_outstanding_tokens_after(self, num_repeats: int) -> int:
        """Known tokens that are not in KV when the step under way has been repeated so often.

        One for a decoding request, more for a prompt.
        """
        view = self._view
        missing = sum(s.num_tokens - s.num_computed_tokens for s in view.prefilling)
        if self._chunk is not None:
            missing -= self._chunk.num_tokens * num_repeats
        return len(view.decoding) + missing + sum(s.num_tokens for s in (*view.waiting, *view.loading))

    def num_used_blocks_after(self, num_repeats: int) -> int:
        """KV blocks in use when the step under way has been repeated so often."""
        growth = self._lockstep.num_blocks(num_repeats) + sum(self._chunk_blocks_per_repeat(num_repeats))
        return self.ledger.num_used_blocks + growth

    def is_live(self, request: RequestId) -> bool:
        return request in self._live

    def find(self, request: RequestId) -> RequestState | None:
        """Of a request that has not left; None of any other."""
        return self._live.get(request) or self._pushing.get(request)

    def state(self, request: RequestId) -> RequestState:
        return self._live[request]

    def add(
        self,
        request: Request,
        prompt_ids: TokenIds,
        now_us: int,
        *,
        record: RequestRecord | None = None,
        hands_over: bool = False,
    ) -> None:
        """A request arrives, or, with its `record`, comes over from another instance.

        One that can never run here ends at once, and its record says so. One that `hands_over` leaves with its next
        token, if that is not its last, see `handed_over`.
        """
        assert request.id not in self._live, f"request {request.id} arrived twice"
        own = new_record(request) if record is None else record
        state = RequestState(request, prompt_ids, self.ledger, own, hands_over=hands_over)
        state.record.instance = self.instance
        self._live[request.id] = state
        try:
            self.config.refuse_if_too_large(request)
        except RequestTooLargeError:
            self._end(state, now_us, FinishReason.REJECTED)
            return
        self._enter(self._view.waiting, state)

    def cancel(self, request: RequestId, now_us: int) -> bool:
        """The client went away. False if the request had ended, or never came."""
        state = self._live.get(request)
        if state is None:
            return False
        self._stop(state)
        self._end(state, now_us, FinishReason.CANCELLED)
        return True

    def plan(self, now_us: int) -> Step | None:
        """Decide the next step and allocate its blocks; None if nothing can run.

        Raises:
            PolicyError: a policy returned an illegal plan; nothing was changed. Or copies leave nobody room, for ever.
        """
        if self._under_way is not None and any(d.token_ids for d in self._under_way.drafts):
            return None
        if self.tiering is not None:
            self._copy(self.tiering, now_us)
        if self.experts is not None:
            self.experts.look(now_us)
        waits = self._under_way is not None and self.drafting is not None and self.drafting.is_waited_for()
        while self._live:
            plan = self._decide(now_us)
            if waits and self._asks(plan):
                return None
            for request_id in plan.preempt:
                self._victims.append(request_id)
                self._preempt(self._live[request_id])
            if not plan.is_empty and (not plan.preempt or self._still_fits(plan)):
                preempted = tuple(self._victims)
                self._victims.clear()
                step = self._act(plan, preempted, now_us)
                if self.shapes is not None:
                    self.shapes.place(step)
                if self.tiering is not None:
                    self.tiering.stepped()
                return step
            if not plan.preempt:
                break
            # What a preemption frees is an estimate: two victims that shared blocks free more together than the policy
            # could count, and a victim's blocks that an admitted prompt takes over free none. It gets another look.
        if self.tiering is not None and self._under_way is None:
            self.tiering.refuse_to_starve(self._live, now_us)
        return None

    def copied(self, ends: Sequence[CopyEnd]) -> None:
        """Copies are over; who waited for them can be planned for."""
        for end in ends:
            assert self.tiering is not None, f"copy {end.number} ends, and nobody asked for any"
            for request_id in self.tiering.done(end):
                if request_id in self._pushing:
                    self._handed_over.append(self._pushing.pop(request_id))
                state = self._live.get(request_id)
                if state is not None and state.queue is self._view.loading:
                    self._leave_queue(state)
                    self._enter(self._view.waiting, state)

    def start(self, step: Step, now_us: int) -> None:
        """A planned step starts."""
        step.start_us = now_us
        self._under_way = step
        for request_id in step.admitted:
            state = self._live.get(request_id)
            if state is not None and state.record.first_scheduled_us is None:
                state.record.first_scheduled_us = now_us

    def num_repeats(self, step: Step, ahead: Step | None) -> int:
        """How many steps exactly like `step` could follow it, if nothing arrives and nobody goes away.

        Args:
            ahead: the step that was planned while `step` runs; then it, too, is one of them.
        """
        most = self._num_alike(step, ahead)
        if self.experts is not None:
            step.repeats_until_us = self.experts.next_us
        if self.pages is not None and most:
            most = self.pages.most_repeats(most, step, ahead)
        return most if self.shapes is None or not most else self.shapes.num_alike(step, most)

    def _num_alike(self, step: Step, ahead: Step | None) -> int:
        """`num_repeats`, in whatever graph."""
        latest = step if ahead is None else ahead
        if not latest.holds_for or (ahead is not None and (step.others or ahead.others)):
            return 0
        is_same = latest is step or (
            latest.decodes.ids is step.decodes.ids
            and latest.num_waiting == step.num_waiting
            and latest.reason == step.reason
            and not latest.preempted
        )
        lockstep, ledger = self._lockstep, self.ledger
        next_end = lockstep.next_end()
        if not is_same or next_end is None or lockstep.has_draining:
            return 0  # the last tokens of some are under way
        most = next_end - lockstep.done - 1
        if self._foresees_length:
            most = min(most, next_end - lockstep.clock)
        if most < 1 or latest.experts is not step.experts:
            return 0
        if self.tiering is not None:
            return 0  # records of copies name blocks, which are handed out in another order when steps are skipped
        # Evicting what a waiting request would have found may change the plan.
        is_read = self._is_prefix_index_read
        if step.others:
            # Nor may blocks that a waiting request would find be published in the middle.
            return 0 if is_read else self._num_chunk_repeats(step, min(most, latest.holds_for))
        free = ledger.num_clean_blocks if is_read else ledger.num_free_blocks
        if self.pages is not None:
            free = 0  # a block that is taken is a page to find
        return min(most, latest.holds_for, lockstep.most_ticks(free))

    @property
    def _is_prefix_index_read(self) -> bool:
        """Whether anybody looks up cached blocks between one plan and the next."""
        return self.ledger.enable_prefix_cache and (bool(self._view.waiting) or self.is_index_watched)

    def _num_chunk_repeats(self, step: Step, most: int) -> int:
        """Of `most` repeats of a step with a prompt's chunk, those for which blocks are left."""
        left = self.ledger.num_free_blocks - step.keeps_free_blocks if self.pages is None else 0
        taken = map(add, self._lockstep.blocks_per_tick(most), self._chunk_blocks_per_repeat(most))
        return sum(total <= left for total in accumulate(taken))

    def _chunk_blocks_per_repeat(self, num_repeats: int) -> list[int]:
        """Blocks that the prompt whose chunk is under way takes when that is repeated."""
        if self._chunk is None:
            return [0] * num_repeats
        _, num_tokens, computed, _ = self._chunk
        size = self.config.block_size
        held = [ceil_div(computed + num_tokens * k, size) for k in range(1, num_repeats + 2)]
        return [after - before for before, after in pairwise(held)]

    def complete(
        self, step: Step, ends_us: Sequence[int], sampled: Mapping[RequestId, Sampled] | None, ahead: Step | None = None
    ) -> tuple[RequestId, ...]:
        """Take the results of a step, and of its repeats if there is more than one end. Returns the requests it ended.

        A request that was cancelled while the step ran, or lost its KV, is skipped.

        Args:
            sampled: a token for each chunk that `samples`; None for placeholders, none of which ends a request.
            ahead: the step that was planned meanwhile.
        """
        assert ends_us[0] > step.start_us, f"step {step.index} ends at {ends_us[0]}, not after {step.start_us}"
        self._under_way = None
        num_more = len(ends_us) - 1
        assert num_more <= step.num_repeats, f"step {step.index} was repeated {num_more} times of {step.num_repeats}"
        if step.drafts:
            assert sampled is not None, f"step {step.index} has drafts, and nobody says which are kept"
            step.num_accepted = tuple([len(sampled[d.id].accepted) for d in step.drafts])
        self._record(step, ends_us, ahead)
        if num_more:
            self._repeat(num_more, ahead)
        if self.pages is not None:
            self.pages.slots.over(step.index + num_more)
        now_us = ends_us[-1]
        ended: list[tuple[RequestState, Leaving]] = []
        if step.decodes.ids:
            ended = self._complete_decodes(step, ends_us, sampled)
        drafts = {d.id: d for d in step.drafts if d.token_ids}
        for chunk, turn in zip(step.others, step.turns, strict=True):
            state = self._live.get(chunk.id)
            if state is None or not state.is_running or state.num_preemptions != turn:
                continue
            computed = chunk.num_computed_tokens + chunk.num_tokens * len(ends_us)
            if chunk.id in drafts:
                assert sampled is not None, "asserted above"
                assert self.drafting is not None, "somebody made the drafts"
                self.drafting.settle(state, drafts[chunk.id], len(sampled[chunk.id].accepted), self.ledger)
                computed = state.num_computed_tokens
            if self.ledger.enable_prefix_cache:
                self._publish(state, computed)
            if state.hands_over:
                self._push(state, computed, now_us)
            if chunk.samples and (reason := _take_tokens(state, sampled, now_us)):
                ended.append((state, reason))
        if self._due:
            ended += self._complete_due(sampled, now_us)
        for state, reason in ended:
            self._leave(state, now_us, reason)
        return tuple([state.id for state, reason in ended if isinstance(reason, FinishReason)])

    def handed_over(self) -> list[RequestState]:
        """Requests that left since this was asked last, with their first tokens; they go on elsewhere."""
        left, self._handed_over = self._handed_over, []
        return left

    def fail(self) -> list[RequestState]:
        """The instance loses everything it holds; returns the requests it had, by arrival. Steps under way never were.

        The host has completed every step that was over.
        """
        lost = sorted([*self._live.values(), *self._pushing.values()], key=arrival_key)
        self._under_way = None
        for state in lost:
            self._forget_drafts(state.id)
            self._stop(state)
            state.lose_kv()
            _fill_placeholders(state)
        self._live.clear()
        self._pushing.clear()
        self._owed.clear()
        self._due.clear()
        self._victims.clear()
        self.ledger = self._new_ledger()
        if self.pages is not None:
            self.pages.reset()
        self._lockstep = Lockstep(self.config.block_size)
        self._num_steps = self._num_recorded
        return lost

    def _new_ledger(self) -> Ledger:
        config = self.config
        ledger = Ledger(config.num_kv_blocks, config.block_size, enable_prefix_cache=config.enable_prefix_cache)
        if self.pages is not None:
            ledger.changed = {}
        if self.tiering is not None:
            self.tiering.serve(ledger, self._recorder, self.instance)
        if self.experts is not None:
            self.experts.serve(self._recorder, self.instance)
        return ledger

    def _copy(self, tiering: Tiering, now_us: int) -> None:
        """Ask for copies; who is to find blocks that are on their way waits for them."""
        view = self._view
        outstanding = sum(s.num_tokens - s.num_computed_tokens for s in view.prefilling)
        for request_id in tiering.plan(view.waiting, now_us, outstanding):
            state = self._live[request_id]
            self._leave_queue(state)
            self._enter(view.loading, state)

    def _decide(self, now_us: int) -> BatchPlan:
        view = self._view
        view.now_us = now_us
        self._count_blocks()
        plan = self.policy.decide(view)
        if broken := batch_violations(view, plan):
            raise PolicyError(f"policy {policy_name(self.policy)} at step {self._num_steps}: {'; '.join(broken)}")
        return plan

    def _count_blocks(self) -> None:
        """The view shows the blocks as they are now."""
        self._view.num_free_blocks = self.ledger.num_free_blocks
        num_blocks = self._lockstep.num_blocks()
        if self._singles:
            size = self.config.block_size
            num_blocks += sum(s.num_computed_tokens % size == 0 for s in self._singles.values())
        self._view.num_decode_blocks = num_blocks

    def _still_fits(self, plan: BatchPlan) -> bool:
        self._count_blocks()
        return not batch_violations(self._view, replace(plan, preempt=()))

    def _asks(self, plan: BatchPlan) -> Mapping[RequestId, Ask]:
        """Who wants drafts in a step that is about to be planned so."""
        return {} if self.drafting is None else self.drafting.asks(self._view, plan)

    def _act(self, plan: BatchPlan, preempted: tuple[RequestId, ...], now_us: int) -> Step:
        version = self.ledger.version
        asks = self._asks(plan) if self._under_way is None else {}
        scheduled: list[RequestState] = []
        admitted: tuple[RequestId, ...] = ()
        others: tuple[ScheduledChunk, ...] = ()
        turns: tuple[int, ...] = ()
        if plan.tokens:
            scheduled = [self._live[i] for i in plan.tokens]
            # All prefixes first: growing a table may evict the very blocks that the policy counted as cached.
            admitted = tuple([self._admit(state, now_us) for state in scheduled if not state.is_running])
        drafts: tuple[Draft, ...] = ()
        if self.drafting is not None and asks:
            drafts = self.drafting.make(asks, sorted([self._live[i] for i in asks], key=_BY_ADMISSION), self.ledger)
        speculating = [self._live[d.id] for d in drafts if d.token_ids]
        decodes = NO_DECODES
        if plan.decode_all:
            decodes = self._begin_decodes(speculating)
            if decodes.ids:
                self._advance_decodes(1)
        only_decodes = all(state.is_decoding for state in scheduled)
        if speculating:
            others = tuple([self._speculate(self._live[d.id], len(d.token_ids)) for d in drafts if d.token_ids])
            scheduled = [state for state in scheduled if state not in speculating]
        if scheduled:
            others += tuple([self._allocate(state, plan.tokens[state.id]) for state in scheduled])
        if others:
            turns = tuple([state.record.num_preemptions for state in (*speculating, *scheduled)])
        holds_for = plan.holds_for if self.drafting is None else 0  # how long nobody drafts, no policy says
        self._chunk = others[0] if others and holds_for else None
        index, ledger = self._num_steps, self.ledger
        self._num_steps = index + 1
        # What this step evicted, the policy did not know.
        is_news = ledger.version != version and self._is_prefix_index_read
        # Keywords would take three times as long, on every step of every simulation.
        step = Step(
            index,
            now_us,
            decodes,
            others,
            turns,
            admitted,
            preempted,
            plan.reason,
            0 if is_news else holds_for,
            plan.keeps_free_blocks,
            self.num_waiting,
            ledger.num_used_blocks,
            ledger.num_idle_blocks,
            self.instance,
            drafts=drafts,
            num_copies=0 if self.tiering is None else self.tiering.num_copies,
        )
        if self.pages is not None:
            self.pages.place(step, ledger, self._lockstep, tuple(self._singles.values()), self._num_kv_tokens())
        if self.experts is not None:
            self.experts.place(step, only_decodes=only_decodes)
        return step

    def _num_kv_tokens(self) -> int:
        """Of all running requests, prefixes that several share as often as they are shared."""
        view = self._view
        alone = (*self._singles.values(), *view.prefilling, *view.draining)
        return self._lockstep.kv_tokens + sum([state.num_computed_tokens for state in alone])

    def _speculate(self, state: RequestState, num_drafts: int) -> ScheduledChunk:
        if state.lockstep is not None:
            self._step_out(state)
        self._singles[state.id] = state
        chunk = ScheduledChunk(state.id, 1 + num_drafts, state.num_computed_tokens, True)
        state.speculate(num_drafts)
        return chunk

    def _forget_drafts(self, request: RequestId) -> None:
        if self.drafting is not None:
            self.drafting.proposer.forget(request)

    def _begin_decodes(self, speculating: Sequence[RequestState] = ()) -> Decodes:
        """Who decodes alone joins the others; who speculates leaves them."""
        for state in speculating:
            if state.lockstep is not None:
                self._step_out(state)
            self._singles.pop(state.id, None)
        if self._singles:
            for state in self._singles.values():
                self._lockstep.join(state)
            self._singles.clear()
        return self._lockstep.decodes()

    def _advance_decodes(self, num_ticks: int) -> None:
        self._lockstep.advance(num_ticks, self.ledger)
        if self._foresees_length:
            for state in self._lockstep.drain():
                self._drain(state)

    def _repeat(self, num_more: int, ahead: Step | None) -> None:
        self._advance_decodes(num_more)
        self._num_steps += num_more
        if self._chunk is not None:
            request_id, num_tokens, computed, _ = self._chunk
            state = self._live[request_id]
            self.ledger.grow(request_id, computed + num_tokens * (num_more + 1))
            draws = state.compute(num_tokens * num_more)
            assert not draws, f"a chunk of request {request_id} that ends its prompt was repeated"
            if state.is_decoding:  # it computes anew what it had generated, up to the last token
                self._enter_running(state, self._view.decoding)
        if ahead is not None:
            ahead.index += num_more
            ahead.decodes = ahead.decodes.later(num_more)
            if ahead.pages is not None:
                ahead.pages = ahead.pages.later(num_more * ahead.num_new_tokens)
            if self.shapes is not None:
                self.shapes.place(ahead)

    def _complete_decodes(
        self, step: Step, ends_us: Sequence[int], sampled: Mapping[RequestId, Sampled] | None
    ) -> list[tuple[RequestState, Leaving]]:
        lockstep, now_us = self._lockstep, ends_us[-1]
        first_tick = lockstep.done + 1
        lockstep.tick_over(ends_us)
        if self.ledger.enable_prefix_cache:
            for tick in range(first_tick, lockstep.done + 1):
                for state in lockstep.at_clock(tick):
                    self._publish(state, state.offset + tick)
        ended: dict[RequestId, tuple[RequestState, Leaving]] = {
            state.id: (state, FinishReason.LENGTH) for state in lockstep.ended()
        }
        if sampled is None and not self._owed:
            return _by_admission(ended)
        for state, turn, num_computed in self._owed:
            # It left while this tick was under way: its token is its own.
            if state.is_running and state.num_preemptions == turn and self._live.get(state.id) is state:
                if self.ledger.enable_prefix_cache:
                    self._publish(state, num_computed)
                reason = _take_tokens(state, sampled, now_us)
                if reason is not None:
                    ended[state.id] = (state, reason)
        self._owed.clear()
        if sampled is not None:
            for request_id in step.decodes.ids:
                member = self._live.get(request_id)
                if member is not None and member.lockstep is not None and member.joined < lockstep.done:
                    member.record.output_token_ids.append(sampled[request_id].token_id)
                    if sampled[request_id].is_stop:
                        ended[request_id] = (member, FinishReason.STOP)
        return _by_admission(ended)

    def _complete_due(
        self, sampled: Mapping[RequestId, Sampled] | None, now_us: int
    ) -> list[tuple[RequestState, Leaving]]:
        """Tokens of requests that lost their KV while the step ran that draws them.

        vLLM's: `update_from_output` gives a preempted request its token, and may end it. One that a second look at the
        same plan let in again starts without it.
        """
        ended: list[tuple[RequestState, Leaving]] = []
        for state in self._due:
            if not state.is_running and self._live.get(state.id) is state:
                if reason := _take_tokens(state, sampled, now_us):
                    ended.append((state, reason))
                state.recount()
        self._due.clear()
        return ended

    def _blocks_in_use(self, step: Step, num_more: int, ahead: Step | None) -> tuple[array[int], array[int]]:
        """(used, idle) after the plans of a step and its repeats; the last of them is `ahead`, if there is one."""
        latest = step if ahead is None else ahead
        taken = map(add, self._lockstep.blocks_per_tick(num_more), self._chunk_blocks_per_repeat(num_more))
        used = array("i", accumulate(taken, initial=latest.num_used_blocks))
        idle = array("i", (latest.num_idle_blocks,)) * len(used)
        if latest.num_idle_blocks:
            evicts_from = latest.num_used_blocks + self.ledger.num_clean_blocks
            idle = array("i", [latest.num_idle_blocks - max(0, now - evicts_from) for now in used])
        if ahead is not None:
            used.insert(0, step.num_used_blocks)
            idle.insert(0, step.num_idle_blocks)
            ahead.num_used_blocks, ahead.num_idle_blocks = used.pop(), idle.pop()
        return used, idle

    def _preempt(self, state: RequestState) -> None:
        self._stop(state)
        self._forget_drafts(state.id)
        if self._foresees_length and state.num_drawn > state.record.output_tokens:
            self._due.append(state)
        self._release(state)
        state.record.num_preemptions += 1
        state.lose_kv()
        self._enter(self._view.waiting, state)

    def _admit(self, state: RequestState, now_us: int) -> RequestId:
        self._leave_queue(state)
        num_cached = state.admit(now_us)
        if self.tiering is not None:
            self.tiering.found(state.reusable_keys(), num_cached // self.ledger.block_size, now_us)
        if state.record.first_scheduled_us is None:
            state.record.cached_tokens = min(num_cached, state.num_prompt_tokens)
        return state.id

    def _allocate(self, state: RequestState, num_tokens: int) -> ScheduledChunk:
        if state.lockstep is not None:
            self._step_out(state)
        computed = state.num_computed_tokens
        self.ledger.grow(state.id, computed + num_tokens)
        samples = state.compute(num_tokens)
        if self._foresees_length and self.ledger.enable_prefix_cache:
            self._publish_ahead(state)
        if samples and self._foresees_length and state.num_drawn == state.most_output_tokens:
            self._drain(state)
        else:
            self._enter_running(state, self._view.decoding if samples or state.is_decoding else self._view.prefilling)
        return ScheduledChunk(state.id, num_tokens, computed, samples)

    def _enter_running(self, state: RequestState, queue: list[RequestState]) -> None:
        if state.queue is not queue:
            self._leave_queue(state)
            self._enter(queue, state)
            if queue is self._view.decoding:
                self._singles[state.id] = state

    def _step_out(self, state: RequestState) -> None:
        self._lockstep.leave(state)
        self._singles[state.id] = state
        if self._lockstep.done < self._lockstep.clock:
            self._owed.append((state, state.num_preemptions, state.num_computed_tokens))

    def _drain(self, state: RequestState) -> None:
        self._leave_queue(state)
        self._enter(self._view.draining, state)
        self._singles.pop(state.id, None)
        state.is_draining = True

    def _publish(self, state: RequestState, num_computed: int) -> None:
        num_full = num_computed // self.ledger.block_size
        if num_full > state.num_published:
            keys = state.block_keys(num_full)[state.num_published :]
            self.ledger.publish(state.id, state.num_published, keys)
            if self.tiering is not None:
                self.tiering.uses.add(keys, state.num_published, state.admitted_us)
            state.num_published = num_full

    def _publish_ahead(self, state: RequestState) -> None:
        """Blocks of known tokens, before they are computed: who is let in by the next plan runs after this step.

        vLLM's: `KVCacheManager.allocate_slots` ends so.
        """
        self._publish(state, min(state.num_computed_tokens, state.num_prompt_tokens + state.record.output_tokens))

    def _enter(self, queue: list[RequestState], state: RequestState) -> None:
        order = self._order_of(queue)
        # Who comes last usually goes last.
        if queue and order(queue[-1]) > order(state):
            bisect.insort(queue, state, key=order)
        else:
            queue.append(state)
        state.queue = queue

    def _order_of(self, queue: list[RequestState]) -> Callable[[RequestState], tuple[int, ...]]:
        return _BY_ARRIVAL if queue is self._view.waiting or queue is self._view.loading else _BY_ADMISSION

    def _leave_queue(self, state: RequestState) -> None:
        queue = state.queue
        if queue is NO_QUEUE:
            return
        order = self._order_of(queue)
        # Who came first usually leaves first.
        popped = queue.pop(0 if queue[0] is state else bisect.bisect_left(queue, order(state), key=order))
        assert popped is state, f"request {state.id} is not where its queue's order says"
        state.queue = NO_QUEUE

    def _stop(self, state: RequestState) -> None:
        """It takes part in nothing any more."""
        self._leave_queue(state)
        if state.lockstep is not None:
            self._lockstep.leave(state)
        self._singles.pop(state.id, None)
        state.is_draining = False

    def _leave(self, state: RequestState, now_us: int, reason: Leaving) -> None:
        self._stop(state)
        if isinstance(reason, FinishReason):
            self._end(state, now_us, reason)
        else:
            self._hand_over(state)

    def _end(self, state: RequestState, now_us: int, reason: FinishReason) -> None:
        self._forget_drafts(state.id)
        self._release(state)
        del self._live[state.id]
        _fill_placeholders(state)
        state.record.finish_us = now_us
        state.record.finish_reason = reason
        self._recorder.request(state.record)

    def _hand_over(self, state: RequestState) -> None:
        """A request leaves, once its KV is where others find it; its blocks stay as cached ones that nobody uses."""
        self._forget_drafts(state.id)
        self._release(state)
        del self._live[state.id]
        _fill_placeholders(state)
        if self.tiering is not None and self.tiering.is_pushing(state.id):
            self._pushing[state.id] = state
        else:
            self._handed_over.append(state)

    def _push(self, state: RequestState, num_computed: int, now_us: int) -> None:
        """Have computed blocks of a prompt go ahead of it, while the rest is computed."""
        first, num_full = state.num_pushed, num_computed // self.ledger.block_size
        if self.tiering is None or not self.tiering.copier.has_store or num_full <= first:
            return
        keys = state.block_keys(num_full)[first:]
        blocks = [block for block in map(self.ledger.find, keys) if block is not None]
        assert len(blocks) == len(keys), f"request {state.id} has blocks in KV that nobody knows"
        self.tiering.push(state.id, blocks, keys, now_us)
        state.num_pushed = num_full

    def _release(self, state: RequestState) -> None:
        self.ledger.release(state.id)
        if self.pages is not None:
            self.pages.slots.leave(state.id, self._num_steps - 1)

    def _record(self, step: Step, ends_us: Sequence[int], ahead: Step | None) -> None:
        step.ends_us, num_more = ends_us, len(ends_us) - 1
        if num_more:
            step.used_blocks, step.idle_blocks = self._blocks_in_use(step, num_more, ahead)
        else:
            step.used_blocks, step.idle_blocks = (step.num_used_blocks,), (step.num_idle_blocks,)
        if self.shapes is not None:
            self.shapes.count(step, len(ends_us))
        self._recorder.span(step)
        if self.experts is not None:
            self.experts.completed(step)
        self._num_recorded = step.index + len(ends_us)


def _by_admission(
    ended: Mapping[RequestId, tuple[RequestState, Leaving]],
) -> list[tuple[RequestState, Leaving]]:
    # As they are packed: the order in which they end is the order in which what they leave is evicted.
    return sorted(ended.values(), key=lambda end: end[0].admission_order) if len(ended) > 1 else list(ended.values())


def _take_tokens(state: RequestState, sampled: Mapping[RequestId, Sampled] | None, now_us: int) -> Leaving | None:
    record = state.record
    if sampled is not None:
        token_id, is_stop, accepted = sampled[state.id]
        for token in accepted:
            record.token_times_us.append(now_us)
            record.output_token_ids.append(token)
        record.output_token_ids.append(token_id)
        record.token_times_us.append(now_us)
        if is_stop:
            return FinishReason.STOP
    else:
        record.token_times_us.append(now_us)
    if record.output_tokens == state.request.output_tokens:
        return FinishReason.LENGTH
    return "handed over" if record.output_tokens == state.most_output_tokens else None


def _fill_placeholders(state: RequestState) -> None:
    record = state.record
    missing = len(record.token_times_us) - len(record.output_token_ids)
    record.output_token_ids += array("i", (placeholder(state.id),)) * missing
