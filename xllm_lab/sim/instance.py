"""One serving instance as a SimPy process: it answers the serving loop with simulated time.

Exact fast-forward: a step that would repeat itself is run as often as nothing changes, in one event. Every step's time
is computed, and if something comes in the middle, the stretch is cut at the end of the step it falls into:

    ends of a stretch    |----|----|----|----|----|----|        one event, at the last end
    an arrival at t                    ^ t
    cut                  |----|----|----|                       the plan after this end sees it
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import simpy

from xllm_lab.copies import NO_COPIES, CopyEnd
from xllm_lab.copy_time import CopyTime
from xllm_lab.dispatch import FIRST_INSTANCE
from xllm_lab.draft_time import DraftTime, draft_loads
from xllm_lab.drafting import Proposer
from xllm_lab.page_time import PageTime
from xllm_lab.rebalancing import Mover
from xllm_lab.request_state import placeholder
from xllm_lab.scheduler import Sampled
from xllm_lab.serving import Completion, Conversation, Feed, Idle, Woke
from xllm_lab.sim.copies import Links, PricedLinks, SimulatedCopies
from xllm_lab.sim.cost import Batch, CostModel
from xllm_lab.sim.drafts import SimulatedDrafts
from xllm_lab.sim.experts.serving import ServedExperts, SimulatedMover, StepLoads
from xllm_lab.sim.store import SimulatedStore
from xllm_lab.step import Step
from xllm_lab.step_time import Chunk
from xllm_lab.workload import RequestId

# Steps of a stretch that are priced at once: an arrival usually cuts it, and what lies behind is thrown away.
_MOST_STEPS = 256
# Fewer are priced faster one by one.
_FEWEST_STEPS = 4


class Stretch:
    """The ends of a step and of its repeats, microseconds, and which of them the cost model extrapolated."""

    __slots__ = ("ends_us", "is_extrapolated")

    def __init__(self, ends_us: Sequence[int], is_extrapolated: npt.NDArray[np.bool_] | tuple[bool, ...]) -> None:
        self.ends_us = ends_us
        self.is_extrapolated = is_extrapolated

    def until(self, now_us: int) -> Stretch:
        """Up to the first end at or after `now_us`."""
        num_steps = bisect.bisect_left(self.ends_us, now_us) + 1
        return Stretch(self.ends_us[:num_steps], self.is_extrapolated[:num_steps])


class Timing(Protocol):
    """What a simulated host answers."""

    @property
    def proposer(self) -> Proposer | None:
        """What makes drafts; `sampled` says which are kept."""
        ...

    def links(self, block_size: int) -> Links:
        """Of one instance, between its tiers; each call are another's."""
        ...

    @property
    def has_store(self) -> bool:
        """Whether instances share a store of KV blocks."""
        ...

    def mover(self) -> Mover | None:
        """Of the experts of one instance; each call are another's. None: they are not divided."""
        ...

    def wake_us(self, until_us: int) -> int:
        """When an instance that has nothing to do before `until_us` looks again."""
        ...

    def stretch(self, step: Step) -> Stretch:
        """The ends of a step, and of as many of its repeats as one likes; each after the one before."""
        ...

    def ran(self, stretch: Stretch) -> None:
        """Of a stretch, this much was run."""
        ...

    def sampled(self, step: Step) -> Mapping[RequestId, Sampled] | None:
        """A token for each chunk that samples; None for placeholders, of a step without drafts."""
        ...


class Predicted:
    """A cost model's times. Tokens are placeholders that no other request shares, so no output is a prefix hit.

    Args:
        draft_time: of making drafts, before the step that verifies them.
        copy_time: of copies between tiers.
        store: that instances share.
        drafting_cost: prices steps with drafts, which no host plans ahead; without it `cost` does.
        page_time: of mapping pages of virtual KV.
        experts: divided among devices.
        hides_mapping: a step's pages are mapped while the one before it computes, as steps are planned ahead.

    Attributes:
        proposer: of drafts, if there is speculation.
        num_steps: steps run so far.
        num_extrapolated: those outside what the cost model was calibrated on.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        fast_forward: bool = True,
        proposer: SimulatedDrafts | None = None,
        draft_time: DraftTime | None = None,
        copy_time: CopyTime | None = None,
        store: SimulatedStore | None = None,
        drafting_cost: CostModel | None = None,
        page_time: PageTime | None = None,
        hides_mapping: bool = False,
        experts: ServedExperts | None = None,
    ) -> None:
        self._experts, self._loads = experts, None if experts is None else StepLoads(experts)
        self._page_time = page_time or PageTime()
        self._hides_mapping = hides_mapping
        # By instance: mapping beside a step may last longer than it, and the next mapping waits for that.
        self._mapper_free_us: dict[int, float] = {}
        self._cost, self._drafting_cost = cost, drafting_cost or cost
        self.proposer = proposer
        self._draft_time, self._copy_time = draft_time or DraftTime(), copy_time or CopyTime()
        self._store = store
        self._most_steps = _MOST_STEPS if fast_forward else 1
        self.num_steps = 0
        self.num_extrapolated = 0

    @property
    def extrapolated_frac(self) -> float:
        return self.num_extrapolated / self.num_steps if self.num_steps else 0.0

    def links(self, block_size: int) -> Links:
        return PricedLinks(self._copy_time, block_size, self._store)

    @property
    def has_store(self) -> bool:
        return self._store is not None

    def mover(self) -> Mover | None:
        return None if self._experts is None else SimulatedMover(self._experts)

    def wake_us(self, until_us: int) -> int:
        return until_us

    def stretch(self, step: Step) -> Stretch:
        batch, extra_us = batch_of_step(step), 0.0
        if self._loads is not None and self._experts is not None and step.experts is not None:
            load = self._loads.of(step, batch.num_tokens)
            step.expert_rows_LP, extra_us = load.rows_LP, load.extra_us
            until_us = step.repeats_until_us
            step.repeats_until_us = load.until_us if until_us is None else min(until_us, load.until_us)
            step.held_up_us = 0 if step.experts.activates is None else self._experts.activation_us
        stretch = self._priced(step, batch, extra_us)
        return stretch if step.repeats_until_us is None else stretch.until(step.repeats_until_us)

    def _priced(self, step: Step, batch: Batch, extra_us: float) -> Stretch:
        """As many repeats as one likes, each of them `extra_us` longer than its price."""
        num_steps = min(step.num_repeats + 1, self._most_steps)
        held_up_us = step.held_up_us or 0
        if num_steps == 1:
            cost = self._drafting_cost if step.drafts else self._cost
            us, is_extrapolated = cost.step(batch)[:2]
            if step.drafts:
                loads = draft_loads((d.method, d.num_asked) for d in step.drafts)
                draft_us = sum([self._draft_time.us(*load) for load in loads])
                step.draft_us = round(draft_us)
                us += draft_us
            us += self._mapping_us(step, us) + extra_us
            return Stretch((step.start_us + max(1, round(us)) + held_up_us,), (is_extrapolated,))
        if num_steps < _FEWEST_STEPS or step.others or self._maps(step):
            return self._one_by_one(step, batch, num_steps, extra_us)
        prices = self._cost.decode_steps(batch, num_steps)
        times = np.maximum(1, np.rint(prices.us + extra_us)).astype(np.int64)
        times[0] += step.start_us + held_up_us
        # As an array: the records keep it, and a list of integers takes five times the memory.
        return Stretch(array("q", times.cumsum().tobytes()), prices.is_extrapolated)

    def _one_by_one(self, step: Step, batch: Batch, num_steps: int, extra_us: float) -> Stretch:
        ends_us, are_extrapolated, now_us = array("q"), list[bool](), step.start_us + (step.held_up_us or 0)
        for ahead in range(num_steps):
            us, is_extrapolated = self._cost.step(batch.later(ahead))[:2]
            if ahead == 0:
                us += self._mapping_us(step, us)
            now_us += max(1, round(us + extra_us))
            ends_us.append(now_us)
            are_extrapolated.append(is_extrapolated)
        return Stretch(ends_us, tuple(are_extrapolated))

    def _maps(self, step: Step) -> bool:
        """Whether pages are moved for the step, or still for one before it."""
        if step.pages is None:
            return False
        return not step.pages.is_empty or self._mapper_free_us.get(step.instance, 0.0) > step.start_us

    def _mapping_us(self, step: Step, us: float) -> float:
        """What a step of `us` waits for pages; what is mapped beside it takes the mapper's time from when it starts."""
        pages = step.pages
        if pages is None or not self._maps(step):
            return 0.0
        time, free_us = self._page_time, self._mapper_free_us.get(step.instance, 0.0)
        # Whether or not it maps: what is being mapped may be a page that it enters.
        waited = max(0.0, free_us - step.start_us) + time.map_us(pages.maps)
        step.map_us = round(waited)
        beside = time.beside_us(pages)
        step.beside_us = round(beside)
        self._mapper_free_us[step.instance] = max(free_us, step.start_us + waited) + beside
        return max(0.0, waited - us) if self._hides_mapping else waited

    def ran(self, stretch: Stretch) -> None:
        num_steps = len(stretch.ends_us)
        self.num_steps += num_steps
        if num_steps > 1:
            self.num_extrapolated += int(np.count_nonzero(stretch.is_extrapolated))
        else:
            self.num_extrapolated += bool(stretch.is_extrapolated[0])

    def sampled(self, step: Step) -> Mapping[RequestId, Sampled] | None:
        if not step.drafts:
            return None
        assert self.proposer is not None, f"step {step.index} has drafts that nobody made"
        kept = {d.id: self.proposer.num_kept(d.id) for d in step.drafts}
        tokens = {c.id: placeholder(c.id) for c in step.chunks if c.samples}
        return {i: Sampled(token, accepted=(token,) * kept.get(i, 0)) for i, token in tokens.items()}


def batch_of_step(step: Step) -> Batch:
    """What a cost model sees of a step."""
    decodes = step.decodes
    kv_tokens, max_kv_tokens = decodes.kv_tokens, decodes.max_kv_tokens
    num_decodes = num_logits = len(decodes.ids)
    graph_tokens = step.shape.num_tokens
    if not step.others:
        return Batch((), num_decodes, kv_tokens, max_kv_tokens, num_logits, graph_tokens)
    prefills: list[Chunk] = []
    num_logits += sum([len(d.token_ids) for d in step.drafts])
    for _, num_tokens, num_computed, samples in step.others:
        num_logits += samples
        if num_tokens > 1:
            prefills.append(Chunk(num_tokens, num_computed))
        else:
            num_decodes += 1
            kv_tokens += num_computed
            max_kv_tokens = max(max_kv_tokens, num_computed)
    return Batch(tuple(prefills), num_decodes, kv_tokens, max_kv_tokens, num_logits, graph_tokens)


class Instance:
    """The process and what it is doing.

    Args:
        copies: between its tiers, if it has any.

    Attributes:
        stretch: steps under way; None between them.
    """

    def __init__(
        self,
        env: simpy.Environment,
        conversation: Conversation,
        timing: Timing,
        feed: Feed,
        *,
        copies: SimulatedCopies | None = None,
        index: int = 0,
    ) -> None:
        self._env = env
        self._conversation = conversation
        self._timing = timing
        self._feed = feed
        self._copies = copies
        self._priority = FIRST_INSTANCE + index
        self._wake: simpy.Event | None = None
        self._step: Step | None = None
        self.stretch: Stretch | None = None
        self._process = env.process(self._run())

    def notice(self) -> None:
        """Something has come: wake up, or end the stretch with the step that is under way."""
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None
        elif self.stretch is not None and len(self.stretch.ends_us) > 1:
            cut = self.stretch.until(int(self._env.now))
            if len(cut.ends_us) < len(self.stretch.ends_us):
                self.stretch = cut
                self._process.interrupt()

    @property
    def started_us(self) -> int:
        """Start of the stretch under way, or now."""
        return int(self._env.now) if self.stretch is None or self._step is None else self._step.start_us

    def num_steps_over(self) -> int:
        """Of the stretch under way, the steps that ended before now."""
        return 0 if self.stretch is None else bisect.bisect_left(self.stretch.ends_us, self._env.now)

    def stop(self) -> None:
        """The instance fails: steps that are over are completed, the one under way never was."""
        num_over = self.num_steps_over()
        if num_over:
            assert self.stretch is not None, "steps are over and there were none"
            assert self._step is not None, "steps are over and there were none"
            done = Stretch(self.stretch.ends_us[:num_over], self.stretch.is_extrapolated[:num_over])
            self._timing.ran(done)
            self._conversation.send(Completion(done.ends_us, self._timing.sampled(self._step)))
        self._conversation.close()
        if self._copies is not None:
            self._copies.stop()
        self.stretch = self._wake = None
        if self._process.is_alive:
            self._process.interrupt()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        """One event per stretch and one per idle gap; `env.now` is in integer microseconds."""
        env, conversation, timing = self._env, self._conversation, self._timing
        try:
            command = next(conversation)
            while True:
                if isinstance(command, Idle):
                    try:
                        yield self._something(command.until_us)
                    except simpy.Interrupt:
                        return  # it failed
                    command = conversation.send(Woke(int(env.now), self._copied()))
                    continue
                stretch = timing.stretch(command)
                if len(stretch.ends_us) > 1 and (next_us := self._next_us()) is not None:
                    stretch = stretch.until(next_us)
                self._begin(command, stretch)
                while True:
                    try:
                        yield at(env, stretch.ends_us[-1], self._priority)
                        break
                    except simpy.Interrupt:
                        if self.stretch is None:
                            return  # it failed
                        stretch = self.stretch  # it is shorter now
                self.stretch = None
                timing.ran(stretch)
                command = conversation.send(Completion(stretch.ends_us, timing.sampled(command), copied=self._copied()))
        except StopIteration:
            return

    def _begin(self, step: Step, stretch: Stretch) -> None:
        # Not where it is called: a type checker would take `stretch` for set until that function itself clears it, and
        # `stop` clears it while that one waits. Compiled code believes the type checker.
        self._step, self.stretch = step, stretch

    def _something(self, until_us: int | None) -> simpy.Event:
        """What an idle instance waits for."""
        looks_us = None if until_us is None else self._timing.wake_us(until_us)
        copied_us = None if self._copies is None else self._copies.next_us
        known = [us for us in (looks_us, copied_us) if us is not None]
        if until_us is not None:
            return at(self._env, min(known), self._priority)
        self._wake = wake = self._env.event()
        if known:
            in_time = at(self._env, min(known), self._priority)
            assert in_time.callbacks is not None, "an event that is new"
            in_time.callbacks.append(lambda _: self.notice() if self._wake is wake else None)
        return wake

    def _next_us(self) -> int | None:
        """When something will happen, as far as is known."""
        copied_us = None if self._copies is None else self._copies.next_us
        return min((us for us in (self._feed.next_us, copied_us) if us is not None), default=None)

    def _copied(self) -> Sequence[CopyEnd]:
        return NO_COPIES if self._copies is None else self._copies.over()


def at(env: simpy.Environment, when_us: int, priority: int) -> simpy.Event:
    """An event at a time; of several at one time, lower priorities come first."""
    event = simpy.Event(env)
    event._ok, event._value = True, None  # as simpy.Timeout does, which knows no priorities
    delay_us: Any = when_us - env.now
    order: Any = priority
    env.schedule(event, order, delay_us)
    return event
