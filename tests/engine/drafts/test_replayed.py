"""The simulator decides as the engine did: drafts made and kept, stops inside them, clients that leave meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.engine.drafts.test_speculation import GREEDY, WHERE, engine, plain, workload
from tests.laws import obey_the_laws
from tests.small_runs import STEP_TIME
from tests.tiny_models import VOCAB_SIZE
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.draft import METHODS, DraftPolicy
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.records import FinishReason, Records, StepRecord
from xllm_lab.runs import Run
from xllm_lab.sim.parity import parity
from xllm_lab.workload import RequestId, Sampling, Workload

NGRAM = Fixed(method="ngram", num_speculative_tokens=3)
LAYERS = Fixed(method="draft_model", num_speculative_tokens=3)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is served, where and how, and what must be seen in the records."""

    draft: DraftPolicy
    workload: Callable[[], Workload] = lambda: workload(GREEDY)
    where: InstanceConfig = WHERE
    shapes: ShapesPolicy = EAGER
    shows: Callable[[Records], bool] = field(default=lambda records: _num_drafted(records) > 0)


def _num_drafted(records: Records) -> int:
    return sum(sum(r.num_drafted) for r in records.requests)


@functools.cache
def _stopping() -> Workload:
    """Every request asks to end at a token that plain decoding gives it half way."""
    whole = workload(GREEDY)
    ends = [tokens[len(tokens) // 2] for tokens in plain(GREEDY)]
    requests = tuple(
        replace(r, sampling=Sampling(ignore_eos=False, stop_token_ids=(end,)))
        for r, end in zip(whole.requests, ends, strict=True)
    )
    return replace(whole, requests=requests)


def _leaving() -> Workload:
    """Clients that go away one by one, ever later, so that on any machine some do while their drafts are verified."""
    whole = workload(GREEDY)
    requests = tuple(replace(r, cancel_us=round(300 * 1.5**r.id)) if r.id < 16 else r for r in whole.requests)
    return replace(whole, requests=requests)


def _stopped_inside_drafts(records: Records) -> bool:
    """Some request ended by a token that was a draft: its last step kept all that it counts as kept, and no more."""
    ends = {r.id: r for r in records.requests if r.finish_reason is FinishReason.STOP}
    last = {i: (drafted, kept) for s in records.steps for i, drafted, kept in _verified(s)}
    return any(i in ends and kept < drafted for i, (drafted, kept) in last.items())


def _left_with_drafts(records: Records) -> bool:
    """Some client went away while a step with drafts of its request ran, whose end is when the host hears of it."""
    gone = {r.id: r.finish_us for r in records.requests if r.finish_reason is FinishReason.CANCELLED}
    drafting = [(s.end_us, i) for s in records.steps for i, drafted, _ in _verified(s) if drafted]
    return any(end_us == gone.get(RequestId(i)) for end_us, i in drafting)


def _verified(step: StepRecord) -> list[tuple[int, int, int]]:
    return list(zip(step.draft_ids, step.num_drafted, step.num_accepted, strict=True))


def _preempted(records: Records) -> bool:
    return _num_drafted(records) > 0 and any(r.num_preemptions for r in records.requests)


def _replays_drafts(records: Records) -> bool:
    return any(s.graph_tokens is not None and any(s.num_drafted) for s in records.steps)


TIGHT = replace(WHERE, num_kv_blocks=60)
GRAPHS = PowersOfTwo(graphs_prefill=True)
ADAPTING = [name for name in policies("draft") if name not in ("off", "fixed")]
SCENES = {
    **{name: Scene(draft=make_policy("draft", name)) for name in ADAPTING},
    **{f"fixed {method}": Scene(draft=Fixed(method=method)) for method in METHODS},
    "lost KV": Scene(draft=NGRAM, where=TIGHT, shows=_preempted),
    "lost KV, a draft model": Scene(draft=LAYERS, where=TIGHT, shows=_preempted),
    "small steps": Scene(draft=NGRAM, where=replace(WHERE, max_tokens_per_batch=24)),
    "graphs": Scene(draft=NGRAM, shapes=PowersOfTwo(), shows=_replays_drafts),
    "graphs of prompts, too": Scene(draft=LAYERS, shapes=GRAPHS, shows=_replays_drafts),
    "ends inside drafts": Scene(draft=LAYERS, workload=_stopping, shows=_stopped_inside_drafts),
    "clients leave": Scene(draft=LAYERS, workload=_leaving, shows=_left_with_drafts),
}
SCENES |= {
    f"{name}, {mode}": replace(scene, where=replace(scene.where, async_scheduling=mode))
    for mode in ASYNC_SCHEDULING
    if mode != "off"
    for name, scene in SCENES.items()
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenes")


def _played(name: str, folder: Path) -> Run:
    s = SCENES[name]
    how = Policies(DecodeFirst(), shapes=s.shapes, draft=s.draft)
    return engine().replay(s.workload(), s.where, how, out=folder / name.replace(" ", "-"), step_time=STEP_TIME)


@pytest.mark.parametrize("name", SCENES)
def test_the_simulator_decides_as_the_engine_did(name: str, folder: Path) -> None:
    """Who drafts how much by which method, how much there was, and everything behind it."""
    run, scene = _played(name, folder), SCENES[name]
    assert scene.shows(run.records), "the scene does not show what it is for"
    obey_the_laws(run.workload, scene.where, run.records, vocab_size=VOCAB_SIZE)
    found = parity(run)
    assert found.is_identical, f"step {found.step}: engine {found.engine}, simulator {found.simulator}"


@pytest.fixture(scope="module")
def with_ngram(folder: Path) -> Run:
    how = Policies(DecodeFirst(), draft=NGRAM)
    return engine().replay(workload(GREEDY), WHERE, how, out=folder / "with-ngram", step_time=STEP_TIME)


Drafts = tuple[tuple[int, str, int, int], ...]


def _parts_at(run: Run, draft: DraftPolicy) -> tuple[Drafts, Drafts]:
    """(Drafts of the engine, drafts of the simulator) where another policy parts ways, which is where it first can."""
    found = parity(run, policies=Policies(DecodeFirst(), draft=draft))
    first = next(s.step for s in run.records.steps if s.draft_ids)
    assert found.step == first
    assert found.engine is not None
    assert found.simulator is not None
    return found.engine.drafts, found.simulator.drafts


def test_parity_tells_the_first_step_that_another_method_changes(with_ngram: Run) -> None:
    """Who asks otherwise decides otherwise, even where as many drafts come of it."""
    engines, simulators = _parts_at(with_ngram, Fixed(method="suffix", num_speculative_tokens=3))
    assert simulators == tuple((i, "suffix", asked, made) for i, _, asked, made in engines)


def test_parity_tells_the_first_step_that_another_depth_changes(with_ngram: Run) -> None:
    """Fewer are asked for, and no more than that are made."""
    engines, simulators = _parts_at(with_ngram, Fixed(method="ngram", num_speculative_tokens=1))
    assert simulators == tuple((i, method, 1, min(1, made)) for i, method, _, made in engines)


def test_parity_tells_the_first_step_in_which_nobody_drafts(with_ngram: Run) -> None:
    """Without speculation the first step with drafts is another one."""
    assert _parts_at(with_ngram, OFF)[1] == ()
