"""KV tiers in the control loop: copies beside the steps lose nothing, whatever else happens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import is_repeatable, obey_the_laws
from tests.small_runs import (
    STEP_TIME,
    STEP_US,
    TIERED,
    EqualSteps,
    StoppingSteps,
    WildCache,
    WildDrafts,
    batch_policies,
    busy_workloads,
    instance_config,
    request,
    run_audited,
    tight_configs,
)
from xllm_lab.errors import ConfigError, PolicyError
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.batch.unified_slo import UnifiedSlo
from xllm_lab.policies.cache import CachePlan, CachePolicy, CacheView, Copies, WaitingView
from xllm_lab.policies.cache.cost_aware import CostAware
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.cache.restoring import everything, restore_by_arrival
from xllm_lab.policies.cache.reuse_aware import ReuseAware
from xllm_lab.policies.cache.watermark import Watermark
from xllm_lab.records import Records
from xllm_lab.sim.store import SimulatedStore
from xllm_lab.tiering_of import tiering_of
from xllm_lab.workload import Request, Slo, Workload


@given(
    busy_workloads(),
    st.builds(
        replace,
        tight_configs(),
        async_scheduling=st.sampled_from(ASYNC_SCHEDULING),
        enable_prefix_cache=st.just(True),
    ),
    batch_policies(),
    st.sampled_from((EqualSteps(), StoppingSteps())),
    st.sampled_from((WildCache(), WildCache(host_blocks_factor=4.0), *TIERED)),
)
def test_any_run_with_tiers_obeys_the_laws(
    workload: Workload,
    config: InstanceConfig,
    policy: BatchPolicy,
    timing: EqualSteps,
    cache: CachePolicy,
) -> None:
    """Chunks, preemptions, prefix hits, clients that leave, planning ahead, drafts and a store, all at once."""
    draft = WildDrafts() if workload.seed % 2 else None

    def served() -> Records:
        store = (None, SimulatedStore(), SimulatedStore(3))[workload.seed % 3]
        return run_audited(workload, config, policy, timing, cache=cache, draft=draft, store=store)

    records = served()
    obey_the_laws(workload, config, records)
    is_repeatable(served)


def conversation(config: InstanceConfig, cache: CachePolicy, *more: Request) -> Records:
    """A prompt of ten blocks, others that take its place on the device, and the prompt again."""
    hashes = tuple(range(10))
    first = request(0, 0, prompt=40, output=2, hashes=hashes)
    others = [request(k, 200 * k, prompt=60, output=2, hashes=(100 * k,)) for k in (1, 2)]
    again = request(3, 900, prompt=44, output=2, hashes=(*hashes, 11))
    return run_audited(Workload(requests=(first, *others, again, *more)), config, DecodeFirst(), cache=cache)


@pytest.mark.parametrize("cache", [Lru(), Watermark(low_frac=1.0), ReuseAware()], ids=lambda c: type(c).__name__)
def test_what_the_device_evicted_is_fetched_back(cache: CachePolicy) -> None:
    """Instead of computed: the last request computes what it alone has, and waits for one copy."""
    records = conversation(instance_config(max_tokens_per_batch=64), cache)
    last = records.requests[3]
    assert last.cached_tokens == 40
    (restored,) = [c for c in records.copies if c.kind == "restore"]
    assert (restored.request, restored.num_tokens) == (3, 40)
    assert restored.end_us == restored.asked_us + 5 + 40
    assert last.first_scheduled_us == restored.end_us


def test_what_two_wait_for_is_copied_once() -> None:
    """They come at once, and the device has nothing of the prompt that they share: the second follows the first."""
    config = instance_config(max_tokens_per_batch=64)
    later = request(4, 900, prompt=44, output=2, hashes=(*range(10), 12))
    records = conversation(config, Lru(), later)
    assert [(c.request, c.num_tokens) for c in records.copies if c.kind == "restore"] == [(3, 40)]
    assert [r.cached_tokens for r in records.requests[3:]] == [40, 40]


def test_what_costs_less_to_compute_is_not_copied() -> None:
    """Of a token, a copy takes as long as its computation, and 5 us more: it is fetched if the device is worth more."""
    config = instance_config(max_tokens_per_batch=16, num_kv_blocks=28)
    assert conversation(config, CostAware(device_cost=1.0)).copies == []
    restored = [c for c in conversation(config, CostAware(device_cost=4.0)).copies if c.kind == "restore"]
    assert [(c.request, c.num_tokens) for c in restored] == [(3, 40)]


def test_a_tier_that_nobody_could_use_is_refused() -> None:
    config = instance_config(num_kv_blocks=2)
    with pytest.raises(ConfigError, match=r"room for no block; accepted: a host_blocks_factor of at least 0\.5"):
        tiering_of(Lru(host_blocks_factor=0.3), config, None)
    with pytest.raises(ConfigError, match="enable_prefix_cache is false; accepted: true"):
        tiering_of(Lru(), replace(config, enable_prefix_cache=False), None)
    with pytest.raises(ConfigError, match="kv_layout is 'virtual', whose pages are not copied; accepted: 'paged'"):
        tiering_of(Lru(), replace(config, kv_layout="virtual"), None)
    with pytest.raises(ConfigError, match="needs step times, none are given"):
        tiering_of(CostAware(), config, None)
    with pytest.raises(ConfigError, match="needs copy times, none are given"):
        tiering_of(CostAware(), config, None, step_time=STEP_TIME)


def test_what_two_want_is_fetched_once() -> None:
    """In one plan: the second waits for the copy of the first, and then for one of what it alone has."""
    config = instance_config(max_tokens_per_batch=64)
    records = conversation(config, Lru(), request(4, 900, prompt=44, output=2, hashes=(*range(10), 12)))
    assert [(c.request, c.num_tokens) for c in records.copies if c.kind == "restore"] == [(3, 40)]
    assert [r.cached_tokens for r in records.requests[3:]] == [40, 40]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadsEarly:
    """Everything, up to a time; and fetches everything, always."""

    decides: ClassVar[str] = "cache"

    until_us: int
    host_blocks_factor: float = 4.0

    def decide(self, view: CacheView) -> CachePlan:
        copies = Copies(view)
        if view.now_us < self.until_us:
            copies.offload(view.idle())
        restore_by_arrival(view, copies, 64, everything)
        return copies.plan("early")


def test_a_restore_does_not_evict_what_another_counts_on() -> None:
    """Both in one plan: five blocks of the second are on the device, and would be the first to go."""
    first, second = tuple(range(8)), tuple(range(100, 106))
    requests = (
        request(0, 0, prompt=24, hashes=second),
        request(1, 200, prompt=32, hashes=first),
        request(2, 400, prompt=40, hashes=(200,)),  # in place of all of the second and the end of the first
        request(3, 900, prompt=28, hashes=(*second, 109)),
        request(4, 900, prompt=36, hashes=(*first, 9)),
    )
    config = instance_config(max_tokens_per_batch=64)
    records = run_audited(Workload(requests=requests), config, DecodeFirst(), cache=OffloadsEarly(until_us=400))
    assert [(c.request, c.num_tokens) for c in records.copies if c.kind == "restore"] == [(3, 24), (4, 12)]
    assert [r.cached_tokens for r in records.requests[3:]] == [24, 32]


@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
def test_a_token_that_is_there_is_not_lost_with_its_kv(mode: str) -> None:
    """A copy holds all that is free: the second request's next step is planned neither ahead nor when its first token
    is there. Then its KV is taken for a third that is late; the token stays.
    """
    config = instance_config(max_tokens_per_batch=64, num_kv_blocks=13, async_scheduling=mode)
    first = request(0, 0, prompt=41, output=1)  # leaves ten blocks to copy, for 45 us
    second = request(1, 5, prompt=12, output=3)
    third = request(2, 40, prompt=16, output=1, slo=Slo(ttft_us=1))
    work = Workload(requests=(first, second, third))
    records = run_audited(work, config, UnifiedSlo(), cache=OffloadsEarly(until_us=12))
    (copy,) = records.copies
    record = records.requests[1]
    assert copy.end_us == 55
    assert record.token_times_us[0] < third.arrival_us < copy.end_us
    (taken,) = [s for s in records.steps if record.id in s.preempted]
    assert taken.start_us == copy.end_us
    assert record.id in taken.admitted
    assert list(record.token_times_us[1:]) == [taken.end_us, taken.end_us + STEP_US]
    obey_the_laws(work, config, records)


@dataclass(frozen=True, slots=True, kw_only=True)
class InTurns:
    """Fetches for whoever has most to fetch, in place of what it fetched for the other."""

    decides: ClassVar[str] = "cache"

    host_blocks_factor: float = 4.0

    def decide(self, view: CacheView) -> CachePlan:
        copies = Copies(view)
        copies.offload(view.idle())
        if not view.num_restoring:
            next(filter(None, (copies.restore(r, 5) for r in sorted(view.waiting, key=most_hosted))), None)
        return copies.plan("in turns")


def most_hosted(request: WaitingView) -> tuple[int, int]:
    return -request.num_host_blocks, request.id


def test_a_cache_policy_that_copies_for_ever_is_refused() -> None:
    """Two prompts of eleven blocks are in the host but for their ends, and the device has thirteen: while five are on
    their way for one, there is no room for the other. Alone each is served.
    """
    config = instance_config(max_tokens_per_batch=64, num_kv_blocks=13)
    prompts = (tuple(range(10)), tuple(range(100, 110)))
    before = [request(k, 300 * k, prompt=40, output=1, hashes=hashes) for k, hashes in enumerate(prompts)]
    again = [request(2 + k, 3000, prompt=44, output=1, hashes=(*hashes, 10)) for k, hashes in enumerate(prompts)]
    with pytest.raises(PolicyError, match=r"in-turns leaves 2 requests .* request 2: from 3000 to \d+ us"):
        run_audited(Workload(requests=(*before, *again)), config, DecodeFirst(), cache=InTurns())
    small = Workload(requests=(*before, again[0]))
    obey_the_laws(small, config, run_audited(small, config, DecodeFirst(), cache=InTurns()))
