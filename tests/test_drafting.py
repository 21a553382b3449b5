"""Speculation in the control loop: what is kept counts, what is not leaves no trace, whatever else happens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import is_repeatable, obey_the_laws
from tests.small_runs import (
    EqualSteps,
    StoppingSteps,
    WildDrafts,
    batch_policies,
    busy_workloads,
    instance_config,
    request,
    run_audited,
    tight_configs,
)
from xllm_lab.drafting import MOST_UNASKED_STEPS
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.workload import Request, Workload


@given(
    busy_workloads(),
    st.builds(replace, tight_configs(), async_scheduling=st.sampled_from(ASYNC_SCHEDULING)),
    batch_policies(),
    st.sampled_from((EqualSteps(), StoppingSteps())),
    st.sampled_from((EAGER, PowersOfTwo(), PowersOfTwo(graphs_prefill=True))),
)
def test_any_run_with_drafts_obeys_the_laws(
    workload: Workload,
    config: InstanceConfig,
    policy: BatchPolicy,
    timing: EqualSteps,
    shapes: ShapesPolicy,
) -> None:
    """Chunks, preemptions, prefix hits, clients that leave, planning ahead and graphs, all at once."""
    records = run_audited(workload, config, policy, timing, draft=WildDrafts(), shapes=shapes)
    obey_the_laws(workload, config, records)
    is_repeatable(lambda: run_audited(workload, config, policy, timing, draft=WildDrafts(), shapes=shapes))


@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
def test_a_request_alone_ends_in_fewer_steps(mode: str) -> None:
    """And with as many tokens, whose times come in bunches."""
    work = Workload(requests=(request(0, prompt=4, output=30),))
    config = instance_config(async_scheduling=mode, num_kv_blocks=32)
    plain = run_audited(work, config, DecodeFirst())
    drafted = run_audited(work, config, DecodeFirst(), draft=WildDrafts())
    (before,), (after,) = plain.requests, drafted.requests
    assert len(drafted.steps) < len(plain.steps)
    assert before.output_tokens == after.output_tokens == 30
    assert sum(after.num_accepted) == 30 - len({*after.token_times_us})


@dataclass(frozen=True)
class FoundFrom:
    """A text that begins to repeat itself at an output token: lookups find nothing before, and are right behind it."""

    position: int
    methods = ("ngram",)

    def outcome(self, request: Request, method: str, position: int, depth: int) -> tuple[int, int]:
        found = depth if position >= self.position else 0
        return found, found


def _asked(mode: str, acceptance: FoundFrom, num_tokens: int) -> list[tuple[int, int]]:
    """(Output tokens that were known, drafts) of each step in which somebody asked."""
    work = Workload(requests=(request(0, prompt=4, output=num_tokens),))
    config = instance_config(async_scheduling=mode, num_kv_blocks=80, max_model_len=310)
    records = run_audited(work, config, DecodeFirst(), draft=Fixed(), acceptance=acceptance)
    return [(s.num_computed_tokens[0] + 1 - 4, s.num_drafted[0]) for s in records.steps if s.draft_ids]


@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
def test_lookups_that_find_nothing_do_not_keep_steps_from_being_planned_ahead(mode: str) -> None:
    """Nobody waits to ask but after 1, 2, 4, 8, 16, 16, ... steps planned ahead. In turns asking holds nothing up."""
    asked = [known for known, _ in _asked(mode, FoundFrom(300), 300)]
    assert asked[:6] == (list(range(1, 7)) if mode == "off" else [1, 3, 6, 11, 20, 37])
    longest = 0 if mode == "off" else MOST_UNASKED_STEPS
    assert {after - before for before, after in pairwise(asked[5:])} == {1 + longest}


@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
@pytest.mark.parametrize("position", [1, 50, 120])
def test_text_that_begins_to_repeat_itself_is_noticed(mode: str, position: int) -> None:
    """However long nothing was found; and from then on every step is asked."""
    asked = _asked(mode, FoundFrom(position), 200)
    found = [(known, drafts) for known, drafts in asked if drafts]
    assert found[0][0] - position <= (0 if mode == "off" else MOST_UNASKED_STEPS)
    assert {after - before - drafts for (before, drafts), (after, _) in pairwise(found)} == {1}
