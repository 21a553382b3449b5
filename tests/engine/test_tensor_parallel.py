"""Two processes that share a model serve as one does, token for token; and one that is lost ends the run, in one line.

The processes are real, on this machine's loopback, and talk through gloo. What a part computes is `test_sharding.py`'s.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings

from tests.engine.test_engine_serving import SCENES, STEP_TIME, Scene, config, crowd, engine, outputs
from tests.engine.test_sharding import assert_same, divided, logits, runner
from tests.laws import obey_the_laws
from tests.tiny_loop import INSTANCE, said, window
from tests.tiny_models import KV_BYTES_PER_TOKEN, VOCAB_SIZE, tiny_model
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.launcher import Launcher
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.rank_place import place_in_environment
from xllm_lab.engine.ranks import join
from xllm_lab.errors import ConfigError, RankError
from xllm_lab.formats import own
from xllm_lab.instance_config import ASYNC_SCHEDULING
from xllm_lab.metrics import summarize
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapePlan, ShapesPolicy, ShapeView, eagerly
from xllm_lab.policies.shapes.eager import Eager
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.records import Records
from xllm_lab.runs import read_run
from xllm_lab.sim.calibrate import calibrate
from xllm_lab.sim.parity import parity
from xllm_lab.step import Step

POLICY = make_policy("batch", "decode-first")


def options(**changes: object) -> EngineOptions:
    two = EngineOptions(model=str(tiny_model()), device="cpu", dtype="float32", tensor_parallel=2, rank_timeout_s=60)
    return replace(two, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def two() -> Iterator[Engine]:
    """Serves most tests; a process has one engine of several ranks at a time, so others come before or after."""
    with Engine(options()) as opened:
        yield opened


def served(host: Engine, scene: Scene, shapes: ShapesPolicy) -> Records:
    records, workload = Records(), scene.workload()
    host.serve(workload, scene.where, Policies(POLICY, shapes=shapes), records, step_time=STEP_TIME)
    obey_the_laws(workload, scene.where, records.sort(), vocab_size=VOCAB_SIZE)
    assert scene.shows(records)
    return records


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def as_torchrun(rank: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def test_two_processes_compute_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of any shape that two ranks can share, through gloo."""
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.gloo_rank"], env={**os.environ, **as_torchrun(1, port)}
    )
    for name, value in as_torchrun(0, port).items():
        monkeypatch.setenv(name, value)
    place = place_in_environment()
    assert place is not None
    ranks = join(place, timeout_s=60)
    ranks.connect("gloo")

    @settings(max_examples=25)
    @given(divided().filter(lambda case: case[1] == 2))
    def compute(case: tuple[ModelConfig, int]) -> None:
        shape = case[0]
        ranks.tell({"config": asdict(shape)})
        assert_same(logits(runner(shape, ranks.group), shape.vocab_size), logits(runner(shape), shape.vocab_size))

    try:
        compute()
    finally:
        ranks.abandon()
    assert child.wait(60) == 0


def _everything(records: Records) -> bool:
    summary = summarize(records)
    return summary.prefix_hit_frac > 0 and summary.num_preemptions > 0 and SCENES["small steps"].shows(records)


# Prefix hits, chunked prompts and preemptions in one run; and sampled tokens that end texts.
CROWDED = Scene(lambda: crowd(output=30), config(block_size=4, num_kv_blocks=24, max_tokens_per_batch=12), _everything)


@pytest.mark.parametrize("shapes", [Eager(), VllmBuckets()], ids=["eager", "graphs"])
@pytest.mark.parametrize("mode", ASYNC_SCHEDULING)
@pytest.mark.parametrize("scene", [CROWDED, SCENES["ends of text"]], ids=["crowded", "ends of text"])
def test_two_ranks_draw_the_tokens_of_one(two: Engine, scene: Scene, mode: str, shapes: ShapesPolicy) -> None:
    """Planned in turns or ahead of tokens that only rank 0 has seen, step by step or in graphs."""
    scene = replace(scene, where=replace(scene.where, async_scheduling=mode))
    assert outputs(served(two, scene, shapes)) == outputs(served(engine(), scene, Eager()))


@pytest.mark.parametrize("name", ["impatient clients", "a closed loop, planned ahead", "idle gaps, planned ahead"])
def test_two_ranks_obey_the_laws_when_times_decide(two: Engine, name: str) -> None:
    """Where what is served depends on how long it takes, no run is another's equal."""
    served(two, SCENES[name], Eager())


def test_a_run_says_that_it_was_divided(two: Engine, tmp_path: Path) -> None:
    """In its manifest; what a token takes of KV is each rank's own. It is no run of the undivided model."""
    where = config()
    step_time = two.measure_step_time(where)
    run = two.replay(crowd(), where, Policies(POLICY, shapes=VllmBuckets()), out=tmp_path / "two", step_time=step_time)
    model = read_run(run.path).manifest.model
    assert model["tensor_parallel"] == 2
    assert model["kv_bytes_per_token"] == KV_BYTES_PER_TOKEN // 2
    assert model["ops"]["all_reduce"]["by"] == "gloo"
    alone = engine().replay(crowd(), where, Policies(POLICY), out=tmp_path / "one", step_time=step_time)
    assert alone.manifest.model["tensor_parallel"] == 1
    with pytest.raises(ConfigError, match="model differs"):
        calibrate([run, alone])
    assert outputs(run.records) == outputs(alone.records)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unheard:
    """A policy that this process alone has."""

    decides: ClassVar[str] = "shapes"

    def decide(self, view: ShapeView) -> ShapePlan:
        return eagerly("nobody asked")


def test_what_another_rank_cannot_do_is_told(two: Engine) -> None:
    """It ends for a reason of its own, which the run ends with; the last test that `two` serves."""
    with pytest.raises(RankError, match="rank 1 of 2: unknown shapes policy 'unheard'"):
        two.serve(crowd(), config(), Policies(POLICY, shapes=Unheard()), Records())
    with pytest.raises(RankError, match="accepted: a new engine"):
        two.serve(crowd(), config(), Policies(POLICY), Records())


@pytest.mark.parametrize(
    ("how", "mode", "message"),
    [
        (signal.SIGKILL, "off", "rank 1 ended with signal SIGKILL"),
        (signal.SIGKILL, "on", "rank 1 ended with signal SIGKILL"),
        (signal.SIGSTOP, "on", "a rank of 2 did not answer within 4 s"),
    ],
)
def test_a_lost_rank_ends_the_run_in_one_line(
    how: signal.Signals, mode: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or stopped, while a step waits for it; nothing of it is left, nor of the run."""
    lost: list[subprocess.Popen[bytes]] = []
    original = Launcher.launch

    def launch(self: Launcher, step: Step) -> None:
        if step.index == 5:
            ranks = self._lead._ranks
            assert ranks is not None
            lost.extend(started.process for started in ranks._started)
            os.kill(lost[0].pid, how)
        original(self, step)

    monkeypatch.setattr(Launcher, "launch", launch)
    own.write(window(0, gap_us=0), tmp_path / "trace.jsonl")
    knobs = [word for knob in (*INSTANCE, f"async_scheduling={mode}") for word in ("--set", knob)]
    timeout_s = 4 if how is signal.SIGSTOP else 60
    two_ranks = ("--model", tiny_model(), "--device", "cpu", "--tensor-parallel", "2", "--rank-timeout-s", timeout_s)
    found = said("replay", tmp_path / "trace.jsonl", *knobs, *two_ranks, "--out", tmp_path / "run", "--quiet")
    assert (found.status, found.out, found.err) == (2, "", f"xllm-lab: {message}\n")
    assert [process.returncode for process in lost] == [-signal.SIGKILL]
    assert [p.name for p in tmp_path.iterdir()] == ["trace.jsonl"]


RANK_0 = """
import sys
from xllm_lab.engine.engine import Engine, EngineOptions
engine = Engine(EngineOptions(model=sys.argv[1], device="cpu", tensor_parallel=2))
print(*engine.ranks.process_ids, flush=True)
sys.stdin.read()
"""


def test_nothing_outlives_rank_0() -> None:
    """Whatever kills it, the ranks that it started end."""
    with subprocess.Popen(
        [sys.executable, "-c", RANK_0, str(tiny_model())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as rank_0:
        assert rank_0.stdout is not None
        other = os.pidfd_open(int(rank_0.stdout.readline()))
        rank_0.kill()
        ended = select.poll()
        ended.register(other, select.POLLIN)
        assert ended.poll(60_000), "rank 1 lives on"
        os.close(other)


def test_ranks_that_torchrun_started_serve_as_one(tmp_path: Path) -> None:
    """Each is the same command with other variables; rank 0 alone writes and prints."""
    workload, port = window(0, gap_us=0), free_port()
    own.write(workload, tmp_path / "trace.jsonl")
    knobs = [word for knob in INSTANCE for word in ("--set", knob)]
    words = ["--model", str(tiny_model()), "--device", "cpu", "--tensor-parallel", "2", "--rank-timeout-s", "60"]
    command = [sys.executable, "-m", "xllm_lab", "replay", str(tmp_path / "trace.jsonl"), *knobs, *words, "--json"]
    processes = [
        subprocess.Popen(
            [*command, "--quiet", "--out", str(tmp_path / "run")],
            env={**os.environ, **as_torchrun(rank, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    (out, err), nothing = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], err
    assert out
    assert nothing == ("", "")
    run = read_run(tmp_path / "run")
    records = Records()
    engine().serve(workload, run.manifest.instance_config(), run.manifest.instance_policies(), records)
    assert outputs(run.records) == outputs(records)
    assert parity(run).is_identical


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel is 0, at least 1 is accepted"),
        ({"tensor_parallel": 3}, "tensor_parallel is 3; a divisor of the 4 attention heads of .* is accepted"),
        ({"timer": "cpu"}, "timer 'cpu' with tensor_parallel 2 leaves out the others; accepted: timer 'wall'"),
        ({"rank_timeout_s": 0.0}, "rank_timeout_s is 0.0, more than 0 is accepted"),
    ],
)
def test_impossible_options_are_refused_before_anything_starts(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(options(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": ""}, "RANK is set, MASTER_PORT not; accepted: all of torchrun's variables, or none"),
        ({"LOCAL_RANK": "first"}, "invalid literal .*'first'; accepted: whole numbers"),
        ({"RANK": "2"}, "RANK is 2, from 0 to below WORLD_SIZE 2 is accepted"),
        ({"WORLD_SIZE": "4"}, "tensor_parallel is 2, WORLD_SIZE is 4; accepted: the same"),
    ],
)
def test_variables_that_do_not_go_together_are_refused(
    changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**as_torchrun(0, 1), **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Engine(options())


DRAFTED = Scene(lambda: crowd(output=30), config(block_size=4, num_kv_blocks=60), lambda r: _kept(r) > 0)


def _kept(records: Records) -> int:
    return sum(sum(r.num_accepted) for r in records.requests)


def test_two_ranks_keep_the_drafts_that_one_would() -> None:
    """Rank 0 drafts, by lookup and by a model that it has whole; tokens are those of one rank that does not speculate.

    The draft model is the served one: float32 sums in another order do not move an argmax here.
    """
    expected = outputs(served(engine(), replace(DRAFTED, shows=lambda _: True), Eager()))
    with Engine(options(draft_model=str(tiny_model()))) as two_ranks:
        for method, captures, mode in product(("ngram", "draft_model"), (False, True), ASYNC_SCHEDULING):
            where = replace(DRAFTED.where, async_scheduling=mode)
            shapes: ShapesPolicy = VllmBuckets() if captures else Eager()
            policies, records = Policies(POLICY, shapes=shapes, draft=Fixed(method=method)), Records()
            two_ranks.serve(DRAFTED.workload(), where, policies, records)
            obey_the_laws(DRAFTED.workload(), where, records.sort(), vocab_size=VOCAB_SIZE)
            assert outputs(records) == expected, (method, shapes, mode)
            assert _kept(records) > 0, (method, shapes, mode)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--draft", "fixed", "--set", "method=draft_model", "--draft-model", "layers:0"),
            "draft_model is 'layers:0', and each of 2 ranks has a part of the layers; accepted: tensor_parallel 1, "
            "or a draft model of its own",
        ),
        (
            ("--draft", "fixed", "--set", "method=mtp"),
            "draft policy fixed: method is 'mtp', and a prediction module drafts on one rank, so with tensor_parallel "
            "1; accepted here: ngram, suffix",
        ),
    ],
)
def test_drafts_that_a_divided_model_cannot_make_are_refused_in_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    own.write(window(0, gap_us=0), tmp_path / "trace.jsonl")
    knobs = [word for knob in INSTANCE for word in ("--set", knob)]
    two_ranks = ("--model", tiny_model(), "--device", "cpu", "--tensor-parallel", "2", "--rank-timeout-s", 60)
    found = said("replay", tmp_path / "trace.jsonl", *knobs, *two_ranks, *words, "--out", tmp_path / "run", "--quiet")
    assert (found.status, found.out, found.err) == (2, "", f"xllm-lab: {message}\n")
    assert not (tmp_path / "run").exists()
