"""Every policy of the catalog keeps the contract, and every law of the contract can be broken."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from tests.policies import cache_sins, clock_sins, draft_sins, experts_sins, fleet_sins, shape_sins, sins
from xllm_lab import contract
from xllm_lab.contract import Policy, check_policy
from xllm_lab.drawn_cache_views import DrawnCacheView, drawn_cache_view
from xllm_lab.drawn_draft_views import drawn_draft_view
from xllm_lab.drawn_experts_views import drawn_experts_view
from xllm_lab.drawn_fleet_views import DrawnRouteView, drawn_failover_view, drawn_roles_view, drawn_route_view
from xllm_lab.drawn_shape_views import drawn_shape_view
from xllm_lab.drawn_views import DrawnView, drawn_view
from xllm_lab.errors import ConfigError
from xllm_lab.policies.api import BatchPlan, BatchView, Choice, Knob, ceil_div, num_missing_tokens
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache import recency
from xllm_lab.policies.catalog import decisions, knobs, make_policy, policies
from xllm_lab.policies.draft import RECENT_VERIFICATIONS
from xllm_lab.policies.experts.placement import by_device, num_copies
from xllm_lab.policies.roles import TAKE_OVER, TAKE_PROMPTS
from xllm_lab.policy_kinds import KINDS

NAMES = [(decides, name) for decides in decisions() for name in policies(decides)]
IN_PROCESS = (contract.legal, contract.repeatable, contract.order_free, contract.identity_free, contract.pure)


def test_every_decision_has_its_laws() -> None:
    """Whatever is in the catalog can be checked, and nothing is checked that nobody decides."""
    assert tuple(sorted(KINDS)) == decisions()


@pytest.mark.parametrize(("decides", "name"), NAMES)
def test_every_catalogued_policy_keeps_the_contract(decides: str, name: str) -> None:
    """With the values of its knobs that it comes with."""
    assert check_policy(make_policy(decides, name), num_views=100) == []


@pytest.mark.parametrize(("decides", "name"), NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_every_catalogued_policy_keeps_it_with_any_values(decides: str, name: str, seed: int) -> None:
    """A tuner will try them all."""
    rng = random.Random(f"{name} {seed}")
    values = {k: drawn(rng, knob) for k, knob in knobs(policies(decides)[name]).items()}
    policy = make_policy(decides, name, values)
    assert [s for law in IN_PROCESS for s in law(policy, 60)] == []
    if decides == "batch":
        assert contract.live(policy, 10) == []


@pytest.mark.parametrize("name", ["decode-first", "prefill-first"])
@pytest.mark.parametrize("budget_us", [1, 12, 40])
def test_time_budgets_keep_the_contract(name: str, budget_us: int) -> None:
    """However little time a step is given, somebody is served."""
    policy = make_policy("batch", name, {"max_ttft_us": budget_us, "max_tpot_us": budget_us})
    assert [s for law in IN_PROCESS for s in law(policy, 60)] == []
    assert contract.live(policy, 10) == []


SINS: dict[str, tuple[Policy, ...]] = {
    "legal": (
        *(sins.OverBudget(), sins.Idler(), sins.RunsIntoErrors()),
        *(fleet_sins.CountsFromNought(), fleet_sins.DividesByQueues(), fleet_sins.Shrugs()),
        fleet_sins.SendsAllToOneSide(),
        *(shape_sins.CutsTheStep(), shape_sins.PadsBeyondUse()),
        *(draft_sins.DraftsBeyondTheEnd(), draft_sins.TakesMtpForGranted(), draft_sins.DividesByDrafts()),
        *(cache_sins.OffloadsWhatIsUsed(), cache_sins.OffloadsTwice(), cache_sins.OffloadsAgain()),
        *(cache_sins.OffloadsWithoutRoom(), cache_sins.EvictsForNothing(), cache_sins.EvictsTooMuch()),
        *(cache_sins.EvictsTheUnknown(), cache_sins.EvictsTwice(), cache_sins.RestoresMoreThanThereIs()),
        *(cache_sins.RestoresForNobody(), cache_sins.RestoresNothing(), cache_sins.TakesMoreThanIsFree()),
        *(cache_sins.DividesByTheLink(), experts_sins.LosesTheColdest(), experts_sins.RunsIntoMissingWindows()),
    ),
    "repeatable": (
        *(sins.Remembers(), sins.SetOfObjects()),
        *(fleet_sins.Remembers(), fleet_sins.SetOfObjects(), fleet_sins.EverySecond()),
        fleet_sins.RemembersHalves(),
        *(shape_sins.Captures(), draft_sins.Alternates(), cache_sins.Alternates()),
    ),
    "order-free": (
        *(sins.NoTieBreak(), fleet_sins.NoTieBreak(), fleet_sins.FirstListedPrefills()),
        *(draft_sins.FirstListedFirst(), draft_sins.FirstListedMethod()),
        *(cache_sins.FirstListedFirst(), cache_sins.NoTieBreak(), experts_sins.FirstListedLayerOnly()),
    ),
    "identity-free": (
        *(sins.EvenIdsFirst(), draft_sins.TriesEveryThirdId(), cache_sins.EvenBlocksOnly()),
        *(fleet_sins.IdsByRemainder(), fleet_sins.RequestsByRemainder(), fleet_sins.EvenIds()),
        *(fleet_sins.OddIdsDoBoth(), experts_sins.SwapsOddLayers()),
    ),
    "pure": (
        *(sins.SortsTheView(), sins.MarksRequests()),
        *(fleet_sins.SortsTheView(), fleet_sins.CountsWhatItSends(), fleet_sins.CountsFailovers()),
        fleet_sins.WritesRoles(),
        *(shape_sins.PadsTheView(), draft_sins.ResetsTheCounts(), cache_sins.SortsTheView()),
        experts_sins.SwapsInPlace(),
    ),
    "clockless": (
        *(clock_sins.ReadsTheClock(), clock_sins.ThrowsDice(), clock_sins.ThrowsNumpyDice()),
        *(clock_sins.RoutesByDice(), clock_sins.FailsOverByTheClock()),
        *(draft_sins.ExploresByDice(), cache_sins.EvictsByDice()),
    ),
    "hash-free": (
        *(sins.SetOfNames(), fleet_sins.SetOfNames(), fleet_sins.HashesNames()),
        *(draft_sins.SetOfMethods(), cache_sins.SetOfNames()),
    ),
    "unbroken": (shape_sins.LikesFullBlocks(),),
    "live": (sins.Thrashes(), sins.Starves()),
    "holds": (sins.HoldsBackUntilTheyAreLong(), sins.HoldsBackTheYoung(), sins.HoldsOneStepTooLong()),
}
LAWS: dict[str, Callable[[Any], list[str]]] = {
    "legal": contract.legal,
    "repeatable": contract.repeatable,
    "order-free": contract.order_free,
    "identity-free": contract.identity_free,
    "pure": contract.pure,
    "clockless": contract.clockless,
    "hash-free": contract.hash_free,
    "unbroken": contract.unbroken,
    "live": contract.live,
    "holds": contract.holds,
}


@pytest.mark.parametrize(("law", "sin"), [(law, sin) for law, planted in SINS.items() for sin in planted])
def test_a_planted_sin_is_caught_by_its_law(law: str, sin: Policy) -> None:
    """And the sentence begins with the law's name."""
    sentences = LAWS[law](sin)
    assert sentences
    assert all(s.startswith(f"{law}: ") for s in sentences)


@pytest.mark.parametrize(
    "sin",
    [
        *(sins.OverBudget(), sins.EvenIdsFirst(), clock_sins.ThrowsDice(), sins.Starves(), sins.HoldsBackTheYoung()),
        *(fleet_sins.CountsFromNought(), fleet_sins.NoTieBreak(), clock_sins.RoutesByDice(), fleet_sins.EvenIds()),
    ],
)
def test_the_whole_check_tells_of_the_sin(sin: Policy) -> None:
    """Whichever law it breaks."""
    assert check_policy(sin, num_views=60)


def test_a_decision_that_nobody_knows_is_refused() -> None:
    """With what is known."""

    @dataclass(frozen=True, kw_only=True)
    class Seer:
        decides: ClassVar[str] = "weather"

        def decide(self, view: Any) -> Any:
            return view

    with pytest.raises(ConfigError) as refused:
        check_policy(Seer())
    known = "batch, cache, draft, experts, failover, pages, roles, route, shapes"
    assert str(refused.value).endswith(f"Seer decides 'weather', accepted: {known}")


@pytest.mark.parametrize("watched", ["time.monotonic_ns", "random.random"])
def test_a_clock_is_seen_even_where_imports_are_clean(watched: str) -> None:
    """A policy that reads one through another module is caught in the act."""
    sin = clock_sins.ReadsTheClock() if watched.startswith("time") else clock_sins.ThrowsDice()
    assert any(s.endswith(f"calls {watched}") for s in contract.clockless(sin))


def test_processes_do_hash_otherwise() -> None:
    """Without this, hash-free would prove nothing."""
    program = "print(hash('a name'), list({'one', 'two', 'three', 'four', 'five'}))"
    told = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 2


def test_a_policy_that_no_other_process_can_import_is_told_so() -> None:
    """A law that could not be checked is not passed over in silence."""

    @dataclass(frozen=True, kw_only=True)
    class Local:
        decides: ClassVar[str] = "batch"

        def decide(self, view: BatchView) -> BatchPlan:
            return Fcfs().decide(view)

    (sentence,) = contract.hash_free(Local())
    assert "put it into a module" in sentence


def test_drawn_views_are_what_a_host_could_show() -> None:
    """Blocks add up, everyone fits the pool alone, and nobody has computed what is not known."""
    for number in range(500):
        view = drawn_view(number)
        holders = (*view.running, *view.draining)
        private = sum(r.num_private_blocks for r in holders)
        shared = sum(r.num_blocks - r.num_private_blocks for r in holders) // 2
        assert private + shared + view.num_free_blocks == view.num_blocks
        for request in (*holders, *view.waiting):
            assert num_missing_tokens(request) >= 1
            assert ceil_div(request.num_tokens, view.block_size) <= view.num_blocks
            assert request.num_blocks == ceil_div(request.num_computed_tokens, view.block_size)
            assert 0 <= request.num_idle_blocks <= min(request.num_blocks, view.num_free_blocks)
            assert request.num_blocks - request.num_idle_blocks <= view.num_blocks - view.num_free_blocks


def test_drawn_views_are_unkind() -> None:
    """Equal arrivals, full pools, half computed prompts, preempted requests, shared and idle blocks, nothing at all."""
    views = [drawn_view(number) for number in range(contract.NUM_VIEWS)]

    def some(told: Callable[[DrawnView], bool]) -> bool:
        return sum(map(told, views)) >= 10

    assert some(lambda v: len({r.arrival_us for r in v.waiting}) < len(v.waiting))
    assert some(lambda v: v.num_free_blocks == 0)
    assert some(lambda v: any(num_missing_tokens(r) > 1 for r in v.running))
    assert some(lambda v: any(r.num_tokens > r.num_prompt_tokens for r in v.waiting))
    assert some(lambda v: any(0 < r.num_idle_blocks < r.num_blocks for r in v.waiting))
    assert some(lambda v: any(r.num_private_blocks < r.num_blocks for r in v.running))
    assert some(lambda v: bool(v.draining))
    assert any(not v.running and not v.waiting for v in views)


def test_drawn_fleets_are_what_a_router_could_show() -> None:
    """Ids are unique, matches are whole blocks of the prompt, and heartbeats are of the past."""
    for number in range(500):
        view = drawn_route_view(number)
        assert len({i.id for i in view.instances}) == len(view.instances) >= 1
        for instance in view.instances:
            assert instance.num_matched_tokens % view.block_size == 0
            assert 0 <= instance.num_matched_tokens <= view.request.num_prompt_tokens
            assert instance.num_running <= instance.max_seqs_per_batch
            assert instance.as_of_us <= view.now_us
            assert instance.num_outstanding_tokens >= instance.num_running + instance.num_waiting


def test_drawn_fleets_are_unkind() -> None:
    """Fleets of one, equal loads and matches, prompts cached whole or too short for a block, full pools, no way out."""
    views = [drawn_route_view(number) for number in range(contract.NUM_VIEWS)]

    def some(told: Callable[[DrawnRouteView], bool]) -> bool:
        return sum(map(told, views)) >= 10

    assert some(lambda v: len(v.instances) == 1)
    assert some(lambda v: len({i.num_running + i.num_waiting for i in v.instances}) < len(v.instances))
    assert some(lambda v: sum(i.num_matched_tokens == v.request.num_prompt_tokens for i in v.instances) > 1)
    assert some(lambda v: all(i.num_matched_tokens == 0 for i in v.instances))
    assert some(lambda v: v.request.num_prompt_tokens < v.block_size)
    assert some(lambda v: all(i.num_waiting == 0 for i in v.instances))
    assert some(lambda v: any(i.kv_used_frac == 1 for i in v.instances))
    failures = [drawn_failover_view(number) for number in range(contract.NUM_VIEWS)]
    assert {0, 1} < {v.num_up_instances for v in failures}
    assert {0, 1} < {v.request.num_failovers for v in failures}


def test_drawn_roles_are_what_a_router_could_show_and_unkind() -> None:
    """Somebody for each stage, counts that add up; fleets of one, nobody up, nothing heard, changes just made."""
    views = [drawn_roles_view(number) for number in range(500)]
    for view in views:
        roles = {i.role for i in view.instances}
        assert roles & TAKE_PROMPTS
        assert roles & TAKE_OVER
        assert all(i.since_us <= view.now_us for i in view.instances)
        assert view.heard.num_in_time <= view.heard.num_first_tokens
        assert view.heard.num_steady <= view.heard.num_ends
    assert sum(len(v.instances) == 1 for v in views) > 20
    assert sum(not any(i.is_up for i in v.instances) for v in views) > 10
    assert sum(v.heard.num_ends == 0 for v in views) > 100
    assert sum(max(i.since_us for i in v.instances) == v.now_us - 1 for v in views) > 50
    assert sum({i.role for i in v.instances} == {"mixed"} for v in views) > 50


def test_drawn_shapes_are_what_an_instance_could_show_and_unkind() -> None:
    """Within the limits, a token for each sequence, on the edges of graphs, contexts as long as can be and longer."""
    views = [drawn_shape_view(number) for number in range(500)]
    for view in views:
        assert 1 <= view.num_seqs <= view.max_seqs_per_batch
        assert view.num_seqs <= view.num_tokens <= view.max_tokens_per_batch
        assert view.is_decode == (view.num_seqs == view.num_tokens)
        assert view.max_context_tokens > view.num_tokens - view.num_seqs
    assert sum(v.is_decode for v in views) > 100 < sum(not v.is_decode for v in views)
    assert sum(v.num_seqs == v.max_seqs_per_batch for v in views) > 20
    assert sum(v.max_context_tokens > v.max_model_len for v in views) > 20
    assert {1, 2, 8, 9, 15, 16, 17} < {v.num_tokens for v in views if v.is_decode}


def test_drawn_drafts_are_what_a_host_could_show_and_unkind() -> None:
    """Counts that add up, of windows that are full or empty; no room, no block, no method, nobody, nearly the end."""
    views = [drawn_draft_view(number) for number in range(500)]
    for view in views:
        assert view.num_tokens >= len(view.decoding)
        assert len({r.id for r in view.decoding}) == len(view.decoding)
        for request in view.decoding:
            assert request.num_prompt_tokens < request.num_tokens
            for drafted, accepted in request.tallies.values():
                assert len(drafted) == len(accepted)
                assert list(drafted) == sorted(drafted, reverse=True)
                assert list(accepted) == sorted(accepted, reverse=True)
                assert all(0 <= a <= d <= RECENT_VERIFICATIONS for d, a in zip(drafted, accepted, strict=True))
    requests = [r for v in views for r in v.decoding]
    assert sum(not v.decoding for v in views) > 20
    assert sum(not v.methods for v in views) > 20
    assert sum(v.tokens_left == 0 for v in views) > 20
    assert sum(v.blocks_left == 0 for v in views) > 20
    assert sum(v.num_tokens > len(v.decoding) for v in views) > 20
    assert sum(r.most_drafts == 0 for r in requests) > 100
    assert sum(r.num_tokens % v.block_size == 0 for v in views if v.block_size > 1 for r in v.decoding) > 100
    assert sum(not r.tally("ngram").drafted for r in requests) > 100
    assert sum(r.tally("ngram").accepted[:1] == (RECENT_VERIFICATIONS,) for r in requests) > 50


def test_drawn_experts_are_what_a_host_could_show_and_unkind() -> None:
    """Legal placements whose slots add up; nothing counted, nothing since a change, copies everywhere, no token."""
    views = [drawn_experts_view(number) for number in range(500)]
    for view in views:
        assert view.num_devices % view.num_nodes == view.num_experts % view.num_groups == 0
        for layer in view.layers:
            assert min(num_copies(layer.slots, view.num_experts)) >= 1
            assert all(len(set(own)) == len(own) for own in by_device(layer.slots, view.num_devices))
            for window in layer.windows:
                assert len(window.expert_tokens) == view.num_experts
                assert len(window.slot_tokens) in (0, len(layer.slots))
                assert not window.slot_tokens or sum(window.slot_tokens) == sum(window.expert_tokens)
    layers = [layer for view in views for layer in view.layers]
    assert sum(not view.layers for view in views) > 50
    assert sum(not layer.windows for layer in layers) > 50
    assert sum(bool(layer.windows) and not layer.windows[0].slot_tokens for layer in layers) > 50
    assert sum(len(v.layers) > 0 and len(v.layers[0].slots) == v.num_devices * v.num_experts for v in views) > 20
    assert sum(max(w.expert_tokens) == 0 for layer in layers for w in layer.windows) > 5
    for name in policies("experts"):
        if name != "static":
            assert sum(bool(make_policy("experts", name).decide(v).slots) for v in views) > 50


def test_drawn_tiers_are_what_an_instance_could_show() -> None:
    """Blocks add up, least recently used first; nobody's are out of reach, and the next token is never in KV."""
    for number in range(500):
        view = drawn_cache_view(number)
        for blocks in (view.idle_blocks, view.hosted_blocks):
            assert len({b.id for b in blocks}) == len(blocks)
            assert [b.last_used_us for b in blocks] == sorted(b.last_used_us for b in blocks)
            assert all(b.num_uses >= 1 and 0 <= b.last_used_us <= view.now_us for b in blocks)
        num_used = view.num_blocks - view.num_free_blocks
        assert view.num_clean_blocks + len(view.idle_blocks) <= view.num_free_blocks <= view.num_blocks
        assert view.num_offloading + view.num_restoring <= num_used
        in_host = view.num_free_host_blocks + view.num_offloading + len(view.hosted_blocks)
        assert in_host <= view.num_host_blocks
        assert len({r.id for r in view.waiting}) == len(view.waiting)
        for request in view.waiting:
            assert request.num_idle_blocks <= view.num_free_blocks - view.num_clean_blocks
            assert 0 <= request.num_device_blocks - request.num_idle_blocks <= num_used
            assert 0 <= request.num_host_blocks <= view.num_host_blocks - view.num_free_host_blocks
            assert request.num_tokens > (request.num_device_blocks + request.num_host_blocks) * view.block_size


def test_drawn_tiers_are_unkind() -> None:
    """Tiers that are full, empty or on their way; equals everywhere; and chances, of which every policy takes some."""
    views = [drawn_cache_view(number) for number in range(500)]

    def some(told: Callable[[DrawnCacheView], bool], least: int = 10) -> bool:
        return sum(map(told, views)) >= least

    assert some(lambda v: v.num_free_blocks == 0, 50)
    assert some(lambda v: v.num_free_host_blocks == 0 and bool(v.hosted_blocks) and bool(v.idle_blocks), 50)
    assert some(lambda v: v.num_free_host_blocks == 0 and not v.hosted_blocks and bool(v.idle_blocks))
    assert some(lambda v: 0 < v.num_offloading + v.num_restoring == v.num_blocks)
    assert some(lambda v: not v.waiting)
    assert some(lambda v: len({r.arrival_us for r in v.waiting}) < len(v.waiting), 50)
    assert some(lambda v: any(not r.num_device_blocks and not r.num_host_blocks for r in v.waiting))
    assert some(lambda v: any(not r.num_device_blocks and r.num_host_blocks for r in v.waiting))
    assert some(lambda v: len({b.last_used_us for b in v.idle_blocks}) == 1 < len(v.idle_blocks))
    assert some(lambda v: {b[1:] for b in v.idle_blocks} & {b[1:] for b in v.hosted_blocks} != set())
    assert some(is_hidden)
    for name in policies("cache"):
        if name != "device-only":
            plans = [make_policy("cache", name).decide(v) for v in views]
            assert sum(bool(p.offload) for p in plans) >= 10
            assert sum(bool(p.evict) for p in plans) >= 5
            assert sum(bool(p.restore) for p in plans) >= 10
            assert sum(len(p.restore) > 1 for p in plans) >= 2


def is_hidden(view: DrawnCacheView) -> bool:
    """Of what is idle, the oldest block is no better than what a full host has, and the youngest is."""
    if view.num_free_host_blocks or not view.hosted_blocks or not view.idle_blocks:
        return False
    oldest, youngest = recency(view.idle_blocks[0]), recency(view.idle_blocks[-1])
    return oldest <= min(map(recency, view.hosted_blocks)) < youngest


def drawn(rng: random.Random, knob: Knob | Choice) -> Any:
    """A value that the knob accepts."""
    if isinstance(knob, Choice):
        return rng.choice(knob.values)
    if isinstance(knob.low, int) and isinstance(knob.high, int):
        return rng.randint(knob.low, knob.high)
    return rng.uniform(knob.low, knob.high)
