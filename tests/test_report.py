"""The page: well formed, whole, the same every time, and it claims no more than was shown."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report_inputs import CONFIG, HOSTILE, POLICY, as_engine, calibration, read, verification, workload
from tests.small_runs import WildDrafts, instance_config, request, run_audited
from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.metrics import metric_value, summarize
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.of_instance import Policies
from xllm_lab.report import tables, write_report
from xllm_lab.report.series import NUM_CDF_POINTS, NUM_SLICES, Timeline, cumulative, step_tokens
from xllm_lab.runs import Manifest, Run, describe, read_run, write_run
from xllm_lab.sim.compare import METRICS
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.simulator import simulate
from xllm_lab.tuning.objective import worth
from xllm_lab.tuning.search import tune
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import Study, Trial
from xllm_lab.wording import compact, metric_label, metric_text, percent, signed_percent
from xllm_lab.workload import Workload


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Three engine runs that spread a little, and a simulated one that is somewhat slow."""
    tmp = tmp_path_factory.mktemp("runs")
    made = {
        "simulated": simulate(
            workload(), CONFIG, Policies(POLICY), fitted_machine(calibration(1.05)), out=tmp / "simulated"
        )
    }
    for k, factor in enumerate((1.0, 1.04, 0.97)):
        raw = simulate(workload(), CONFIG, Policies(POLICY), fitted_machine(calibration(factor)), out=tmp / f"raw-{k}")
        made[f"engine-{k}"] = as_engine(raw, tmp / f"engine-{k}")
    return made


@pytest.fixture(scope="module")
def engine(runs: dict[str, Run]) -> list[Run]:
    return [runs[f"engine-{k}"] for k in range(3)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Three trials, evaluated as `tune` does it, one of which cannot run."""
    from xllm_lab.formats import own
    from xllm_lab.sim.calibrate import write_calibration

    tmp = tmp_path_factory.mktemp("study")
    own.write(workload(), tmp / "workload-0.jsonl")
    write_calibration(calibration(), tmp / "calibration.json")
    changes: tuple[dict[str, Any], ...] = ({}, {"num_kv_blocks": 64}, {"max_model_len": 16})
    trials = []
    for number, change in enumerate(changes):
        one = Candidate(instance=dataclasses.replace(CONFIG, **change), policies=Policies(POLICY))
        report = worth(one, [tmp / "workload-0.jsonl"], tmp / "calibration.json")
        trials.append(Trial(number=number, candidate=one, report=report))
    spec = {"workloads": ["a-trace.jsonl"], "model": calibration().model}
    return Study(path=tmp, spec=spec, trials=tuple(trials))


@pytest.fixture(scope="module")
def whole(runs: dict[str, Run], engine: list[Run], study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every part."""
    tmp = tmp_path_factory.mktemp("page")
    return write_report(
        tmp / "report.html",
        engine=engine,
        simulated=runs["simulated"],
        calibration=calibration(),
        study=study,
        verification=verification(tmp / "verification", [12.0, 12.5, 11.9, 12.8]),
    )


def test_page_needs_nothing_but_itself(whole: Path) -> None:
    page, text = read(whole), whole.read_text(encoding="utf-8")
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all("://www.w3.org/" in found for found in re.findall(r"\w+://\S+", text))
    assert "@import" not in text
    assert len(text.encode()) < 2_000_000


def test_references_inside_the_page_find_their_target_and_no_other(whole: Path) -> None:
    """Eight drawings share one page, so no id of one may catch a reference of another."""
    page, text = read(whole), whole.read_text(encoding="utf-8")
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)


def test_same_inputs_give_the_same_bytes(runs: dict[str, Run], engine: list[Run], tmp_path: Path) -> None:
    texts = []
    for name in ("one", "other"):
        again = [read_run(run.path) for run in engine]
        gain = verification(tmp_path / name / "verification", [12.0, 12.5, 11.9, 12.8])
        out = tmp_path / name / "page.html"
        write_report(out, engine=again, simulated=read_run(runs["simulated"].path), verification=gain)
        texts.append(out.read_bytes())
    assert texts[0] == texts[1]


def test_first_line_is_the_verified_gain_with_its_interval(whole: Path) -> None:
    assert (
        "Tuned serves 12.3 tok/s within SLO, default 9.85: +25 % (95 % CI +15 % to +35 %, 4 paired" in read(whole).text
    )


@pytest.mark.parametrize(
    ("tuned_per_s", "said"),
    [
        ([9.9, 9.4, 10.4, 9.8], "Nothing better was found, keep the default: tuned serves 9.88 tok/s within SLO"),
        ([7.0, 7.1, 7.2, 6.9], "Nothing better was found, keep the default: tuned serves 7.05 tok/s within SLO"),
    ],
    ids=["no difference", "worse"],
)
def test_nothing_is_called_better_whose_interval_touches_zero(
    tuned_per_s: list[float], said: str, tmp_path: Path
) -> None:
    folder = verification(tmp_path / "verification", tuned_per_s)
    assert said in read(write_report(tmp_path / "page.html", engine=(), verification=folder)).text


def test_verified_default_says_that_nothing_better_was_found(tmp_path: Path) -> None:
    folder = verification(tmp_path / "verification", [9.8, 9.5, 10.2, 9.9], tuned=CONFIG)
    page = read(write_report(tmp_path / "page.html", engine=(), verification=folder))
    assert "Nothing better than the default was found; it serves 9.85 tok/s within SLO." in page.text


def test_only_fields_that_differ_are_marked(whole: Path) -> None:
    marked = re.findall(
        r'<tr class="changed"><th scope="row">(\w+)</th><td>(.*?)</td><td>(.*?)</td>', whole.read_text()
    )
    assert marked == [("num_kv_blocks", "24", "64")]


def test_study_alone_is_not_called_verified(study: Study, tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "page.html", engine=(), study=study))
    assert study.best.number == 1
    assert "The best of 3 simulated trials serves" in page.text
    assert "not yet verified on the engine" in page.text
    assert "1 of 3 could not run" in page.text


def test_every_compared_metric_is_there_with_error_and_spread(whole: Path) -> None:
    rows = re.findall(r'<tr class="(?:within|outside)"><th scope="row">(.*?)</th>', whole.read_text(encoding="utf-8"))
    # But for drafts, which nobody made, this run has no metric that neither host could measure.
    of_drafts = ("acceptance_length", "num_wasted_tokens")
    assert rows == [metric_label(metric) for metric in METRICS if metric not in of_drafts]


def test_drafts_are_told_of_where_there_are_any(tmp_path: Path) -> None:
    """How many tokens a verification brought, and what was computed in vain."""
    work, where, policies = Workload(requests=(request(0, output=30),)), instance_config(), Policies(DecodeFirst())
    records = run_audited(work, where, DecodeFirst(), draft=WildDrafts())
    manifest = Manifest(host="engine", timing={}, model={}, **describe(where, policies, None, work))
    page = tables.measurements([write_run(tmp_path / "run", manifest, work, records)])
    summary = summarize(records)
    for metric in ("acceptance_length", "num_wasted_tokens"):
        value = metric_value(summary, metric)
        assert value
        assert f'<tr><th scope="row">{metric_label(metric)}</th><td>{metric_text(metric, value)}</td>' in page


def test_two_claims_are_kept_apart(whole: Path) -> None:
    text = read(whole).text
    verified, validated = text.index("Verified it does what was written"), text.index("Validated it matches a machine")
    assert "Parity holds" in text[verified:validated]
    assert "off by 7.1 % on average (15 % at P90, −0.4 % in sum)" in text[validated:]
    assert "over 3 runs" in text[validated:]


def test_preemptions_are_marked(engine: list[Run], whole: Path) -> None:
    lost = sum(len(step.preempted) for step in engine[0].records.steps)
    assert lost > 0
    assert f"{lost} preemptions" in read(whole).text


def test_broken_parity_is_said(runs: dict[str, Run], tmp_path: Path) -> None:
    """The records tell of a decision that the policy does not take: the page says where."""
    run = read_run(runs["engine-0"].path)
    run.records.steps[3] = dataclasses.replace(run.records.steps[3], reason="something else")
    broken = write_run(tmp_path / "broken", run.manifest, run.workload, run.records)
    page = read(write_report(tmp_path / "page.html", engine=[broken], simulated=runs["simulated"]))
    assert "Parity is broken" in page.text
    assert "from step 3 of" in page.text


def test_extrapolation_earns_a_warning(runs: dict[str, Run], tmp_path: Path) -> None:
    far = simulate(
        workload(), CONFIG, Policies(POLICY), fitted_machine(calibration(highest=60.0)), out=tmp_path / "far"
    )
    assert far.manifest.timing["extrapolated_frac"] > 0.05
    page = read(write_report(tmp_path / "page.html", engine=[runs["engine-0"]], simulated=far))
    said = percent(far.manifest.timing["extrapolated_frac"])
    assert f"Warning. {said} of the simulated steps lie outside the calibrated range" in page.text


def test_errors_on_the_calibrated_run_are_not_called_held_out(runs: dict[str, Run], tmp_path: Path) -> None:
    seen = as_engine(read_run(runs["engine-0"].path), tmp_path / "day-one")
    page = read(write_report(tmp_path / "page.html", engine=[seen], simulated=runs["simulated"]))
    assert "not held out" in page.text


def test_missing_parts_are_left_out(engine: list[Run], tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "page.html", engine=engine))
    assert "The engine served 72 of 72 requests" in page.text
    text = page.text.replace("orange is simulated", "")
    assert re.findall(r"\b(?:[Ss]imulat\w+|Calibration|[Tt]un(?:ed|ing)|Verified|None|nan)\b", text) == []


def test_simulated_run_alone_is_a_prediction(runs: dict[str, Run], tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "page.html", engine=(), simulated=runs["simulated"]))
    assert "In simulation, the engine would have served 24 of 24 requests" in page.text


def test_run_that_serves_nothing_has_a_page(runs: dict[str, Run], tmp_path: Path) -> None:
    """All clients went away before the first step: no latency, no step, no figure."""
    run = read_run(runs["engine-0"].path)
    gone = tuple(dataclasses.replace(r, arrival_us=0, cancel_us=0) for r in run.workload.requests)
    empty = simulate(
        dataclasses.replace(run.workload, requests=gone),
        CONFIG,
        Policies(POLICY),
        fitted_machine(calibration()),
        out=tmp_path / "e",
    )
    assert not empty.records.steps
    page = read(write_report(tmp_path / "page.html", engine=(), simulated=empty))
    assert "0 of 24 requests" in page.text
    assert "svg" not in page.tags


def test_provenance_names_where_numbers_come_from(runs: dict[str, Run], whole: Path) -> None:
    text, manifest = read(whole).text, runs["engine-0"].manifest
    for fact in (manifest.commit, "c0ffee", "a-trace.jsonl", "prefill-first", "num_kv_blocks 24", "numpy", "a-model"):
        assert fact in text


def test_names_are_text_never_markup(tmp_path: Path) -> None:
    config, odd = CONFIG, dataclasses.replace(calibration(), model={**calibration().model, "name": HOSTILE})
    raw = simulate(workload(6, source=HOSTILE), config, Policies(POLICY), fitted_machine(odd), out=tmp_path / "raw")
    manifest = dataclasses.replace(
        raw.manifest, policies={"batch": {**raw.manifest.policies["batch"], "note": HOSTILE}}, commit=HOSTILE
    )
    run = write_run(tmp_path / HOSTILE.replace("/", ""), manifest, raw.workload, raw.records)
    page = read(write_report(tmp_path / "page.html", engine=(), simulated=run, calibration=odd))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 4


def test_unwritable_page_is_a_run_error(engine: list[Run], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_report(tmp_path / "file" / "page.html", engine=engine)


def test_page_about_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to report on"):
        write_report(tmp_path / "page.html", engine=())


def test_runs_of_different_work_are_not_compared(engine: list[Run], tmp_path: Path) -> None:
    other = simulate(workload(7), CONFIG, Policies(POLICY), fitted_machine(calibration()), out=tmp_path / "other")
    with pytest.raises(ConfigError, match="workload differs"):
        write_report(tmp_path / "page.html", engine=engine, simulated=other)
    assert not (tmp_path / "page.html").exists()


def test_timeline_keeps_the_mean_over_time(engine: list[Run]) -> None:
    """Whatever the slices, value times time is conserved; slices in which nothing ran are not numbers."""
    steps = engine[0].records.steps
    line = Timeline(steps)
    values = [float(sum(s.num_tokens)) for s in steps]
    share = line.mean([1.0] * len(steps))
    assert len(line.middle_s) == NUM_SLICES
    assert np.isnan(share).any(), "the workload pauses for a second"
    assert np.nanmax(np.abs(share - 1)) < 1e-9
    assert min(values) - 1e-9 <= np.nanmin(line.mean(values)) <= np.nanmax(line.mean(values)) <= max(values) + 1e-9


def test_prompts_and_outputs_are_told_apart(tmp_path: Path) -> None:
    """Decoded tokens are all output tokens but each request's first, which its prompt's last chunk draws."""
    roomy = dataclasses.replace(CONFIG, num_kv_blocks=1000)
    records = simulate(workload(), roomy, Policies(POLICY), fitted_machine(calibration()), out=tmp_path / "run").records
    prompts = {int(r.id): r.prompt_tokens for r in records.requests}
    tokens = [step_tokens(s, prompts) for s in records.steps]
    assert sum(t.prompt for t in tokens) == sum(prompts.values())
    assert sum(t.decode for t in tokens) == sum(r.output_tokens - 1 for r in records.requests)


def test_long_distribution_keeps_its_ends() -> None:
    x, y = cumulative([float(v) for v in range(10_000)])
    assert len(x) == NUM_CDF_POINTS
    assert (x[0], y[0], x[-1], y[-1]) == (0.0, 1e-4, 9999.0, 1.0)


def test_numbers_are_worded_with_three_digits_and_a_unit() -> None:
    assert [compact(v) for v in (0, 0.0123, 4.561, 78.94, 1234.5, -5.0)] == [
        "0",
        "0.012",
        "4.56",
        "78.9",
        "1,234",
        "−5.00",
    ]
    assert [percent(f) for f in (0.05, 0.123, 0.0123)] == ["5 %", "12 %", "1.2 %"]
    assert [signed_percent(f) for f in (0.25, -0.04, 0.0)] == ["+25 %", "−4 %", "0 %"]
    assert (metric_label("ttft_us.p50"), metric_text("ttft_us.p50", 45_600)) == ("TTFT P50, ms", "45.6")


@pytest.mark.slow
def test_study_that_tune_wrote_has_a_page(tmp_path: Path) -> None:
    space = Space(Candidate(instance=dataclasses.replace(CONFIG, num_kv_blocks=64), policies=Policies(POLICY)))
    done = tune([workload()], calibration(), space, num_trials=3, seed=1, out=tmp_path / "study", num_workers=1)
    page = read(write_report(tmp_path / "page.html", engine=(), study=done))
    assert "3 simulated trials" in page.text
    assert "What goodput costs" in page.text
