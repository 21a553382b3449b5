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

from tests.policies import clock_sins, sins
from xllm_lab import contract
from xllm_lab.contract import check_policy
from xllm_lab.drawn_views import DrawnView, drawn_view
from xllm_lab.policies.api import BatchPlan, BatchPolicy, BatchView, Choice, Knob, ceil_div, num_missing_tokens
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.catalog import knobs, make_batch_policy, policies

NAMES = tuple(policies("batch"))
IN_PROCESS = (contract.legal, contract.repeatable, contract.order_free, contract.identity_free, contract.pure)


@pytest.mark.parametrize("name", NAMES)
def test_every_catalogued_policy_keeps_the_contract(name: str) -> None:
    """With the values of its knobs that it comes with."""
    assert check_policy(make_batch_policy(name), num_views=100) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_every_catalogued_policy_keeps_it_with_any_values(name: str, seed: int) -> None:
    """A tuner will try them all."""
    rng = random.Random(f"{name} {seed}")
    policy = make_batch_policy(name, {k: drawn(rng, knob) for k, knob in knobs(policies("batch")[name]).items()})
    assert [s for law in IN_PROCESS for s in law(policy, 60)] == []
    assert contract.live(policy, 10) == []


@pytest.mark.parametrize("name", ["decode-first", "prefill-first"])
@pytest.mark.parametrize("budget_us", [1, 12, 40])
def test_time_budgets_keep_the_contract(name: str, budget_us: int) -> None:
    """However little time a step is given, somebody is served."""
    policy = make_batch_policy(name, {"max_ttft_us": budget_us, "max_tpot_us": budget_us})
    assert [s for law in IN_PROCESS for s in law(policy, 60)] == []
    assert contract.live(policy, 10) == []


SINS: dict[str, tuple[BatchPolicy, ...]] = {
    "legal": (sins.OverBudget(), sins.Idler(), sins.RunsIntoErrors()),
    "repeatable": (sins.Remembers(), sins.SetOfObjects()),
    "order-free": (sins.NoTieBreak(),),
    "identity-free": (sins.EvenIdsFirst(),),
    "pure": (sins.SortsTheView(), sins.MarksRequests()),
    "clockless": (clock_sins.ReadsTheClock(), clock_sins.ThrowsDice(), clock_sins.ThrowsNumpyDice()),
    "hash-free": (sins.SetOfNames(),),
    "live": (sins.Thrashes(), sins.Starves()),
}
LAWS: dict[str, Callable[[BatchPolicy], list[str]]] = {
    "legal": contract.legal,
    "repeatable": contract.repeatable,
    "order-free": contract.order_free,
    "identity-free": contract.identity_free,
    "pure": contract.pure,
    "clockless": contract.clockless,
    "hash-free": contract.hash_free,
    "live": contract.live,
}


@pytest.mark.parametrize(("law", "sin"), [(law, sin) for law, planted in SINS.items() for sin in planted])
def test_a_planted_sin_is_caught_by_its_law(law: str, sin: BatchPolicy) -> None:
    """And the sentence begins with the law's name."""
    sentences = LAWS[law](sin)
    assert sentences
    assert all(s.startswith(f"{law}: ") for s in sentences)


@pytest.mark.parametrize("sin", [sins.OverBudget(), sins.EvenIdsFirst(), clock_sins.ThrowsDice(), sins.Starves()])
def test_the_whole_check_tells_of_the_sin(sin: BatchPolicy) -> None:
    """Whichever law it breaks."""
    assert check_policy(sin, num_views=60)


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
        private = sum(r.num_private_blocks for r in view.running)
        shared = sum(r.num_blocks - r.num_private_blocks for r in view.running) // 2
        assert private + shared + view.num_free_blocks == view.num_blocks
        for request in (*view.running, *view.waiting):
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
    assert any(not v.running and not v.waiting for v in views)


def drawn(rng: random.Random, knob: Knob | Choice) -> Any:
    """A value that the knob accepts."""
    if isinstance(knob, Choice):
        return rng.choice(knob.values)
    if isinstance(knob.low, int) and isinstance(knob.high, int):
        return rng.randint(knob.low, knob.high)
    return rng.uniform(knob.low, knob.high)
