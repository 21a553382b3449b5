"""The engine as a host: a real model, real tensors, measured times; laws, parity and tokens on every run.

The model is random and tiny, so that a step costs a millisecond; that its numbers are transformers' is shown elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws import obey_the_laws
from tests.small_runs import batch_policies, busy_workloads, request, tight_configs
from tests.tiny_models import EOS_TOKEN_IDS, MAX_POSITION, VOCAB_SIZE, tiny_model, write_tiny_model
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.errors import ConfigError, RequestTooLargeError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.api import BatchPlan, BatchPolicy, BatchView
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import FinishReason, Records
from xllm_lab.runs import Run
from xllm_lab.sim.calibrate import calibrate
from xllm_lab.sim.cost import batch_of
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.parity import parity
from xllm_lab.step_samples import samples
from xllm_lab.step_time import TERMS, Chunk, StepTime
from xllm_lab.workload import ClosedLoop, Priority, Request, Sampling, Slo, Workload

# 200 us a step and 20 us a token: about this model's own, but known beforehand.
STEP_TIME = StepTime(tuple({"eager_us": 200.0, "token_us": 20.0}.get(t, 0.0) for t in TERMS))
POLICIES = tuple(policies("batch"))


@functools.cache
def engine(clock: str = "virtual", timer: str = "wall") -> Engine:
    return Engine(EngineOptions(model=str(tiny_model()), device="cpu", dtype="float32", clock=clock, timer=timer))


def config(**changes: int | bool | str) -> InstanceConfig:
    """Room for everybody, unless a test says otherwise."""
    roomy: dict[str, int | bool | str] = {
        "max_tokens_per_batch": 256,
        "max_seqs_per_batch": 16,
        "block_size": 8,
        "num_kv_blocks": 128,
        "max_model_len": MAX_POSITION,
    }
    return InstanceConfig(**{**roomy, **changes})  # type: ignore[arg-type]


def crowd(num_requests: int = 10, *, output: int = 8, sampling: Sampling | None = None) -> Workload:
    """Requests in quick succession; the first eight tokens of all prompts, and sixteen of half, are the same."""
    return Workload(
        requests=tuple(
            replace(
                request(i, 150 * i, prompt=18 + 3 * i, output=output, hashes=(1, 2, 3, 4) if i % 2 else (1, 2)),
                sampling=sampling or Sampling(),
            )
            for i in range(num_requests)
        ),
        seed=3,
    )


def served(workload: Workload, where: InstanceConfig, policy: BatchPolicy, *, host: Engine | None = None) -> Records:
    """Records of the workload served by the engine, which obey the laws."""
    records = Records()
    (host or engine()).serve(workload, where, Policies(policy), records, step_time=STEP_TIME)
    obey_the_laws(workload, where, records.sort(), vocab_size=VOCAB_SIZE)
    return records


def outputs(records: Records) -> dict[int, list[int]]:
    return {r.id: r.output_token_ids.tolist() for r in records.requests}


@dataclass(frozen=True)
class Scene:
    """What is served where, and what must be seen in the records for the scene to be worth playing."""

    workload: Callable[[], Workload]
    where: InstanceConfig
    shows: Callable[[Records], bool]
    clock: str = "virtual"
    timer: str = "wall"


def _impatient() -> Workload:
    gone = {1: 0, 3: 400, 4: 1_500, 6: 3_000, 8: 10**9}
    return replace(
        crowd(output=20),
        requests=tuple(
            replace(r, cancel_us=r.arrival_us + gone[r.id]) if r.id in gone else r for r in crowd(output=20).requests
        ),
    )


def _ranked() -> Workload:
    ranks = (Priority.LOW, Priority.NORMAL, Priority.HIGH)
    promise = Slo(ttft_us=2_000, tpot_us=500)
    whole = crowd()
    requests = tuple(replace(r, priority=ranks[r.id % 3], slo=promise if r.id % 2 else Slo()) for r in whole.requests)
    return replace(whole, requests=requests)


def _any(records: Records) -> bool:
    return bool(records.steps)


def _has(reason: FinishReason) -> Callable[[Records], bool]:
    return lambda records: any(r.finish_reason is reason for r in records.requests)


def _chunks(records: Records) -> bool:
    return sum(len(s.ids) for s in records.steps) > sum(s.num_logits for s in records.steps)


SCENES = {
    "everything at once": Scene(crowd, config(), _any),
    "prefix hits": Scene(crowd, config(), lambda r: summarize(r).prefix_hit_frac > 0),
    "no prefix cache": Scene(crowd, config(enable_prefix_cache=False), lambda r: summarize(r).prefix_hit_frac == 0),
    "a small pool": Scene(
        lambda: crowd(output=40), config(block_size=4, num_kv_blocks=24), lambda r: summarize(r).num_preemptions > 0
    ),
    "small steps": Scene(crowd, config(max_tokens_per_batch=9), _chunks),
    "one at a time": Scene(crowd, config(max_seqs_per_batch=1), lambda r: all(len(s.ids) == 1 for s in r.steps)),
    "impatient clients": Scene(_impatient, config(max_seqs_per_batch=3), _has(FinishReason.CANCELLED)),
    "priorities and promises": Scene(_ranked, config(max_seqs_per_batch=3), _any),
    "a closed loop": Scene(
        lambda: replace(crowd(), closed_loop=ClosedLoop(num_clients=3, think_us=500)),
        config(),
        lambda r: max(len(s.ids) for s in r.steps) <= 3,
    ),
    "idle gaps": Scene(
        lambda: replace(crowd(), requests=tuple(r.at(r.id * 30_000) for r in crowd(4).requests)), config(), _any
    ),
    "processor time": Scene(crowd, config(max_tokens_per_batch=9), _any, timer="cpu"),
    "wall clock": Scene(crowd, config(max_tokens_per_batch=9), _any, clock="wall"),
    "ends of text": Scene(
        lambda: crowd(output=40, sampling=Sampling(temperature=1.0, ignore_eos=False)),
        config(),
        _has(FinishReason.STOP),
    ),
    "drawn tokens": Scene(lambda: crowd(sampling=Sampling(temperature=0.8, top_k=20, top_p=0.9)), config(), _any),
}

AHEAD = {"on": "planned ahead", "length_aware": "planned ahead, ends foreseen"}
SCENES |= {
    f"{name}, {how}": replace(scene, where=replace(scene.where, async_scheduling=mode))
    for mode, how in AHEAD.items()
    for name, scene in SCENES.items()
}


@functools.cache
def played(scene: str, policy: str, folder: Path) -> Run:
    """A scene replayed once for all the tests that look at it."""
    s = SCENES[scene]
    out = folder / f"{scene} {policy}".replace(" ", "-")
    host = engine(s.clock, s.timer)
    return host.replay(s.workload(), s.where, Policies(make_policy("batch", policy)), out=out, step_time=STEP_TIME)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenes")


# Every scene under xLLM's default policy, and the two scenes with most decisions under every policy.
CASTS = [(scene, "decode-first") for scene in SCENES] + [
    (scene, policy)
    for scene in ("a small pool", "impatient clients", "a small pool, planned ahead")
    for policy in POLICIES
    if policy != "decode-first"
]


@pytest.mark.parametrize(("scene", "policy"), CASTS)
def test_an_engine_run_obeys_the_laws(scene: str, policy: str, folder: Path) -> None:
    """Conservation, causality, capacity: what holds for simulated runs holds for measured ones."""
    run = played(scene, policy, folder)
    obey_the_laws(run.workload, SCENES[scene].where, run.records, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(("scene", "policy"), CASTS)
def test_the_simulator_decides_as_the_engine_did(scene: str, policy: str, folder: Path) -> None:
    """One policy, two hosts: fed with the run's arrivals, times and tokens, every decision is the same."""
    found = parity(played(scene, policy, folder))
    assert found.is_identical, f"step {found.step}: engine {found.engine}, simulator {found.simulator}"


@pytest.mark.parametrize("scene", SCENES)
def test_a_scene_shows_what_it_is_for(scene: str, folder: Path) -> None:
    """Preemptions, hits, chunks, cancellations do happen: the laws above are not kept by idleness."""
    assert SCENES[scene].shows(played(scene, "decode-first", folder).records)


@settings(max_examples=15)
@given(
    workload=busy_workloads(),
    where=tight_configs(),
    policy=batch_policies(),
    seed=st.integers(0, 3),
    mode=st.sampled_from(("off", *AHEAD)),
)
def test_any_run_obeys_the_laws_and_the_simulator_agrees(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    workload: Workload,
    where: InstanceConfig,
    policy: BatchPolicy,
    seed: int,
    mode: str,
) -> None:
    """Hypothesis draws the workload, the configuration and the policy; some tokens are drawn, and some end the text."""
    # Planned ahead, a request that just fits may need a block more for the row that is wasted.
    num_blocks = max(where.num_kv_blocks, -(-60 // where.block_size) + 1)
    where = replace(where, max_model_len=60, num_kv_blocks=num_blocks, async_scheduling=mode)
    drawing = Sampling(temperature=1.0, seed=seed, ignore_eos=False)
    short = tuple(replace(r, sampling=drawing if r.id % 2 else Sampling()) for r in workload.requests)
    out = tmp_path_factory.mktemp("any") / "run"
    run = engine().replay(replace(workload, requests=short), where, Policies(policy), out=out, step_time=STEP_TIME)
    obey_the_laws(run.workload, where, run.records, vocab_size=VOCAB_SIZE)
    assert parity(run).is_identical


ELSEWHERE = {
    "one by one": config(max_seqs_per_batch=1),
    "in small chunks": config(max_tokens_per_batch=7),
    "without a prefix cache": config(enable_prefix_cache=False),
    "with preemptions": config(block_size=4, num_kv_blocks=24),
    "in other blocks": config(block_size=16),
    "planned ahead": config(async_scheduling="on"),
    "planned ahead with preemptions": config(block_size=4, num_kv_blocks=24, async_scheduling="on"),
    "ends foreseen": config(max_tokens_per_batch=7, async_scheduling="length_aware"),
    "ends foreseen with preemptions": config(block_size=4, num_kv_blocks=24, async_scheduling="length_aware"),
}


@pytest.mark.parametrize("where", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, seed=5)], ids=["greedy", "drawn"])
def test_tokens_do_not_depend_on_how_they_were_batched(sampling: Sampling, where: InstanceConfig) -> None:
    """Chunking, preemption, sharing and batching move KV about; in float32 no token notices."""
    workload = crowd(6, output=24, sampling=sampling)
    expected = outputs(served(workload, config(), make_policy("batch", "fcfs")))
    assert outputs(served(workload, where, make_policy("batch", "fcfs"))) == expected


def test_every_policy_serves_the_same_tokens() -> None:
    """A policy decides when a token is computed, never which."""
    where = config(block_size=4, num_kv_blocks=24, max_tokens_per_batch=24)
    found = [outputs(served(crowd(output=20), where, make_policy("batch", name))) for name in POLICIES]
    assert all(tokens == found[0] for tokens in found)


def test_generation_ends_after_an_end_of_text() -> None:
    """The checkpoint names its ends of text; without `ignore_eos` the first one is the last token, and it is kept."""
    drawing = Sampling(temperature=1.0, ignore_eos=False)
    records = served(crowd(output=40, sampling=drawing), config(), make_policy("batch", "fcfs"))
    for record in records.requests:
        is_end = [token in EOS_TOKEN_IDS for token in record.output_token_ids]
        assert not any(is_end[:-1])
        assert is_end[-1] == (record.finish_reason is FinishReason.STOP)


def test_a_stop_token_of_the_request_ends_it() -> None:
    """The third token of a greedy run, asked for as a stop token, ends the same run after three."""
    plain = crowd(1, output=9)
    third = outputs(served(plain, config(), make_policy("batch", "fcfs")))[0][2]
    stopping = crowd(1, output=9, sampling=Sampling(stop_token_ids=(third,), ignore_eos=False))
    (record,) = served(stopping, config(), make_policy("batch", "fcfs")).requests
    assert record.output_token_ids[-1] == third
    assert record.output_tokens <= 3


def test_replay_mode_runs_through_ends_of_text() -> None:
    """`ignore_eos` is what makes a trace's output lengths come true."""
    drawn = served(crowd(output=40, sampling=Sampling(temperature=1.0)), config(), make_policy("batch", "fcfs"))
    assert any(token in EOS_TOKEN_IDS for tokens in outputs(drawn).values() for token in tokens)
    assert {r.output_tokens for r in drawn.requests} == {40}


@pytest.fixture(scope="module")
def one_by_one(folder: Path) -> Run:
    """A short prompt, a long one, a short one, all there at the start, served one after the other, four steps each."""
    workload = Workload(requests=tuple(request(i, prompt=p, output=4) for i, p in enumerate((10, 30, 20))))
    where = config(max_seqs_per_batch=1)
    return engine().replay(workload, where, Policies(make_policy("batch", "decode-first")), out=folder / "one-by-one")


def test_parity_tells_the_first_decision_that_a_knob_changes(one_by_one: Run) -> None:
    """The shortest job first: as in order of arrival for the first request, and then the short prompt overtakes."""
    found = parity(one_by_one, policies=Policies(make_policy("batch", "decode-first", {"order": "sjf"})))
    assert found.step == 4
    assert found.engine is not None
    assert found.engine.tokens == ((1, 30, 0),)
    assert found.simulator is not None
    assert found.simulator.tokens == ((2, 20, 0),)


@dataclass(frozen=True, kw_only=True)
class LastWord:
    """Decides as another policy does, and says so in other words."""

    decides: ClassVar[str] = "batch"
    own: BatchPolicy

    def decide(self, view: BatchView) -> BatchPlan:
        return replace(self.own.decide(view), reason="as you say")


def test_parity_compares_reasons_too(one_by_one: Run) -> None:
    """A policy that comes to the same tokens on other grounds is another policy."""
    assert parity(one_by_one, policies=Policies(LastWord(own=make_policy("batch", "decode-first")))).step == 0


@pytest.fixture(scope="module")
def measured() -> StepTime:
    return engine(timer="cpu").measure_step_time(config())


def test_measured_step_times_are_usable(measured: StepTime) -> None:
    """Every step takes time, and a long prompt takes more of it than a token."""
    token_us, prompt_us = measured.step_us([Chunk(1, 10)], 1), measured.step_us([Chunk(400, 0)], 1)
    assert 0 < token_us < prompt_us


def test_a_policy_that_needs_step_times_gets_this_machines(folder: Path) -> None:
    """Nobody calibrated: the engine measures before it serves, and the manifest keeps what the policy saw."""
    run = engine().replay(_ranked(), config(), Policies(make_policy("batch", "unified-slo")), out=folder / "unmeasured")
    assert run.manifest.step_time_model() is not None
    assert parity(run).is_identical


def test_step_times_are_measured_within_a_short_context(tmp_path: Path) -> None:
    """Neither warming up nor measuring may ask for a position that the model does not have."""
    short = Engine(EngineOptions(model=str(write_tiny_model(tmp_path / "short", max_position_embeddings=64))))
    where = config(max_model_len=64)
    workload = Workload(requests=(request(0, prompt=30, output=4),))
    run = short.replay(workload, where, Policies(make_policy("batch", "unified-slo")), out=tmp_path / "run")
    obey_the_laws(run.workload, where, run.records, vocab_size=VOCAB_SIZE)


def test_a_context_beyond_the_models_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """The refusal names both lengths, whether or not step times are wanted."""
    for policy in ("fcfs", "unified-slo"):
        with pytest.raises(ConfigError, match=r"max_model_len is 8192.* accepts 512"):
            engine().replay(
                crowd(), config(max_model_len=8192), Policies(make_policy("batch", policy)), out=tmp_path / "run"
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["off", *AHEAD])
def test_every_step_says_what_it_was_for_host_and_device(mode: str, folder: Path) -> None:
    """In turns, host and device together make a step; side by side, a step is no shorter than the device's part."""
    where = config(max_seqs_per_batch=3, async_scheduling=mode)
    run = engine(timer="cpu").replay(
        crowd(), where, Policies(make_policy("batch", "fcfs")), out=folder / f"work-{mode}"
    )
    for step in run.records.steps:
        assert step.host_us is not None
        assert step.device_us is not None
        assert 0 < step.device_us <= step.step_us
        if mode == "off" and step.gap_us is not None:
            assert step.host_us <= step.gap_us <= step.step_us - step.device_us


def test_calibrating_tells_the_host_from_the_device(folder: Path) -> None:
    """What a calibration says of a whole step is what the steps took: the two parts are both there, and once."""
    run = engine(timer="cpu").replay(crowd(30), config(), Policies(make_policy("batch", "fcfs")), out=folder / "apart")
    learnt = calibrate([run])
    assert learnt.host.us(1) > 0
    whole = [s for s in run.records.steps if s.gap_us is not None]
    cost = fitted_machine(learnt).cost_of(config())
    predicted = sum(cost.step(batch_of(s.chunks, s.num_logits)).us for s in samples(whole))
    assert predicted == pytest.approx(sum(s.step_us for s in whole), rel=0.25)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    """A trace with another model's tokens."""
    other = Request(
        id=request(0).id, arrival_us=0, prompt=replace(request(0, prompt=2).prompt, token_ids=(5, 256)), output_tokens=1
    )
    with pytest.raises(ConfigError, match="request 0: token id 256; the vocabulary accepts 0 to 255"):
        engine().serve(Workload(requests=(other,)), config(), Policies(make_policy("batch", "fcfs")), Records())


def test_a_request_that_can_never_run_is_rejected_and_the_others_served(tmp_path: Path) -> None:
    """A server answers one client so; a trace to be replayed is refused, before its run folder is made."""
    large = request(4, prompt=900, output=4)
    workload = Workload(requests=(*crowd(4).requests, large), seed=3)
    records = served(workload, config(), make_policy("batch", "fcfs"))
    assert [str(r.finish_reason) for r in records.requests] == ["length"] * 4 + ["rejected"]
    with pytest.raises(RequestTooLargeError, match="request 4: 900 prompt and 4 output tokens"):
        engine().replay(workload, config(), Policies(make_policy("batch", "fcfs")), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "missing"),
    [
        ("draft_model", r"there is no draft model: give one with --draft-model, or EngineOptions\(draft_model=\.+\)"),
        ("mtp", "model .* has no prediction module"),
    ],
)
def test_drafts_that_nothing_here_can_make_are_refused(method: str, missing: str, tmp_path: Path) -> None:
    """Before step times are measured, with what is missing and what would be accepted."""
    policies = Policies(make_policy("batch", "unified-slo"), draft=Fixed(method=method))
    message = f"draft policy fixed: method is '{method}', and {missing}; accepted here: ngram, suffix"
    with pytest.raises(ConfigError, match=message):
        engine().replay(crowd(), config(), policies, out=tmp_path / "run")


@pytest.mark.parametrize("draft", ["acceptance-driven", "adaptive-pruning"])
def test_parity_chooses_among_the_methods_that_the_engine_had(draft: str, tmp_path: Path) -> None:
    """Of "auto" the simulator must not try what could not be asked for here: a draft model, a prediction module."""
    chosen = Policies(make_policy("batch", "decode-first"), draft=make_policy("draft", draft))
    run = engine().replay(crowd(output=60), config(), chosen, out=tmp_path / "run", step_time=STEP_TIME)
    assert run.manifest.drafts == {"methods": ["ngram", "suffix"], "model": None}
    assert {m for s in run.records.steps for m in s.draft_methods} == {"ngram", "suffix"}
    found = parity(run)
    assert found.is_identical, f"step {found.step}: engine {found.engine}, simulator {found.simulator}"
