"""What mapping takes: fitted, given, and charged to the step that waits for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import VOCAB_SIZE
from tests.small_runs import STEP_TIME, instance_config, request
from tests.tiny_loop import said
from xllm_lab.errors import ConfigError
from xllm_lab.formats import own
from xllm_lab.page_time import Mapped, PageTime, fit_page_time
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.pages import PagesPolicy
from xllm_lab.policies.pages.next_page import NextPage
from xllm_lab.policies.pages.on_demand import ON_DEMAND
from xllm_lab.records import Records
from xllm_lab.runs import read_run
from xllm_lab.sim.cost import Batch, Price, Prices
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.step import PageRun
from xllm_lab.workload import Workload

WORK = Workload(requests=(request(0, prompt=4, output=30), request(1, prompt=9, output=30)))
CONFIG = instance_config(num_kv_blocks=64, block_size=4, kv_layout="virtual")
TIMES = PageTime(map_run_us=5, map_page_us=2, unmap_run_us=1, unmap_page_us=1)


class Even:
    """Ten microseconds a step."""

    def step(self, batch: Batch) -> Price:
        return Price(10.0, False)

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        raise AssertionError("nobody skips")


def simulated(pages: PagesPolicy, time: PageTime, *, hides: bool = False) -> Records:
    timing = Predicted(Even(), fast_forward=False, page_time=time, hides_mapping=hides)
    return run_simulation(
        WORK, CONFIG, Policies(DecodeFirst(), pages=pages), timing, vocab_size=VOCAB_SIZE, step_time=STEP_TIME
    )


def test_a_step_waits_for_the_pages_that_it_needs() -> None:
    """And for no others."""
    for step in simulated(ON_DEMAND, TIMES).steps:
        runs, pages = len(step.page_maps) // 4, sum(step.page_maps[3::4])
        assert step.step_us == 10 + 5 * runs + 2 * pages
        assert (step.map_us or 0) == step.step_us - 10


def test_pages_mapped_ahead_cost_nothing() -> None:
    """Where mapping one takes no longer than a step: all steps but those with a prompt last ten microseconds."""
    steps = simulated(NextPage(), TIMES).steps
    assert sum(len(s.page_maps_ahead) for s in steps) > 0
    assert [s.step_us for s in steps if not s.admitted] == [10] * (len(steps) - 1)


def test_mapping_that_takes_longer_than_steps_is_waited_for() -> None:
    """What began beside a step keeps the mapper from the next."""
    slow = replace(TIMES, map_run_us=100.0)
    ahead, demanded = (simulated(policy, slow).steps for policy in (NextPage(), ON_DEMAND))
    assert ahead[-1].end_us < demanded[-1].end_us
    hidden = simulated(ON_DEMAND, slow, hides=True).steps
    assert demanded[-1].end_us > hidden[-1].end_us > 30 * 10


_moves = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 9)), min_size=12, max_size=40)


@given(_moves, st.tuples(*[st.integers(1, 500)] * 4))
def test_times_that_are_sums_are_found_again(moves: list[tuple[int, int, int]], weights: tuple[int, ...]) -> None:
    truth = PageTime(**dict(zip(PageTime.__slots__, map(float, weights), strict=True)))
    every = [*moves, (1, 0, 1), (1, 0, 7), (0, 1, 1), (0, 1, 7)]
    mapped = []
    for num_maps, num_unmaps, pages in every:
        maps, unmaps = ([PageRun(0, 0, 0, pages)] * n for n in (num_maps, num_unmaps))
        mapped.append(Mapped(maps, unmaps, truth.map_us(maps) + truth.unmap_us(unmaps)))
    found = fit_page_time(mapped)
    assert found is not None
    for name in PageTime.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-6)


def test_nothing_mapped_tells_nothing() -> None:
    assert fit_page_time([Mapped((), (), 3.0)]) is None


def test_times_below_0_are_refused() -> None:
    with pytest.raises(ConfigError, match="map_page_us is -1, a finite time of at least 0"):
        PageTime(map_page_us=-1)


HARDWARE = ("--hardware", "h100", "--model-config", "Qwen3-8B")


def test_the_command_prices_pages_when_it_is_told(tmp_path: Path) -> None:
    """And refuses virtual KV when nobody said what it costs."""
    trace = tmp_path / "work.jsonl"
    own.write(WORK, trace)
    words = ("simulate", trace, *HARDWARE, "--set", "kv_layout=virtual", "--set", "block_size=16")
    refused = said(*words, "--out", tmp_path / "refused")
    assert refused.status == 2
    assert "what mapping its pages costs is not known" in refused.err
    wrong = said(*words, "--page-us", "soon", "--out", tmp_path / "wrong")
    assert "--page-us 'soon'" in wrong.err
    fine = said(*words, "--page-us", "400,30", "--pages", "next-page", "--out", tmp_path / "fine")
    assert fine.status == 0, fine.err
    run = read_run(tmp_path / "fine")
    assert run.manifest.timing["page_time"]["map_run_us"] == 400
    assert any(s.map_us for s in run.records.steps)
    paged = said("simulate", trace, *HARDWARE, "--pages", "next-page", "--out", tmp_path / "paged")
    assert "maps no pages" in paged.err
