"""Runs small enough to follow by hand, and Hypothesis strategies for ones that are not: every request kind, tight KV.

A step lasts `STEP_US` unless a test says otherwise, so that a story can name its times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from hypothesis import strategies as st

from tests.laws import VOCAB_SIZE
from xllm_lab.copies import Copy, CopyEnd
from xllm_lab.copy_time import KINDS, CopyTime, CopyWeights
from xllm_lab.drafting import Drafting
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPlan, BatchPolicy, BatchView, Choice, Knob, ceil_div
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache import CachePlan, CachePolicy, CacheView, Copies, waiting_key
from xllm_lab.policies.cache.device_only import DEVICE_ONLY
from xllm_lab.policies.catalog import knobs, make_policy, policies
from xllm_lab.policies.draft import DraftPlan, DraftPolicy, DraftView, Room, drafting_key
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.rebalancing import Mover
from xllm_lab.records import Records, RequestRecord
from xllm_lab.scheduler import Sampled, Scheduler
from xllm_lab.serving import Completion, Idle, Woke, WorkloadFeed, serve
from xllm_lab.sim.copies import Links, PricedLinks
from xllm_lab.sim.drafts import Acceptance, SimulatedDrafts
from xllm_lab.sim.instance import Stretch
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.sim.store import SimulatedStore
from xllm_lab.step import Step
from xllm_lab.step_shape import shapes_of
from xllm_lab.step_time import TERMS, StepTime
from xllm_lab.tiering_of import tiering_of
from xllm_lab.workload import ClosedLoop, Priority, Prompt, Request, RequestId, Slo, Workload, prompt_token_ids

STEP_US = 10
NEVER = 2**62
# All that copy between tiers, as they come.
TIERED = tuple(make_policy("cache", name) for name in policies("cache") if name != "device-only")
# 5 us a step, 1 us a token, 1/100 us per token in KV.
STEP_TIME = StepTime(tuple({"eager_us": 5.0, "token_us": 1.0, "kv_read_us": 0.01}.get(t, 0.0) for t in TERMS))
# Half a step, and 1 us a token, each way.
COPY_TIME = CopyTime(dict.fromkeys(KINDS, CopyWeights(5.0, 1.0)))


@dataclass(frozen=True)
class EqualSteps:
    """Every step takes as long; every token is the request's own placeholder."""

    step_us: int = STEP_US
    proposer: SimulatedDrafts | None = None

    def wake_us(self, until_us: int) -> int:
        return until_us

    def links(self, block_size: int) -> Links:
        return PricedLinks(COPY_TIME, block_size)

    @property
    def has_store(self) -> bool:
        return False

    def mover(self) -> Mover | None:
        return None

    def end_us(self, step: Step) -> int:
        return step.start_us + self.step_us

    def stretch(self, step: Step) -> Stretch:
        return Stretch((self.end_us(step),), (False,))

    def ran(self, stretch: Stretch) -> None:
        """Nothing to count."""

    def sampled(self, step: Step) -> Mapping[RequestId, Sampled] | None:
        return {c.id: Sampled(-1 - c.id, accepted=self.kept(step, c.id)) for c in step.chunks if c.samples}

    def kept(self, step: Step, request: RequestId) -> tuple[int, ...]:
        """Drafts of a request that are."""
        if self.proposer is None or request not in {d.id for d in step.drafts}:
            return ()
        return (-1 - request,) * self.proposer.num_kept(request)


class CoinFlips:
    """An acceptance process of coins that depend on request and position, and on nothing else."""

    methods = ("ngram", "mtp")

    def outcome(self, request: Request, method: str, position: int, depth: int) -> tuple[int, int]:
        coin = (7 * request.id + 3 * position + len(method)) % 11
        drafted = min(depth, coin)
        return drafted, min(drafted, coin % 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class WildDrafts:
    """Asks for whatever fits, of everybody something else: a draft policy to find what the scheduler gets wrong."""

    decides: ClassVar[str] = "draft"

    def decide(self, view: DraftView) -> DraftPlan:
        room = Room(view)
        for one in sorted(view.decoding, key=drafting_key):
            depth = (5 * one.id + one.num_tokens) % 7
            if depth:
                room.grant(one, sorted(view.methods)[one.num_tokens % 2], depth)
        return room.plan("wild")


@dataclass(frozen=True, slots=True, kw_only=True)
class WildCache:
    """Copies whatever it may, to and fro: a cache policy to find what the tiers get wrong."""

    decides: ClassVar[str] = "cache"

    host_blocks_factor: float = 0.5

    def decide(self, view: CacheView) -> CachePlan:
        copies = Copies(view)
        copies.save(b for b in view.unsaved() if (b.id + view.now_us) % 2)
        idle = [b for b in view.idle() if (b.depth + b.num_uses + view.now_us) % 3]
        copies.offload(idle, lambda b: ((7 * b.id) % 5, b.id))
        waiting = sorted(view.waiting, key=waiting_key)
        for one in waiting:
            if one.num_unasked_blocks and (one.id + view.now_us) % 3:
                copies.prefetch(one, 1 + (one.id + view.now_us) % one.num_unasked_blocks, 1 + 13 * one.id)
        for one in waiting:
            if copies.is_prefetching(one):
                copies.restore(one, 0)
            elif one.num_host_blocks and (one.id + view.now_us) % 4:
                copies.restore(one, 1 + (one.id + view.now_us) % one.num_host_blocks)
        return copies.plan("wild")


class StoppingSteps(EqualSteps):
    """As `EqualSteps`, with lengths that vary, and each third token of an odd request is a stop token."""

    def end_us(self, step: Step) -> int:
        return step.start_us + 1 + sum(c.num_tokens for c in step.chunks)

    def sampled(self, step: Step) -> Mapping[RequestId, Sampled]:
        return {
            c.id: Sampled(
                7 + c.id,
                is_stop=c.id % 2 == 1 and (c.num_computed_tokens + c.num_tokens) % 3 == 0,
                accepted=self.kept(step, c.id),
            )
            for c in step.chunks
            if c.samples
        }


def request(
    request_id: int,
    arrival_us: int = 0,
    *,
    prompt: int = 4,
    output: int = 2,
    cancel_us: int | None = None,
    hashes: tuple[int, ...] = (),
    priority: Priority = Priority.NORMAL,
    slo: Slo | None = None,
) -> Request:
    """A request in one line; `hashes` name its blocks of four tokens."""
    return Request(
        id=RequestId(request_id),
        arrival_us=arrival_us,
        prompt=Prompt(num_tokens=prompt, block_hashes=hashes, hash_block_tokens=4),
        output_tokens=output,
        cancel_us=cancel_us,
        priority=priority,
        slo=slo or Slo(),
    )


def instance_config(**changes: Any) -> InstanceConfig:
    """Blocks of four tokens and room for sixteen of them, unless a test says otherwise."""
    few: dict[str, Any] = {"max_tokens_per_batch": 16, "max_seqs_per_batch": 4, "block_size": 4, "num_kv_blocks": 16}
    return InstanceConfig(**{**few, **changes})


def run(workload: Workload, config: InstanceConfig, policy: BatchPolicy, timing: EqualSteps | None = None) -> Records:
    """Records of the workload served in simulated time."""
    return run_simulation(
        workload, config, Policies(policy), timing or EqualSteps(), vocab_size=VOCAB_SIZE, step_time=STEP_TIME
    )


def run_audited(
    workload: Workload,
    config: InstanceConfig,
    policy: BatchPolicy,
    timing: EqualSteps | None = None,
    *,
    draft: DraftPolicy | None = None,
    acceptance: Acceptance | None = None,
    shapes: ShapesPolicy = EAGER,
    cache: CachePolicy = DEVICE_ONLY,
    store: SimulatedStore | None = None,
) -> Records:
    """As `run`, by hand, with the ledger audited before each step and all its blocks free in the end."""
    timing, records = timing or EqualSteps(), Records()
    drafting = None
    if draft is not None:
        proposer = SimulatedDrafts(acceptance or CoinFlips())
        timing = replace(timing, proposer=proposer)
        drafting = Drafting(draft, proposer, step_time=STEP_TIME)
    copier = HandCopier(config.block_size, store)
    scheduler = Scheduler(
        *(config, policy, records),
        step_time=STEP_TIME,
        shapes=shapes_of(shapes, config),
        drafting=drafting,
        tiering=tiering_of(cache, config, copier, step_time=STEP_TIME, copy_time=COPY_TIME),
    )
    conversation = serve(
        scheduler,
        WorkloadFeed(workload),
        lambda r: prompt_token_ids(r, vocab_size=VOCAB_SIZE, seed=workload.seed),
    )
    answer: Completion | Woke | None = None
    while True:
        try:
            # A generator is started by sending it None.
            command = conversation.send(answer)  # type: ignore[arg-type]
        except StopIteration:
            break
        scheduler.ledger.audit()
        if scheduler.tiering is not None:
            scheduler.tiering.audit()
        if isinstance(command, Idle):
            known = [us for us in (command.until_us, copier.next_us) if us is not None]
            now_us = timing.wake_us(min(known))
            answer = Woke(now_us, copier.over(now_us))
        else:
            ends_us = timing.stretch(command).ends_us
            answer = Completion(ends_us, timing.sampled(command), copied=copier.over(ends_us[-1]))
    scheduler.copied(copier.over(NEVER))
    scheduler.ledger.audit()
    assert scheduler.num_live == 0, f"{scheduler.num_live} requests are live after the end"
    assert scheduler.ledger.num_used_blocks == 0, f"{scheduler.ledger.num_used_blocks} blocks are in use after the end"
    return records.sort()


class HandCopier:
    """Copies that take `COPY_TIME`, by hand."""

    def __init__(self, block_size: int, store: SimulatedStore | None = None) -> None:
        self._links, self._under_way = PricedLinks(COPY_TIME, block_size, store), list[CopyEnd]()
        self.has_store = store is not None

    @property
    def next_us(self) -> int | None:
        return min((end.end_us for end in self._under_way), default=None)

    def launch(self, copy: Copy) -> None:
        self._under_way.append(self._links.end_of(copy, copy.asked_us))

    def over(self, now_us: int) -> list[CopyEnd]:
        ends = sorted((e for e in self._under_way if e.end_us <= now_us), key=lambda e: (e.end_us, e.number))
        self._under_way = [e for e in self._under_way if e.end_us > now_us]
        return ends


class HandDriven:
    """A host of a few lines: one call, one step of `STEP_US`; outputs are the request's own placeholder."""

    def __init__(
        self,
        config: InstanceConfig,
        policy: BatchPolicy,
        *,
        step_time: StepTime = STEP_TIME,
        cache: CachePolicy = DEVICE_ONLY,
    ) -> None:
        self.records, self._copier = Records(), HandCopier(config.block_size)
        tiering = tiering_of(cache, config, self._copier, step_time=step_time, copy_time=COPY_TIME)
        self.scheduler = Scheduler(config, policy, self.records, step_time=step_time, tiering=tiering)
        self.now_us = 0

    def add(self, *requests: Request) -> None:
        """They arrive now, whatever they say."""
        for one in requests:
            prompt_ids = prompt_token_ids(one, vocab_size=VOCAB_SIZE, seed=0)
            self.scheduler.add(one.at(self.now_us), prompt_ids, self.now_us)

    def plan(self) -> Step | None:
        """The next step, under way."""
        step = self.scheduler.plan(self.now_us)
        if step is not None:
            self.scheduler.start(step, self.now_us)
        return step

    def finish(self, step: Step) -> None:
        """The step has run."""
        self.now_us = step.start_us + STEP_US
        self.scheduler.complete(step, (self.now_us,), EqualSteps().sampled(step))

    def step(self) -> dict[int, int]:
        """Run one step, or wait for a copy; tokens per request, empty if nothing can run."""
        step = self.plan()
        if step is None:
            self.now_us = max(self.now_us, self._copier.next_us or 0)
        else:
            self.finish(step)
        self.scheduler.copied(self._copier.over(self.now_us))
        if step is None:
            return {}
        return {int(c.id): c.num_tokens for c in step.chunks}

    def record(self, request_id: int) -> RequestRecord:
        """Of a request that ended."""
        return next(r for r in self.records.requests if r.id == request_id)


def plan_of(
    tokens: dict[int, int], preempt: tuple[int, ...] = (), *, decode_all: bool = False, holds_for: int = 0
) -> BatchPlan:
    return BatchPlan(
        tokens={RequestId(i): n for i, n in tokens.items()},
        decode_all=decode_all,
        preempt=tuple(map(RequestId, preempt)),
        holds_for=holds_for,
        reason="as told",
    )


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """Plans what it is told, step by step; whatever is missing and fits when the script is over."""

    decides: ClassVar[str] = "batch"
    script: list[BatchPlan] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)

    def decide(self, view: BatchView) -> BatchPlan:
        self.seen.append(picture(view))
        return self.script.pop(0) if self.script else Fcfs().decide(view)


def picture(view: BatchView) -> dict[str, Any]:
    """What a view shows, detached from the live objects."""
    return {
        "now_us": view.now_us,
        "free": view.num_free_blocks,
        "running": [(r.id, r.num_tokens, r.num_computed_tokens, r.num_blocks) for r in view.running],
        "waiting": [(r.id, r.num_tokens, r.num_computed_tokens, r.num_idle_blocks) for r in view.waiting],
    }


@st.composite
def busy_workloads(draw: st.DrawFn) -> Workload:
    """Crowded arrivals, shared prefixes, impatient clients, promises, requests too large to run; open or closed."""
    # Left to choose, Hypothesis prefers workloads too small for anything to happen.
    ids = draw(st.sets(st.integers(0, 40), min_size=draw(st.integers(1, 9)), max_size=10).map(sorted))
    loops = st.builds(ClosedLoop, num_clients=st.integers(1, 6), think_us=st.sampled_from((0, 7, 100)))
    return Workload(
        requests=tuple(draw(_busy_requests(i)) for i in ids),
        closed_loop=draw(st.none() | st.none() | loops),
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def tight_configs(draw: st.DrawFn) -> InstanceConfig:
    """Budgets so small that chunking, preemption and eviction are the rule, and a few requests can never run."""
    block_size = draw(st.sampled_from((1, 2, 4, 8)))
    return InstanceConfig(
        max_tokens_per_batch=draw(st.sampled_from((60, 25, 12, 5, 1))),
        max_seqs_per_batch=draw(st.sampled_from((8, 5, 3, 1))),
        block_size=block_size,
        num_kv_blocks=ceil_div(draw(st.integers(45, 100)), block_size),
        enable_prefix_cache=draw(st.sampled_from((True, True, False))),
        max_model_len=draw(st.sampled_from((8192, 8192, 50))),
    )


@st.composite
def batch_policies(draw: st.DrawFn) -> BatchPolicy:
    """Any catalogued policy with any values of its knobs."""
    policy: BatchPolicy = draw(values_of_knobs("batch", draw(st.sampled_from(sorted(policies("batch"))))))
    return policy


@st.composite
def values_of_knobs(draw: st.DrawFn, decides: str, name: str) -> Any:
    """A catalogued policy with any values of its knobs."""
    cls = policies(decides)[name]
    return make_policy(decides, name, {field: draw(_values(knob)) for field, knob in knobs(cls).items()})


@st.composite
def _busy_requests(draw: st.DrawFn, request_id: int) -> Request:
    arrival_us = draw(st.sampled_from((0, 0, 0, 10, 35, 60, 500)))
    patience_us = draw(st.none() | st.none() | st.none() | st.sampled_from((0, 1, 10, 30, 95)))
    promise = st.none() | st.sampled_from((1, 30, 200))
    return request(
        request_id,
        arrival_us,
        prompt=draw(st.sampled_from((40, 33, 24, 17, 8, 1)) | st.integers(1, 40)),
        output=draw(st.sampled_from((12, 8, 3, 1))),
        cancel_us=None if patience_us is None else arrival_us + patience_us,
        hashes=draw(st.sampled_from((tuple(range(1, 11)), (1, 2, 3, 4), (1, 2), (5,), ()))),
        priority=draw(st.sampled_from(Priority)),
        slo=Slo(ttft_us=draw(promise), tpot_us=draw(promise)),
    )


def _values(knob: Knob | Choice) -> st.SearchStrategy[Any]:
    if isinstance(knob, Choice):
        return st.sampled_from(knob.values)
    if isinstance(knob.low, int) and isinstance(knob.high, int):
        return st.integers(1 if knob.low > 1 else knob.low, knob.high)
    return st.floats(knob.low, knob.high)
