"""Nothing is better until it was measured: in turn, often enough, and with the whole interval above zero."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import request
from tests.tiny_models import MAX_POSITION, tiny_model
from tests.tuning.searches import CALIBRATION, default
from xllm_lab import verbs
from xllm_lab.arrivals import with_arrivals
from xllm_lab.candidate import Candidate
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.metrics import summarize
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.runs import Run, read_run
from xllm_lab.tuning.gain import Gain, paired_gain
from xllm_lab.tuning.intervals import Foresight
from xllm_lab.tuning.study import Study
from xllm_lab.tuning.verify import Calibrated, Verification, read_evidence, read_verification, runs_of, verify
from xllm_lab.workload import Slo, Workload

DEFAULT = default(max_model_len=MAX_POSITION)
TUNED = Candidate(instance=DEFAULT.instance, policies=Policies(make_policy("batch", "fcfs")))
WORKLOAD = Workload(
    requests=tuple(replace(request(i, 500 * i, prompt=12 + i, output=4), slo=Slo(ttft_us=10**9)) for i in range(4))
)


class Watched(Engine):
    """An engine that remembers what it was asked to replay."""

    def __init__(self) -> None:
        super().__init__(EngineOptions(model=str(tiny_model()), device="cpu"))
        self.asked: list[tuple[str, str]] = []

    def replay(self, *args: Any, out: Path, **kwargs: Any) -> Run:
        self.asked.append((out.name, type(args[2].batch).__name__))
        return super().replay(*args, out=out, **kwargs)


@pytest.fixture(scope="module")
def engine() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def verified(engine: Watched, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verification]:
    out = tmp_path_factory.mktemp("verify") / "verified"
    engine.asked.clear()
    return out, verify(
        engine, WORKLOAD, default=DEFAULT, tuned=TUNED, out=out, repeats=3, step_time=CALIBRATION.step_time
    )


def test_default_and_tuned_take_turns(engine: Watched, verified: tuple[Path, Verification]) -> None:
    """Whatever else happens to the machine meanwhile happens to both."""
    turns = [
        (f"{name}-{i}", policy) for i in range(3) for name, policy in (("default", "DecodeFirst"), ("tuned", "Fcfs"))
    ]
    assert engine.asked[:6] == turns


def test_the_default_then_serves_the_first_and_the_last_arrivals_again(
    engine: Watched, verified: tuple[Path, Verification]
) -> None:
    """What it then differs by from itself is noise; nobody who beats it by less has beaten anything."""
    assert engine.asked[6:8] == [("again-0", "DecodeFirst"), ("again-2", "DecodeFirst")]
    assert read_evidence(verified[0]).noise_frac is not None


def test_each_repeat_has_other_arrivals_and_pairs_have_the_same(engine: Watched, tmp_path: Path) -> None:
    """Or a gain at one pattern of arrivals would be measured three times."""
    bursts = with_arrivals(WORKLOAD, (0, 100, 200, 90_000))
    verify(engine, bursts, default=DEFAULT, tuned=TUNED, out=tmp_path / "v", step_time=CALIBRATION.step_time)
    arrivals = {
        name: [tuple(r.arrival_us for r in read_run(path).workload.requests) for path in runs_of(tmp_path / "v", name)]
        for name in ("default", "tuned", "again")
    }
    assert arrivals["default"][0] == (0, 100, 200, 90_000)
    assert len(set(arrivals["default"])) > 1
    assert arrivals["default"] == arrivals["tuned"]
    assert arrivals["again"] == arrivals["default"][::2]


def test_evidence_is_worked_out_from_the_runs(verified: tuple[Path, Verification]) -> None:
    """Of what is written beside them nothing is believed; greedy tokens are the same under both policies."""
    out, done = verified
    found = read_evidence(out)
    assert found.gain == done.gain
    assert found.num_changed_outputs == 0
    written = json.loads((out / "verification.json").read_text(encoding="utf-8"))["evidence"]
    assert written == json.loads(json.dumps(found.as_dict()))


def test_a_prediction_is_of_the_arrivals_that_are_measured(engine: Watched, tmp_path: Path) -> None:
    done = verify(
        *(engine, WORKLOAD),
        default=DEFAULT,
        tuned=TUNED,
        out=tmp_path / "v",
        step_time=CALIBRATION.step_time,
        foresight=Foresight(CALIBRATION),
        alternatives=[DEFAULT],
    )
    assert done.recommendation is not None
    assert done.recommendation.num_workloads == 3
    assert done.recommendation.tuned["goodput_per_s"].parts_frac["seeds"] == 0
    assert {k.knob for k in done.recommendation.knobs} == {"batch"}
    assert done.calibrated == Calibrated.of(CALIBRATION)
    assert read_verification(tmp_path / "v") == done


def test_half_of_the_runs_are_no_evidence(verified: tuple[Path, Verification], tmp_path: Path) -> None:
    shutil.copytree(verified[0], tmp_path / "v")
    shutil.rmtree(tmp_path / "v" / "tuned-1")
    with pytest.raises(RunError, match=r"repeats are .* accepted: the runs of a whole verification"):
        read_evidence(tmp_path / "v")


def test_the_runs_behind_a_gain_are_kept(verified: tuple[Path, Verification]) -> None:
    """Each is a whole run of the workload under its candidate, with the goodput that the gain counts."""
    out, done = verified
    for name, candidate, goodput in (
        ("default", DEFAULT, done.gain.default_per_s),
        ("tuned", TUNED, done.gain.tuned_per_s),
    ):
        runs = [read_run(path) for path in runs_of(out, name)]
        assert [summarize(run.records).goodput_per_s for run in runs] == list(goodput)
        assert all(run.workload.requests == WORKLOAD.requests for run in runs)
        assert all(run.manifest.instance_policies() == candidate.policies for run in runs)


def test_what_is_read_is_what_was_measured(verified: tuple[Path, Verification]) -> None:
    out, done = verified
    assert read_verification(out) == done


def test_a_verdict_written_by_hand_is_not_believed(verified: tuple[Path, Verification], tmp_path: Path) -> None:
    """The interval is worked out from the measurements whenever the file is read."""
    value = json.loads((verified[0] / "verification.json").read_text(encoding="utf-8"))
    value["gain"] |= {
        "default_per_s": [10, 12, 14],
        "tuned_per_s": [9, 12, 13],
        "low_frac": 0.5,
        "gain_frac": 0.6,
        "is_better": True,
    }
    (tmp_path / "verification.json").write_text(json.dumps(value), encoding="utf-8")
    read = read_verification(tmp_path)
    assert not read.gain.is_better
    assert read.winner == DEFAULT


def test_fewer_than_three_repeats_are_refused(engine: Watched, tmp_path: Path) -> None:
    """Two pairs have an interval of no use to anybody; nothing is served for it."""
    engine.asked.clear()
    with pytest.raises(ConfigError, match="repeats is 2, at least 3 are accepted"):
        verify(engine, WORKLOAD, default=DEFAULT, tuned=TUNED, out=tmp_path / "verified", repeats=2)
    assert engine.asked == []
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_verification_leaves_nothing(tmp_path: Path) -> None:
    """Half of the pairs are no verification."""

    class Interrupted(Watched):
        def replay(self, *args: Any, out: Path, **kwargs: Any) -> Run:
            if len(self.asked) == 3:
                raise KeyboardInterrupt
            return super().replay(*args, out=out, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        verify(Interrupted(), WORKLOAD, default=DEFAULT, tuned=TUNED, out=tmp_path / "verified")
    assert list(tmp_path.iterdir()) == []


def test_runs_are_in_the_order_they_were_made(tmp_path: Path) -> None:
    """The eleventh after the tenth, not after the first."""
    for k in (10, 9, 2, 0, 1):
        (tmp_path / f"tuned-{k}").mkdir()
    assert [p.name for p in runs_of(tmp_path, "tuned")] == ["tuned-0", "tuned-1", "tuned-2", "tuned-9", "tuned-10"]


def test_a_gain_has_students_interval() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1; t(0.975, 2) = 4.30265, so 2 +- 4.30265 / sqrt(3), over a mean of 12."""
    gain = paired_gain([10, 12, 14], [11, 14, 17])
    assert gain.gain_frac == pytest.approx(2 / 12)
    assert gain.low_frac == pytest.approx((2 - 2.484138) / 12, abs=1e-6)
    assert gain.high_frac == pytest.approx((2 + 2.484138) / 12, abs=1e-6)
    assert not gain.is_better


def test_pairs_cancel_what_both_suffered() -> None:
    """The machine slowed down by half; each pair says the same, so the gain is certain."""
    gain = paired_gain([100, 75, 50], [102, 77, 52])
    assert gain.low_frac == pytest.approx(2 / 75)
    assert gain.is_better


def test_a_gain_over_nothing_is_no_number() -> None:
    """The default kept no promise at all: better by no fraction, so not shown to be better."""
    gain = paired_gain([0, 0, 0], [5, 6, 7])
    assert (gain.gain_frac, gain.low_frac, gain.high_frac, gain.is_better) == (None, None, None, False)


@pytest.mark.parametrize(("default_per_s", "tuned_per_s"), [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_a_gain_needs_pairs(default_per_s: list[float], tuned_per_s: list[float]) -> None:
    with pytest.raises(ConfigError, match="as many of each, at least 2"):
        paired_gain(default_per_s, tuned_per_s)


@pytest.mark.parametrize(("low_frac", "winner"), [(0.01, TUNED), (0.0, DEFAULT), (-0.2, DEFAULT), (None, DEFAULT)])
def test_the_default_stays_unless_the_whole_interval_is_above_zero(low_frac: float | None, winner: Candidate) -> None:
    gain = Gain(default_per_s=(1, 1), tuned_per_s=(2, 2), gain_frac=1.0, low_frac=low_frac, high_frac=2.0)
    assert Verification(default=DEFAULT, tuned=TUNED, gain=gain, model={}).winner == winner


def test_a_study_cannot_be_exported() -> None:
    """Its best was only simulated; what `export` takes is a verification, or the folder of one."""
    study = Study(path=Path("study"), spec={}, trials=())
    with pytest.raises(TypeError):
        verbs.export(study, to="xllm")  # type: ignore[arg-type]
