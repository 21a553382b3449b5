"""Exact fast-forward: many steps in one event, and not a byte of the records differs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.laws import VOCAB_SIZE, obey_the_laws
from tests.small_runs import (
    COPY_TIME,
    STEP_TIME,
    TIERED,
    batch_policies,
    busy_workloads,
    instance_config,
    request,
    tight_configs,
)
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.page_time import PageTime
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.admission import ORDERS
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.cache.device_only import DEVICE_ONLY
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.pages import PagesPolicy
from xllm_lab.policies.pages.next_page import NextPage
from xllm_lab.policies.pages.on_demand import ON_DEMAND
from xllm_lab.policies.pages.xllm_pool import XllmPool
from xllm_lab.policies.shapes import ShapePlan, ShapesPolicy, ShapeView, eagerly, replayed
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.records import Records, copy_table, request_table, step_table
from xllm_lab.sim.cost import Batch, CostModel, Price, Prices
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.workload import Workload


class Uneven:
    """Times that depend on everything a cost model sees; each third batch by context is extrapolated."""

    def step(self, batch: Batch) -> Price:
        us, is_extrapolated = self._price(batch, batch.decode_kv_tokens, batch.max_decode_kv_tokens)
        return Price(float(us), bool(is_extrapolated))

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        ahead = np.arange(num_steps)
        kv = batch.decode_kv_tokens + batch.num_decodes * ahead
        us, is_extrapolated = self._price(batch, kv, batch.max_decode_kv_tokens + ahead)
        return Prices(us, is_extrapolated)

    @staticmethod
    def _price(batch: Batch, kv: Any, longest: Any) -> Any:
        tokens = sum(c.num_tokens * (1 + 0.1 * c.num_computed_tokens) for c in batch.prefills)
        tokens += 2.3 * (batch.graph_tokens or 0.4)
        return 3.7 + 0.9 * tokens + 0.3 * batch.num_decodes + 0.07 * kv + 0.011 * longest, kv % 3 == 0


class Counting(Predicted):
    """Counts events."""

    num_events = 0

    def ran(self, stretch: Any) -> None:
        super().ran(stretch)
        self.num_events += 1


def simulated(
    work: Workload,
    config: InstanceConfig,
    policy: BatchPolicy,
    cost: CostModel,
    *,
    fast_forward: bool,
    shapes: ShapesPolicy = EAGER,
    pages: PagesPolicy = ON_DEMAND,
    cache: CachePolicy = DEVICE_ONLY,
) -> tuple[Records, Counting]:
    timing = Counting(
        cost,
        fast_forward=fast_forward,
        page_time=PageTime(map_run_us=3.0, map_page_us=1.5, unmap_run_us=2.0, unmap_page_us=0.5),
        hides_mapping=config.async_scheduling == "on",
        copy_time=COPY_TIME,
    )
    policies = Policies(policy, shapes=shapes, pages=pages, cache=cache)
    told: dict[str, Any] = {"step_time": STEP_TIME, "copy_time": COPY_TIME}
    return run_simulation(work, config, policies, timing, vocab_size=VOCAB_SIZE, **told), timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Turning:
    """A shapes policy that leaves its graphs as contexts grow, and finds others."""

    decides: ClassVar[str] = "shapes"

    def decide(self, view: ShapeView) -> ShapePlan:
        if 14 <= view.max_context_tokens < 23:
            return eagerly("in between")
        first, other = (replayed(view, view.num_tokens + more) for more in (0, 1))
        if view.max_context_tokens < 14:
            return first
        # Where the largest graph is the first, too, coming back to it would break the law of the contract.
        return other if other != first else eagerly("no other")


@st.composite
def long_answers(draw: st.DrawFn) -> Workload:
    """Busy workloads whose requests decode for a while, so that there is something to skip."""
    busy = draw(busy_workloads())
    longer = [replace(r, output_tokens=draw(st.sampled_from((1, 3, 12, 30)))) for r in busy.requests]
    return replace(busy, requests=tuple(longer))


@st.composite
def long_prompts(draw: st.DrawFn) -> Workload:
    """Busy workloads whose prompts take several chunks, beside answers that take as many steps."""
    busy = draw(busy_workloads())
    sizes = draw(st.lists(st.integers(1, 60), min_size=len(busy.requests), max_size=len(busy.requests)))
    prompts = [request(r.id, prompt=n).prompt for r, n in zip(busy.requests, sizes, strict=True)]
    requests = [replace(r, prompt=p, output_tokens=9) for r, p in zip(busy.requests, prompts, strict=True)]
    return replace(busy, requests=tuple(requests))


@given(
    work=busy_workloads() | long_answers(),
    config=tight_configs(),
    policy=batch_policies(),
    mode=st.sampled_from(ASYNC_SCHEDULING),
    shapes=st.sampled_from((EAGER, Turning())),
)
def test_skipping_steps_changes_nothing(
    work: Workload, config: InstanceConfig, policy: BatchPolicy, mode: str, shapes: ShapesPolicy
) -> None:
    """Any workload, policies, and way of scheduling: the records are equal, on disk too, and so is what was counted."""
    same_records(work, config, policy, mode, shapes=shapes)


@given(
    work=busy_workloads() | long_answers(),
    config=tight_configs(),
    policy=batch_policies(),
    mode=st.sampled_from(ASYNC_SCHEDULING),
    cache=st.sampled_from(TIERED),
)
def test_skipping_steps_beside_copies_changes_nothing(
    work: Workload, config: InstanceConfig, policy: BatchPolicy, mode: str, cache: CachePolicy
) -> None:
    """Copies name blocks, and those are handed out alike."""
    same_records(work, replace(config, enable_prefix_cache=True), policy, mode, cache=cache)


@given(
    work=busy_workloads() | long_answers(),
    config=tight_configs(),
    policy=batch_policies(),
    mode=st.sampled_from(ASYNC_SCHEDULING),
    pages=st.sampled_from((ON_DEMAND, XllmPool(), XllmPool(max_reserved_pages=2), NextPage(), NextPage(lead_steps=3))),
)
def test_skipping_steps_of_virtual_kv_changes_nothing(
    work: Workload, config: InstanceConfig, policy: BatchPolicy, mode: str, pages: PagesPolicy
) -> None:
    """Nor does a page, and the step that waits for it."""
    same_records(work, replace(config, kv_layout="virtual"), policy, mode, pages=pages)


def same_records(
    work: Workload, config: InstanceConfig, policy: BatchPolicy, mode: str, shapes: ShapesPolicy = EAGER, **also: Any
) -> None:
    config = replace(config, async_scheduling=mode)
    stepped, slow = simulated(work, config, policy, Uneven(), fast_forward=False, shapes=shapes, **also)
    skipped, fast = simulated(work, config, policy, Uneven(), fast_forward=True, shapes=shapes, **also)
    event(f"skips {(slow.num_events - fast.num_events) * 10 // slow.num_events if slow.num_events else 0}0 %")
    assert skipped.requests == stepped.requests
    assert skipped.steps == stepped.steps
    assert copy_table(skipped.copies).equals(copy_table(stepped.copies))
    assert step_table(skipped.spans).equals(step_table(stepped.spans))
    assert request_table(skipped.requests).equals(request_table(stepped.requests))
    assert (fast.num_steps, fast.num_extrapolated) == (slow.num_steps, slow.num_extrapolated)
    obey_the_laws(work, config, skipped)


@given(
    work=long_prompts(),
    config=tight_configs(),
    policy=st.builds(
        DecodeFirst,
        max_tokens_per_chunk=st.integers(1, 24),
        watermark_frac=st.floats(0.5, 1),
        order=st.sampled_from(ORDERS),
    ),
    mode=st.sampled_from(ASYNC_SCHEDULING),
)
def test_skipping_chunks_changes_nothing(
    work: Workload, config: InstanceConfig, policy: BatchPolicy, mode: str
) -> None:
    """As above, where chunks of a prompt repeat themselves."""
    same_records(work, config, policy, mode, shapes=Turning())


@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
def test_steps_are_skipped(mode: str) -> None:
    """Or the law above would say nothing: two requests and fifty tokens each are a handful of events."""
    work = Workload(requests=(request(0, prompt=8, output=50), request(1, 200, prompt=8, output=50)))
    config = instance_config(num_kv_blocks=64, async_scheduling=mode)
    records, timing = simulated(work, config, DecodeFirst(), Uneven(), fast_forward=True)
    assert timing.num_steps == len(records.steps) > 60
    assert timing.num_events < 20


@pytest.mark.parametrize("pages", [ON_DEMAND, XllmPool(), NextPage()])
def test_steps_between_pages_are_skipped(pages: PagesPolicy) -> None:
    """Of a hundred steps, those that enter a page are planned, and at most two before each."""
    work = Workload(requests=(request(0, prompt=8, output=100),))
    config = instance_config(num_kv_blocks=64, block_size=8, kv_layout="virtual")
    records, timing = simulated(work, config, DecodeFirst(), Uneven(), fast_forward=True, pages=pages)
    assert timing.num_steps == len(records.steps) == 100
    assert timing.num_events <= 3 * 13 + 3


def test_chunks_of_a_prompt_are_skipped() -> None:
    """A prompt that takes what one decode leaves, six times over, is three events: its first, equal and last chunks."""
    work = Workload(requests=(request(0, prompt=4, output=40), request(1, 10, prompt=6 * 15 + 1, output=1)))
    config = instance_config(num_kv_blocks=64)
    records, timing = simulated(work, config, DecodeFirst(), Uneven(), fast_forward=True)
    assert [s.num_tokens for s in records.steps if 1 in s.ids] == [[1, 15]] * 6 + [[1, 1]]
    assert [len(s.ends_us) for s in records.spans if any(c.id == 1 for c in s.chunks)] == [6, 1]
    assert timing.num_events < 10
