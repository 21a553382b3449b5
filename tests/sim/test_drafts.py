"""Speculation in simulated time, from the policy to what a calibration learns of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.laws import obey_the_laws
from tests.report_inputs import as_engine
from tests.small_runs import STEP_TIME, instance_config, request
from tests.tiny_loop import Said, said
from tests.tuning.searches import CALIBRATION, default
from xllm_lab.candidate import Candidate
from xllm_lab.draft_time import Drafted, DraftLoad, DraftTime, Weights, draft_loads, fit_draft_time
from xllm_lab.errors import ConfigError
from xllm_lab.formats import own
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.draft import DraftPlan, DraftView, Room, drafting_key
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.runs import Manifest, Run, describe, read_run
from xllm_lab.sim.calibrate import calibrate, read_calibration, write_calibration
from xllm_lab.sim.machine import Machine, fitted_machine, with_acceptance
from xllm_lab.sim.parity import parity
from xllm_lab.sim.simulator import run_simulation, simulate
from xllm_lab.step_samples import samples
from xllm_lab.tuning.objective import worth
from xllm_lab.workload import ClosedLoop, Workload

CONFIG = instance_config(num_kv_blocks=512, max_seqs_per_batch=8, max_tokens_per_batch=128)
DRAFT_TIME = DraftTime({"ngram": Weights(call_us=3000.0, request_us=500.0, token_us=100.0)})


def work(num: int = 24, *, output: int = 60, clients: int = 6) -> Workload:
    requests = tuple(replace(request(k, prompt=5 + 7 * k % 40, output=output), kind="ab"[k % 2]) for k in range(num))
    return Workload(requests=requests, closed_loop=ClosedLoop(num_clients=clients))


def policies(depth: int, method: str = "ngram") -> Policies:
    return Policies(DecodeFirst(), draft=Fixed(method=method, num_speculative_tokens=depth))


def machine(fracs: tuple[float, ...] = (0.7, 0.4)) -> Machine:
    return with_acceptance(replace(fitted_machine(CALIBRATION), draft_time=DRAFT_TIME), fracs)


def records(priced: Machine, depth: int, config: InstanceConfig = CONFIG, method: str = "ngram") -> Records:
    timing = priced.predicts(config)
    decide = policies(depth, method)
    return run_simulation(work(), config, decide, timing, vocab_size=1000, step_time=STEP_TIME, draft_time=DRAFT_TIME)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("frac", [0.0, 0.6, 1.0])
def test_a_fixed_depth_yields_its_acceptance_length(depth: int, frac: float) -> None:
    """(1 - a^(k+1)) / (1 - a) tokens a verification, where no output ends before its drafts do; and all laws hold."""
    found = records(machine((frac,)), depth)
    obey_the_laws(work(), CONFIG, found)
    drafts = [
        1 + kept for s in found.steps for asked, kept in zip(s.num_asked, s.num_accepted, strict=True) if asked == depth
    ]
    series = depth + 1 if frac == 1 else (1 - frac ** (depth + 1)) / (1 - frac)
    error = statistics.stdev(drafts) / len(drafts) ** 0.5
    assert statistics.mean(drafts) == pytest.approx(series, abs=4 * error + 1e-9)


@pytest.mark.parametrize("mode", ["on", "length_aware"])
def test_steps_with_drafts_wait_for_their_host(mode: str) -> None:
    """No host plans them ahead, so what it does cannot be hidden behind the step before."""
    slow = replace(machine(), host=replace(CALIBRATION.host, step_us=1500.0))
    ahead = replace(CONFIG, async_scheduling=mode)
    step = next(s for s in records(slow, 2, ahead).steps if s.draft_ids)
    device_us = CALIBRATION.step_time.step_us(next(iter(samples([step]))).chunks, step.num_logits)
    drafting_us = DRAFT_TIME.us("ngram", len(step.draft_ids), max(step.num_asked))
    assert step.draft_us == round(drafting_us)
    assert step.step_us == pytest.approx(device_us + 1500.0 + drafting_us, abs=1)


def test_the_time_of_drafting_comes_back() -> None:
    """From steps of one method, and of several at once."""
    truth = DraftTime({**DRAFT_TIME.weights, "mtp": Weights(call_us=200.0, depth_us=70.0)})
    steps = [
        draft_loads([("ngram", d)] * n + [("mtp", e)] * m)
        for n in range(4)
        for m in range(4)
        for d in (1, 4)
        for e in (2, 3)
    ]
    assert steps[-1] == (DraftLoad("mtp", 3, 3), DraftLoad("ngram", 3, 4))
    drafted = [Drafted(loads, sum(truth.us(*load) for load in loads)) for loads in steps if loads]
    found = fit_draft_time(drafted)
    for method, weights in truth.weights.items():
        assert found.weights[method] == pytest.approx(weights, rel=1e-6, abs=1e-6)
    assert fit_draft_time([]) == DraftTime()


@pytest.fixture(scope="module")
def engine_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Of an engine that is the machine above, with drafts and without."""
    folder = tmp_path_factory.mktemp("engine")
    made = []
    for depth in (0, 2):
        chosen = policies(depth) if depth else Policies(DecodeFirst())
        run = simulate(work(60), CONFIG, chosen, machine(), out=folder / f"raw-{depth}")
        made.append(as_engine(run, folder / f"engine-{depth}"))
    return made


def test_a_calibration_learns_what_drafts_do(engine_runs: list[Run]) -> None:
    """Acceptance and drafting time are those of the machine, and no step's time has drafting in it."""
    learnt = calibrate(engine_runs)
    assert learnt.acceptance is not None
    process = learnt.acceptance.by_method["ngram"]
    assert process.overall.kept.mean == pytest.approx((0.7, 0.4), abs=0.04)
    assert process.overall.drafted.mean == (1.0, 1.0)
    assert set(process.by_kind) == {"a", "b"}
    for num, depth in ((1, 2), (6, 2)):
        assert learnt.draft_time.us("ngram", num, depth) == pytest.approx(DRAFT_TIME.us("ngram", num, depth), rel=0.02)
    assert learnt.residual.mape_frac < 0.005


def test_runs_without_drafts_teach_nothing_of_them(engine_runs: list[Run]) -> None:
    learnt = calibrate(engine_runs[:1])
    assert learnt.acceptance is None
    assert learnt.draft_time == DraftTime()
    with pytest.raises(ConfigError, match="nothing is known of what becomes of drafts"):
        run_simulation(work(), CONFIG, policies(2), fitted_machine(learnt).predicts(CONFIG), vocab_size=1000)


@pytest.fixture(scope="module")
def calibrated(engine_runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "machine.json"
    write_calibration(calibrate(engine_runs), path)
    return path


def test_a_file_keeps_what_is_known_of_drafts(calibrated: Path, engine_runs: list[Run]) -> None:
    assert read_calibration(calibrated) == calibrate(engine_runs)


def test_a_simulation_repeats_the_engine(calibrated: Path, engine_runs: list[Run], tmp_path: Path) -> None:
    """Other coins, the same machine: time and acceptance agree within what chance leaves."""
    ran = simulate(work(60), CONFIG, policies(2), fitted_machine(read_calibration(calibrated)), out=tmp_path / "run")
    theirs = engine_runs[1].records

    def told(of: Records) -> tuple[float, float]:
        kept = sum(sum(s.num_accepted) for s in of.steps) / sum(sum(s.num_drafted) for s in of.steps)
        return kept, max(r.finish_us or 0 for r in of.requests)

    assert told(ran.records) == pytest.approx(told(theirs), rel=0.05)
    assert ran.manifest.timing["acceptance"] == {"learnt_to_depth": {"ngram": 2}}
    assert ran.manifest.draft_time_model() == read_calibration(calibrated).draft_time


def test_a_search_weighs_drafts(calibrated: Path, tmp_path: Path) -> None:
    """What `tune` asks of a candidate that drafts: it is served, and its steps cost what they cost."""
    own.write(work(8), tmp_path / "trace.jsonl")

    def goodput(candidate: Candidate) -> float:
        report = worth(candidate, [tmp_path / "trace.jsonl"], calibrated)
        assert report["failure"] is None
        return float(report["goodput_per_s"])

    plain = default(num_kv_blocks=256)
    drafting = replace(plain, policies=policies(2))
    assert goodput(drafting) != goodput(plain)


def test_the_command_takes_a_given_acceptance(tmp_path: Path, calibrated: Path) -> None:
    """For whatever method the policy names; it beats what was learnt."""
    own.write(work(4), tmp_path / "trace.jsonl")

    def simulated(given: str) -> Said:
        words = ("--set", "method=suffix", "--acceptance", given, "--out", tmp_path / given)
        return said("simulate", tmp_path / "trace.jsonl", "--calibration", calibrated, "--draft", "fixed", *words)

    for given, kept in (("1", 1.0), ("0,0.5", 0.0)):
        assert simulated(given).status == 0
        steps = read_run(tmp_path / given).records.steps
        assert sum(sum(s.num_accepted) for s in steps) == kept * sum(sum(s.num_drafted) for s in steps)
    assert "'most'; accepted: fractions, as 0.8,0.6" in simulated("most").err
    assert "fractions from 0 to 1 are accepted" in simulated("2").err


@dataclass(frozen=True, slots=True, kw_only=True)
class Thrifty:
    """Drafts three tokens where that is cheap, one where it is not."""

    decides: ClassVar[str] = "draft"
    needs_step_time: ClassVar[bool] = True

    def decide(self, view: DraftView) -> DraftPlan:
        assert view.times is not None
        room, is_cheap = Room(view), view.times.draft_us("ngram", 1, 3) < 1000
        for one in sorted(view.decoding, key=drafting_key):
            room.grant(one, "ngram", 3 if is_cheap else 1)
        return room.plan("thrift")


@pytest.mark.parametrize("call_us", [10.0, 5000.0])
def test_parity_tells_policies_the_drafting_time_that_the_engine_had(call_us: float) -> None:
    """Without it they would part ways."""
    draft_time = DraftTime({"ngram": Weights(call_us=call_us)})
    chosen = Policies(DecodeFirst(), draft=Thrifty())
    timing = machine().predicts(CONFIG)
    told: dict[str, Any] = {"step_time": STEP_TIME, "draft_time": draft_time}
    found = run_simulation(work(), CONFIG, chosen, timing, vocab_size=1000, **told)
    assert {depth for s in found.steps for depth in s.num_asked} == ({1, 2, 3} if call_us < 1000 else {1})
    manifest = Manifest(
        host="engine",
        timing={},
        model={"vocab_size": 1000},
        **describe(CONFIG, chosen, STEP_TIME, work(), draft_time=draft_time),
    )
    run = Run(Path("pretended"), manifest)
    run.workload, run.records = work(), found
    assert parity(run, policies=chosen).is_identical
    untold = Run(Path("pretended"), replace(manifest, draft_time={"ngram": [5010.0 - call_us, 0.0, 0.0, 0.0]}))
    untold.workload, untold.records = work(), found
    assert not parity(untold, policies=chosen).is_identical
