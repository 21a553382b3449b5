"""Virtual KV in the control loop: whoever computes sees its own blocks, and nothing that is in use is moved."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import VOCAB_SIZE, is_repeatable, obey_the_laws
from tests.policies.pages_sins import ReclaimsNothing, TakesFromTheLiving, TooFarAhead, WildPages
from tests.small_runs import (
    STEP_TIME,
    CoinFlips,
    EqualSteps,
    StoppingSteps,
    WildDrafts,
    batch_policies,
    busy_workloads,
    instance_config,
    request,
    tight_configs,
)
from xllm_lab.drafting import Drafting
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.api import BatchPolicy, RequestId, ceil_div
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.catalog import knobs, make_policy, policies
from xllm_lab.policies.pages import PagesPolicy
from xllm_lab.policies.pages.next_page import NextPage
from xllm_lab.policies.pages.on_demand import ON_DEMAND, OnDemand
from xllm_lab.policies.pages.xllm_pool import XllmPool
from xllm_lab.records import Records, page_runs
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import Completion, Idle, Woke, WorkloadFeed, serve
from xllm_lab.sim.drafts import SimulatedDrafts
from xllm_lab.step import PageRun, Step
from xllm_lab.virtual_kv import VirtualKv, virtual_kv_of
from xllm_lab.workload import Workload, prompt_token_ids

Place = tuple[int, int]  # slot and page


class Mapping:
    """What the pages of slots show, as a device would have it that does as it is told, the moment it is told."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.shown: dict[Place, int] = {}
        self.in_use: dict[int, set[Place]] = {}  # by the steps that are under way
        self.num_mapped = 0

    def launch(self, step: Step) -> None:
        pages, busy = step.pages, set[Place]().union(*self.in_use.values())
        assert pages is not None, "virtual KV, and a step says nothing of it"
        self.map(pages.maps, busy)
        self.in_use[step.index] = self.read(step)
        self.map(pages.ahead, busy | self.in_use[step.index])
        for run in pages.unmaps:
            for place in places(run):
                assert place not in busy | self.in_use[step.index], f"{place} is unmapped under somebody who reads it"
                del self.shown[place]
        assert pages.mapped_tokens == len(self.shown) * self.scheduler.config.block_size, "mapped pages are miscounted"
        assert pages.kv_tokens <= pages.table_tokens <= pages.mapped_tokens, "more is there than there is room"

    def map(self, runs: tuple[PageRun, ...], busy: set[Place]) -> None:
        for run in runs:
            for k, place in enumerate(places(run)):
                assert place not in busy, f"{place} is mapped anew under somebody who reads it"
                assert self.shown.get(place) != run.block + k, f"{place} is mapped to what it shows already"
                self.shown[place] = run.block + k
                self.num_mapped += 1

    def read(self, step: Step) -> set[Place]:
        """The pages that a step reads and writes; each shows its request's block."""
        assert self.scheduler.pages is not None, "asserted above"
        read: set[Place] = set()
        for chunk in step.chunks:
            slot, table = self.scheduler.pages.slots.slot(chunk.id), self.scheduler.ledger.block_table(chunk.id)
            num_pages = ceil_div(chunk.num_computed_tokens + chunk.num_tokens, self.scheduler.config.block_size)
            for page, block in enumerate(table[:num_pages]):
                assert self.shown.get((slot, page)) == block, f"request {chunk.id} does not see block {block}"
                read.add((slot, page))
        return read


def places(run: PageRun) -> list[Place]:
    return [(run.slot, run.page + k) for k in range(run.num_pages)]


def run_mapped(
    workload: Workload,
    config: InstanceConfig,
    policy: BatchPolicy,
    pages: PagesPolicy,
    timing: EqualSteps | None = None,
    *,
    drafts: bool = False,
) -> tuple[Records, VirtualKv, Mapping]:
    """A run by hand, its mapping made as its steps are launched, slots audited before each step and in the end."""
    timing, records, drafting = timing or EqualSteps(), Records(), None
    if drafts:
        proposer = SimulatedDrafts(CoinFlips())
        timing, drafting = replace(timing, proposer=proposer), Drafting(WildDrafts(), proposer, step_time=STEP_TIME)
    kv = VirtualKv(pages, config)
    scheduler = Scheduler(config, policy, records, step_time=STEP_TIME, drafting=drafting, pages=kv)
    mapping = Mapping(scheduler)
    feed = WorkloadFeed(workload)
    conversation = serve(
        scheduler,
        feed,
        lambda r: prompt_token_ids(r, vocab_size=VOCAB_SIZE, seed=workload.seed),
        launch=mapping.launch,
    )
    answer: Completion | Woke | None = None
    while True:
        try:
            command = conversation.send(answer)  # type: ignore[arg-type]
        except StopIteration:
            break
        if isinstance(command, Idle):
            assert command.until_us is not None, "a workload says when its next request comes"
            answer = Woke(timing.wake_us(command.until_us))
        else:
            answer = Completion(timing.stretch(command).ends_us[:1], timing.sampled(command))
            mapping.in_use.pop(command.index)
    kv.slots.audit({})
    assert not mapping.in_use, "a step that was launched never ended"
    assert kv.slots.num_mapped == len(mapping.shown), "a page is lost"
    return records.sort(), kv, mapping


configs = st.builds(
    replace, tight_configs(), async_scheduling=st.sampled_from(ASYNC_SCHEDULING), kv_layout=st.just("virtual")
)


@st.composite
def pages_policies(draw: st.DrawFn) -> PagesPolicy:
    """Any catalogued one with any values of its knobs, and the wild one."""
    name = draw(st.sampled_from((*sorted(policies("pages")), "wild")))
    if name == "wild":
        return WildPages(seed=draw(st.integers(0, 9)))
    found = knobs(policies("pages")[name])
    made: PagesPolicy = make_policy(
        "pages",
        name,
        {field: draw(st.integers(int(k.low), min(20, int(k.high)))) for field, k in found.items()},  # type: ignore[union-attr]
    )
    return made


@given(
    busy_workloads(),
    configs,
    batch_policies(),
    pages_policies(),
    st.sampled_from([(t, d) for t in (EqualSteps(), StoppingSteps()) for d in (False, True)]),
)
def test_whoever_computes_sees_its_own_blocks(
    workload: Workload,
    config: InstanceConfig,
    policy: BatchPolicy,
    pages: PagesPolicy,
    answers: tuple[EqualSteps, bool],
) -> None:
    """Chunks, preemptions, prefix hits, drafts, clients that leave, and steps planned ahead, all at once.

    And no page is moved that a step under way reads or writes: mapping waits for nobody.
    """
    timing, drafts = answers
    records, kv, mapping = run_mapped(workload, config, policy, pages, timing, drafts=drafts)
    obey_the_laws(workload, config, records)
    assert mapping.num_mapped == kv.counts.mapped + kv.counts.ahead
    assert mapping.num_mapped >= kv.counts.unmapped + kv.slots.num_mapped
    is_repeatable(lambda: run_mapped(workload, config, policy, pages, timing, drafts=drafts)[0])


@given(busy_workloads(), configs, batch_policies(), pages_policies(), st.booleans())
def test_the_layout_changes_no_decision(
    workload: Workload, config: InstanceConfig, policy: BatchPolicy, pages: PagesPolicy, drafts: bool
) -> None:
    """Pages are found for what was decided; nothing is decided for pages."""
    paged, layout = Records(), replace(config, kv_layout="paged")
    virtual, _, _ = run_mapped(workload, config, policy, pages, drafts=drafts)
    paged = _run_paged(workload, layout, policy, drafts=drafts)
    assert virtual.requests == paged.requests
    assert [_plain(s) for s in virtual.steps] == [_plain(s) for s in paged.steps]


@given(busy_workloads(), configs, pages_policies())
def test_records_tell_the_mapping(workload: Workload, config: InstanceConfig, pages: PagesPolicy) -> None:
    """Whoever has them knows which page of which slot showed which block in any step."""
    records, _, mapping = run_mapped(workload, config, DecodeFirst(), pages)
    shown: dict[Place, int] = {}
    for step in records.steps:
        for run in (*page_runs(step.page_maps), *page_runs(step.page_maps_ahead)):
            shown.update({place: run.block + k for k, place in enumerate(places(run))})
        for run in page_runs(step.page_unmaps):
            for place in places(run):
                del shown[place]
        assert step.mapped_tokens == len(shown) * config.block_size
    assert shown == mapping.shown


def _plain(step: object) -> object:
    return replace(  # type: ignore[type-var]
        step,
        page_maps=[],
        page_maps_ahead=[],
        page_unmaps=[],
        num_reused_pages=None,
        mapped_tokens=None,
        table_tokens=None,
        kv_tokens=None,
    )


def _run_paged(workload: Workload, config: InstanceConfig, policy: BatchPolicy, *, drafts: bool) -> Records:
    from tests.small_runs import run_audited

    return run_audited(workload, config, policy, draft=WildDrafts() if drafts else None)


ROOMY = instance_config(num_kv_blocks=64, block_size=4, kv_layout="virtual", enable_prefix_cache=False)


def test_a_request_after_another_maps_nothing() -> None:
    """It gets the same blocks in the same order, and the slot that shows them."""
    work = Workload(requests=(request(0, prompt=13, output=6), request(1, 10**6, prompt=13, output=6)))
    _, kept, _ = run_mapped(work, ROOMY, DecodeFirst(), NextPage())
    assert (kept.counts.mapped, kept.counts.ahead, kept.counts.reused) == (4, 1, 5)


def test_on_demand_unmaps_what_nobody_uses() -> None:
    """Unless somebody who comes in the very next step wants it."""
    others = (request(1, prompt=13, output=6), request(2, prompt=1, output=40))
    work = Workload(requests=(request(0, 200, prompt=13, output=6), *others))
    records, kv, _ = run_mapped(work, ROOMY, DecodeFirst(), OnDemand())
    assert (kv.counts.ahead, kv.counts.hit, kv.counts.reused) == (0, 0, 0)
    assert all(s.mapped_tokens == s.table_tokens for s in records.steps)


def test_pages_entered_alone_are_all_mapped_ahead() -> None:
    """Nothing comes between the guess and the step, so every guess is right."""
    work = Workload(requests=(request(0, prompt=4, output=41),))
    records, kv, _ = run_mapped(work, ROOMY, DecodeFirst(), NextPage())
    assert (kv.counts.mapped, kv.counts.ahead, kv.counts.hit) == (1, 10, 10)
    assert [sum(s.page_maps[3::4]) for s in records.steps] == [1] + [0] * 40


def test_a_prefix_is_mapped_wherever_it_is_shared() -> None:
    """One block, two ranges; xLLM turns the prefix cache off instead."""
    work = Workload(requests=tuple(request(i, i * 10**6, prompt=9, output=9, hashes=(7, 8, i)) for i in range(2)))
    config = replace(ROOMY, enable_prefix_cache=True)
    records, _, mapping = run_mapped(work, config, DecodeFirst(), NextPage(most_kept_pages=0))
    assert [r.cached_tokens for r in records.requests] == [0, 8]
    assert mapping.num_mapped > 0


def test_the_pool_keeps_as_many_pages_as_it_may() -> None:
    ending = tuple(request(i, prompt=20, output=3) for i in range(6))
    work = Workload(requests=(*ending, request(9, prompt=1, output=60)))
    policy = XllmPool(min_reserved_pages=0, max_reserved_pages=7)
    records, kv, _ = run_mapped(work, ROOMY, DecodeFirst(), policy)
    last = records.steps[-1]
    assert last.mapped_tokens is not None
    assert last.table_tokens is not None
    assert last.mapped_tokens - last.table_tokens == 7 * 4
    assert kv.counts.unmapped > 0


def test_runs_of_pages_are_as_long_as_can_be() -> None:
    """A prompt on blocks that lie one behind the other is mapped in one go."""
    work = Workload(requests=(request(0, prompt=40, output=1),))
    records, _, _ = run_mapped(work, replace(ROOMY, max_tokens_per_batch=40), DecodeFirst(), ON_DEMAND)
    assert records.steps[0].page_maps == [0, 0, 0, 10]


def test_what_a_run_did_with_pages_is_in_its_summary() -> None:
    work = Workload(requests=tuple(request(i, i * 3, prompt=9, output=12) for i in range(4)))
    records, _, _ = run_mapped(work, ROOMY, DecodeFirst(), NextPage())
    told = summarize(records)
    assert told.unused_page_frac is not None
    assert told.unfilled_page_frac is not None
    assert 0 < told.unused_page_frac < 1
    assert 0 < told.unfilled_page_frac < 1
    assert told.map_frac == 0
    assert summarize(_run_paged(work, replace(ROOMY, kv_layout="paged"), DecodeFirst(), drafts=False)).map_frac is None


@pytest.mark.parametrize("sinner", [TooFarAhead(), TakesFromTheLiving()])
def test_an_illegal_plan_is_refused(sinner: PagesPolicy) -> None:
    work = Workload(requests=(request(0, prompt=4, output=4),))
    with pytest.raises(PolicyError, match="pages policy"):
        run_mapped(work, ROOMY, DecodeFirst(), sinner)


def test_reclaiming_nothing_is_refused() -> None:
    work = Workload(requests=(request(0, prompt=4, output=1), request(1, prompt=4, output=4)))
    with pytest.raises(PolicyError, match="reclaims all but 1 pages of slot 0, which has 1"):
        run_mapped(work, ROOMY, DecodeFirst(), ReclaimsNothing())


def test_a_policy_that_nobody_would_ask_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_layout 'paged' maps no pages"):
        virtual_kv_of(NextPage(), instance_config())
    assert virtual_kv_of(ON_DEMAND, instance_config()) is None


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_layout is 'flat', accepted: paged, virtual"):
        instance_config(kv_layout="flat")


def test_ids_are_found_in_their_slots() -> None:
    """Slots of requests that run are never shared."""
    work = Workload(requests=tuple(request(i, prompt=5, output=9) for i in range(5)))
    records, kv, _ = run_mapped(work, ROOMY, DecodeFirst(), WildPages())
    assert len(records.requests) == 5
    taken = Counter(kv.slots.num_table_pages(RequestId(i)) for i in range(5))
    assert taken == {0: 5}
