"""The gate: what must not pass is refused for the right reason and leaves nothing, and what is better passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import request
from tests.tuning.promotions import CALIBRATED, HOUR_US, NOW_US, SLO, PlantedEngine, bursts, one, sharing, verified
from xllm_lab.arrivals import poisson, with_arrivals
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.records import FinishReason, Records
from xllm_lab.runs import write_json
from xllm_lab.tuning import promote as gate
from xllm_lab.tuning.intervals import Foresight
from xllm_lab.tuning.promote import Reason, Terms, promote, read_promotion, refusals
from xllm_lab.workload import Prompt, Slo, Workload

DEFAULT, TUNED = one(max_seqs_per_batch=1), one()
# A change that nobody notices.
SAME = one(max_seqs_per_batch=1, max_model_len=4096)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight at a time instead of one by one: every other request kept its promise before, now all do."""
    out = tmp_path_factory.mktemp("honest") / "verified"
    verified(out, default=DEFAULT, tuned=TUNED)
    return out


def reasons(path: Path, **known: Any) -> set[Reason]:
    return {r.reason for r in refusals(path, **{"now_us": NOW_US, **known})}


def late(record: Any, us: int) -> None:
    """All its tokens came later."""
    record.token_times_us = type(record.token_times_us)("q", [t + us for t in record.token_times_us])
    record.finish_us += us


def ttft_breaks_in_the_tail(name: str, records: Records) -> None:
    if name == "tuned-1":
        for record in records.requests[30:32]:
            late(record, 500_000)


def e2e_breaks_in_the_tail(name: str, records: Records) -> None:
    for record in records.requests:
        record.e2e_slo_us = 10**9
    if name == "tuned-2":
        records.requests[40].e2e_slo_us = 1


def tokens_change(name: str, records: Records) -> None:
    if name == "tuned-0":
        records.requests[7].output_token_ids[3] += 1


def requests_are_lost(name: str, records: Records) -> None:
    if name == "tuned-0":
        records.requests[9].finish_reason = FinishReason.REJECTED


def no_promise_before(name: str, records: Records) -> None:
    for record in records.requests:
        record.tpot_slo_us, record.ttft_slo_us = None, 1 if name.startswith(("default", "again")) else 10**9


def growing(num: int = 60) -> Workload:
    """Ten sessions whose prompts each begin with all that was said: the hit rate rises to the end."""
    requests = tuple(
        replace(
            request(i, i, prompt=8, output=12),
            prompt=Prompt(num_tokens=40 * (i // 10) + 48, hash_block_tokens=8, block_hashes=_said(i)),
            slo=SLO,
        )
        for i in range(num)
    )
    return with_arrivals(Workload(requests=requests), poisson(num, 60.0, seed=1))


def _said(i: int) -> tuple[int, ...]:
    return tuple(100 * (i % 10) + k for k in range(5 * (i // 10) + 6))


def slower(names: dict[str, float]) -> PlantedEngine:
    """Replays whose names begin so take so many times as long."""
    return PlantedEngine(factor=lambda name: next((f for n, f in names.items() if name.startswith(n)), 1.0))


PLANTED: dict[str, tuple[dict[str, Any], set[Reason]]] = {
    "a gain smaller than equals may differ by": (
        {"default": one(max_seqs_per_batch=7), "tuned": one(), "engine": slower({"tuned": 0.998})},
        {Reason.GAIN_IN_NOISE},
    ),
    "a machine that drifts by more than the gain": (
        {"default": one(max_tokens_per_batch=64), "tuned": one(max_tokens_per_batch=2048)}
        | {"on": bursts(prompt=200), "engine": slower({"again": 1.25})},
        {Reason.GAIN_IN_NOISE},
    ),
    "a gain at one seed only: the default stumbled there": (
        {"default": one(max_seqs_per_batch=8), "tuned": one(max_model_len=4096), "engine": slower({"default-1": 3.0})},
        {Reason.GAIN_IN_NOISE, Reason.GAIN_AT_SOME_ARRIVALS},
    ),
    "a gain at two seeds of three": (
        {"default": DEFAULT, "tuned": TUNED, "engine": slower({"tuned-2": 4.0})},
        {Reason.GAIN_IN_NOISE, Reason.GAIN_AT_SOME_ARRIVALS, Reason.PROMISE_BROKEN, Reason.OUTSIDE_PREDICTION},
    ),
    "a TTFT broken in the tail of one repeat": (
        {"default": DEFAULT, "tuned": TUNED, "engine": PlantedEngine(spoil=ttft_breaks_in_the_tail)},
        {Reason.PROMISE_BROKEN, Reason.OUTSIDE_PREDICTION},
    ),
    "an E2E broken for one request of sixty": (
        {"default": DEFAULT, "tuned": TUNED, "engine": PlantedEngine(spoil=e2e_breaks_in_the_tail)},
        {Reason.PROMISE_BROKEN},
    ),
    "a TPOT broken by the larger batch": (
        {"default": DEFAULT, "tuned": TUNED, "on": bursts(slo=Slo(ttft_us=400_000, tpot_us=4_500))},
        {Reason.PROMISE_BROKEN},
    ),
    "a machine slower than predicted": (
        {"default": DEFAULT, "tuned": TUNED, "engine": slower({"": 1.3}), "on": bursts(rate_per_s=30.0)},
        {Reason.OUTSIDE_PREDICTION},
    ),
    "a machine faster than predicted": (
        {"default": DEFAULT, "tuned": TUNED, "engine": slower({"": 0.7})},
        {Reason.OUTSIDE_PREDICTION},
    ),
    "a candidate slower than predicted, though better": (
        {"default": DEFAULT, "tuned": TUNED, "engine": slower({"tuned": 1.25})},
        {Reason.OUTSIDE_PREDICTION},
    ),
    "a cache that was cold to the end": (
        {"default": one(max_seqs_per_batch=1), "tuned": one(), "on": growing()},
        {Reason.COLD_CACHE},
    ),
    "changed tokens": (
        {"default": DEFAULT, "tuned": TUNED, "engine": PlantedEngine(spoil=tokens_change)},
        {Reason.CHANGED_TOKENS},
    ),
    "requests that it refused": (
        {"default": DEFAULT, "tuned": TUNED, "engine": PlantedEngine(spoil=requests_are_lost)},
        {Reason.LOST_REQUESTS, Reason.PROMISE_BROKEN},
    ),
    "a default that kept no promise": (
        {"default": DEFAULT, "tuned": TUNED, "on": bursts(rate_per_s=500.0, slo=Slo(ttft_us=500_000, tpot_us=30_000))}
        | {"engine": PlantedEngine(spoil=no_promise_before)},
        {Reason.GAIN_IN_NOISE},
    ),
    "the default itself": (
        {"default": TUNED, "tuned": TUNED},
        {Reason.NOTHING_CHANGED, Reason.GAIN_IN_NOISE},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("planted", "expected"), PLANTED.values(), ids=PLANTED)
def test_what_was_planted_is_refused_for_what_it_is(
    planted: dict[str, Any], expected: set[Reason], tmp_path: Path
) -> None:
    verified(tmp_path / "v", **planted)
    done, why = promote(tmp_path / "v", to="xllm", out=tmp_path / "out", now_us=NOW_US)
    assert done is None
    assert {r.reason for r in why} == expected
    assert not (tmp_path / "out").exists()


Edit = Callable[[dict[str, Any]], object]
EDITED: dict[str, tuple[str, Edit, Reason]] = {
    "another model": ("tuned-1/manifest.json", lambda m: m["model"].update(checksum="other"), Reason.STALE_CALIBRATION),
    "another machine": (
        "default-0/manifest.json",
        lambda m: m["hardware"].update(cpu="other"),
        Reason.STALE_CALIBRATION,
    ),
    "another engine version": (
        "again-2/manifest.json",
        lambda m: m["versions"].update(torch="2.11"),
        Reason.STALE_CALIBRATION,
    ),
    "a calibration of last year": (
        "verification.json",
        lambda v: v["calibrated"].update(measured_at_us=NOW_US - 365 * 24 * HOUR_US),
        Reason.STALE_CALIBRATION,
    ),
    "a calibration of nobody knows when": (
        "verification.json",
        lambda v: v["calibrated"].update(measured_at_us=None),
        Reason.STALE_CALIBRATION,
    ),
    "a simulated run among the engine's": (
        "tuned-2/manifest.json",
        lambda m: m.update(host="simulator"),
        Reason.NOT_MEASURED,
    ),
    "runs of another candidate": (
        "verification.json",
        lambda v: v["tuned"]["instance"].update(max_seqs_per_batch=64),
        Reason.NOT_MEASURED,
    ),
    "no prediction": (
        "verification.json",
        lambda v: v.update(recommendation=None, calibrated=None),
        Reason.NOT_PREDICTED,
    ),
    "an interval narrowed by hand": (
        "verification.json",
        lambda v: v["recommendation"]["tuned"]["ttft_us.p99"].update(high=1.0),
        Reason.OUTSIDE_PREDICTION,
    ),
}


@pytest.mark.parametrize(("file", "edit", "expected"), EDITED.values(), ids=EDITED)
def test_evidence_of_something_else_is_refused(
    honest: Path, file: str, edit: Edit, expected: Reason, tmp_path: Path
) -> None:
    """One thing is other than it was in a verification that passes."""
    shutil.copytree(honest, tmp_path / "v")
    value = json.loads((tmp_path / "v" / file).read_text(encoding="utf-8"))
    edit(value)
    write_json(tmp_path / "v" / file, value)
    assert reasons(tmp_path / "v") == {expected}


def test_a_verification_without_noise_is_refused(honest: Path, tmp_path: Path) -> None:
    shutil.copytree(honest, tmp_path / "v", ignore=shutil.ignore_patterns("again-*"))
    assert reasons(tmp_path / "v") == {Reason.NOT_MEASURED}


def test_what_is_written_beside_the_runs_is_not_believed(honest: Path, tmp_path: Path) -> None:
    """A gain, evidence and verdict made up: the gate asks the runs, which say otherwise."""
    verified(tmp_path / "v", default=DEFAULT, tuned=SAME)
    value = json.loads((tmp_path / "v" / "verification.json").read_text(encoding="utf-8"))
    good = json.loads((honest / "verification.json").read_text(encoding="utf-8"))
    value |= {name: good[name] for name in ("gain", "evidence")}
    write_json(tmp_path / "v" / "verification.json", value)
    assert Reason.GAIN_IN_NOISE in reasons(tmp_path / "v")


HONEST: dict[str, dict[str, Any]] = {
    "eight at a time": {"default": DEFAULT, "tuned": TUNED},
    "the prefix cache on, after its warm-up": {
        "default": one(enable_prefix_cache=False),
        "tuned": one(),
        "on": sharing(),
    },
    "prompts in larger chunks": {
        "default": one(max_tokens_per_batch=64),
        "tuned": one(max_tokens_per_batch=2048),
        "on": bursts(prompt=200),
    },
    "decodes before prompts": {
        "default": one("prefill-first"),
        "tuned": one(),
        "on": bursts(rate_per_s=34.0, prompt=200, slo=Slo(ttft_us=1_500_000, tpot_us=25_000)),
    },
    "two changes, on a machine that is 2 % slower and trembles": {
        "default": one(max_seqs_per_batch=1, max_tokens_per_batch=64),
        "tuned": one(max_tokens_per_batch=2048),
        "engine": PlantedEngine(factor=lambda name: 1.02 + 0.004 * (sum(name.encode()) % 5 - 2)),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HONEST.values(), ids=HONEST)
def test_an_honest_gain_is_promoted(case: dict[str, Any], tmp_path: Path) -> None:
    verified(tmp_path / "v", **case)
    done, why = promote(tmp_path / "v", to="xllm", out=tmp_path / "out", now_us=NOW_US)
    assert why == []
    assert done is not None
    assert (done.promoted, done.rollback) == (case["tuned"], case["default"])
    assert done == read_promotion(tmp_path / "out")


def test_a_promotion_has_all_that_going_back_takes(honest: Path, tmp_path: Path) -> None:
    """Evidence, prediction and both configurations, each as the target reads it."""
    done, _ = promote(honest, to="xllm", out=tmp_path / "out", now_us=NOW_US)
    assert done is not None
    names = ("rollback.json", "manifest.json", "calibration.json", "analysis-template.yaml", "promoted.json")
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(names)
    assert json.loads(done.config.read_text())["max_seqs_per_batch"] == 8
    assert json.loads((tmp_path / "out" / "rollback.json").read_text())["max_seqs_per_batch"] == 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["evidence"]["gain"]["low_frac"] > 0.5
    assert manifest["measured_on"]["versions"]["torch"] == "2.10"
    assert manifest["promoted_at_us"] == NOW_US
    assert done.slo == SLO


def test_evidence_and_the_way_back_are_there_before_the_new_configuration(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends a promotion half-way: production reads what it read, and promoting again finishes it."""
    write, written = gate._write, list[str]()

    def failing(path: Path, text: str) -> None:
        if path.name.startswith("promoted"):
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, text)

    monkeypatch.setattr(gate, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        promote(honest, to="xllm", out=tmp_path / "out", now_us=NOW_US)
    assert written == ["rollback.json", "analysis-template.yaml"]
    assert (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "promoted.json").exists()
    with pytest.raises(RunError, match="is not what the manifest tells"):
        read_promotion(tmp_path / "out")
    monkeypatch.undo()
    done, why = promote(honest, to="xllm", out=tmp_path / "out", now_us=NOW_US)
    assert why == []
    assert done is not None


def test_a_candidate_has_to_beat_what_serves(honest: Path, tmp_path: Path) -> None:
    """Not what served once: the second promotion is measured against the first."""
    promote(honest, to="xllm", out=tmp_path / "out", now_us=NOW_US)
    before = (tmp_path / "out" / "promoted.json").read_text()
    done, why = promote(honest, to="xllm", out=tmp_path / "out", now_us=NOW_US)
    assert done is None
    assert {r.reason for r in why} == {Reason.NOT_THE_INCUMBENT}
    assert (tmp_path / "out" / "promoted.json").read_text() == before


def test_a_folder_of_something_else_is_left_alone(honest: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something that is no promotion"):
        promote(honest, to="xllm", out=tmp_path, now_us=NOW_US)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_target_that_cannot_say_it_gets_nothing(honest: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy decode-first has no equivalent in vLLM"):
        promote(honest, to="vllm", out=tmp_path / "out", now_us=NOW_US)
    assert not (tmp_path / "out").exists()


def test_terms_are_the_users(honest: Path, tmp_path: Path) -> None:
    """Stricter than the run, or older than allowed; what is no fraction is refused."""
    assert reasons(honest, terms=Terms(max_calibration_age_s=60)) == {Reason.STALE_CALIBRATION}
    verified(tmp_path / "v", **PLANTED["an E2E broken for one request of sixty"][0])
    assert reasons(tmp_path / "v", terms=Terms(min_kept_frac=0.95)) == set()
    with pytest.raises(ConfigError, match="from 0 to 1 is accepted"):
        Terms(min_kept_frac=1.5)


def test_an_edited_configuration_is_noticed(honest: Path, tmp_path: Path) -> None:
    promote(honest, to="xllm", out=tmp_path / "out", now_us=NOW_US)
    (tmp_path / "out" / "promoted.json").write_text("{}")
    with pytest.raises(RunError, match=r"promoted\.json: is not what the manifest tells"):
        read_promotion(tmp_path / "out")


def test_a_simulator_known_to_be_wrong_promises_less(tmp_path: Path) -> None:
    """The same measurement, 25 % slower than expected, is no surprise to who knows to be wrong by 60 %."""
    planted = PLANTED["a candidate slower than predicted, though better"][0]
    known = dict.fromkeys(
        ("ttft_us.p50", "ttft_us.p90", "ttft_us.p99", "tpot_us.p50", "tpot_us.p90", "tpot_us.p99"), 0.6
    )
    verified(tmp_path / "v", **planted, foresight=Foresight(CALIBRATED, known=known))
    assert reasons(tmp_path / "v") == set()
