"""The command: the whole loop once, results on stdout, everything else on stderr, the same bytes for the same seed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_loop import NUM_TRIALS, SETTINGS, TinyLoop, engine_words, said, tiny_loop
from tests.tiny_models import KV_BYTES_PER_TOKEN, MAX_POSITION
from xllm_lab import progress
from xllm_lab.candidate import candidate
from xllm_lab.cli.commands import COMMANDS
from xllm_lab.metrics import summarize
from xllm_lab.policies.catalog import knobs, policies
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.runs import read_run
from xllm_lab.sim.calibrate import read_calibration
from xllm_lab.tuning.study import read_study
from xllm_lab.tuning.verify import read_verification


@pytest.fixture(scope="module")
def loop() -> TinyLoop:
    return tiny_loop()


def told(loop: TinyLoop, verb: str) -> Any:
    """What a verb printed with `--json`."""
    return json.loads(loop.said[verb].out)


STEPS = (
    *("replay", "replay again", "calibrate", "simulate", "compare", "parity"),
    *("tune", "verify", "export", "policies"),
)


@pytest.mark.parametrize("verb", STEPS)
def test_json_is_all_there_is_on_stdout(verb: str, loop: TinyLoop) -> None:
    """One line that parses."""
    out = loop.said[verb].out
    assert out.count("\n") == 1
    json.loads(out)


@pytest.mark.parametrize("verb", STEPS)
def test_quiet_says_only_what_must_be_known(verb: str, loop: TinyLoop) -> None:
    """No bars; a warning, and what an export leaves out, are no progress."""
    for line in loop.said[verb].err.splitlines():
        assert line.startswith("xllm-lab: ")


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_explains_itself(verb: str) -> None:
    """Asking for help is no error."""
    with pytest.raises(SystemExit) as ended:
        said(verb, "--help")
    assert ended.value.code == 0


def test_a_replay_tells_its_summary(loop: TinyLoop) -> None:
    """The same numbers that a notebook gets from the run's folder."""
    value = told(loop, "replay")
    assert value.pop("run") == str(loop / "full")
    assert value == summarize(read_run(loop / "full").records).as_dict()


def test_a_replay_keeps_its_configuration(loop: TinyLoop) -> None:
    """`--set` reached the instance; what was not set is the default."""
    instance = read_run(loop / "full").manifest.instance_config()
    assert (instance.max_model_len, instance.block_size, instance.num_kv_blocks) == (MAX_POSITION, 16, 40)
    assert instance.max_tokens_per_batch == 10240


def test_a_replay_in_graphs_keeps_their_policy_and_counts(loop: TinyLoop, tmp_path: Path) -> None:
    """A knob of the shapes policy is set like any other; a pool too small and a policy nobody knows are refused."""
    line = ("replay", loop / "learn.jsonl", *SETTINGS, *engine_words(), "--quiet", "--out", tmp_path / "run")
    chosen = (*line, "--set", "acl_graph_decode_batch_size_limit=9", "--shapes")
    refused = said(*chosen, "xllm-buckets", "--graph-pool-mib", "0")
    assert refused.status != 0
    assert "accepted: 0 (graph_pool_bytes)" in refused.err
    refused = said(*line, "--shapes", "round")
    assert "unknown shapes policy 'round'; accepted: eager, powers-of-two, vllm-buckets, xllm-buckets" in refused.err
    assert said(*chosen, "xllm-buckets").status == 0
    manifest = read_run(tmp_path / "run").manifest
    assert manifest.instance_policies().shapes == XllmBuckets(acl_graph_decode_batch_size_limit=9)
    assert manifest.graphs is not None
    assert manifest.graphs["replays"] > 0


def test_graphs_are_calibrated_simulated_and_tuned(loop: TinyLoop, tmp_path: Path) -> None:
    """As the engine ran them; a calibration that never saw one is refused."""
    line = ("replay", loop / "learn.jsonl", *SETTINGS, *engine_words(), "--quiet", "--shapes", "powers-of-two")
    assert said(*line, "--out", tmp_path / "run").status == 0
    blind = said(
        *("simulate", "--like", tmp_path / "run", "--calibration", loop / "calibration.json", "--out", tmp_path / "no")
    )
    assert (blind.status, blind.out) == (2, "")
    assert "no step calibrated on ran in a graph" in blind.err
    both = tmp_path / "both.json"
    assert said("calibrate", loop / "full", tmp_path / "run", "--out", both).status == 0
    told = said("simulate", "--like", tmp_path / "run", "--calibration", both, "--out", tmp_path / "simulated")
    assert told.status == 0
    simulated = read_run(tmp_path / "simulated")
    assert simulated.manifest.policies == read_run(tmp_path / "run").manifest.policies
    assert simulated.manifest.graphs is not None
    assert simulated.manifest.graphs["replays"] == sum(s.graph_tokens is not None for s in simulated.records.steps) > 0
    search = ("tune", loop / "learn.jsonl", *SETTINGS, "--shapes", "powers-of-two", "--trials", 3, "--quiet")
    assert said(*search, "--calibration", both, "--out", tmp_path / "study").status == 0
    assert said(*search, "--calibration", loop / "calibration.json", "--out", tmp_path / "none").status == 2


def test_a_calibration_tells_its_error(loop: TinyLoop) -> None:
    """Of as many steps as the runs had."""
    steps = [len(read_run(loop / name).records.steps) for name in ("full", "paced")]
    assert told(loop, "calibrate")["residual"]["num_steps"] == sum(steps)
    assert read_calibration(loop / "calibration.json").runs == ("full", "paced")


def test_a_simulation_carries_the_calibrations_error(loop: TinyLoop) -> None:
    """And is of the run's own workload and configuration."""
    simulated, paced = read_run(loop / "simulated"), read_run(loop / "paced")
    assert simulated.manifest.timing["residual"] == told(loop, "calibrate")["residual"]
    assert simulated.workload.requests == paced.workload.requests
    assert simulated.manifest.instance == paced.manifest.instance


def test_a_comparison_has_a_row_for_each_metric(loop: TinyLoop) -> None:
    """With its error, and a verdict."""
    rows = {row["metric"]: row for row in told(loop, "compare")}
    assert {"ttft_us.p50", "tpot_us.p90", "output_throughput_per_s", "num_steps"} <= rows.keys()
    row = rows["output_throughput_per_s"]
    assert row["error_frac"] == pytest.approx(row["simulated"] / row["engine"] - 1)


def test_parity_is_identical(loop: TinyLoop) -> None:
    """On every step of the run."""
    value = told(loop, "parity")
    assert value["is_identical"]
    assert value["num_steps"] == len(read_run(loop / "paced").records.steps)


def test_parity_with_another_knob_says_no(loop: TinyLoop) -> None:
    """Exit status 1; the first step that differs and both decisions."""
    got = said("parity", loop / "full", "--set", "max_tokens_per_chunk=32", "--json")
    value = json.loads(got.out)
    assert got.status == (0 if value["is_identical"] else 1)
    got = said("parity", loop / "full", "--policy", "fcfs")
    assert got.status == 1
    first, engine, simulator = got.out.splitlines()
    assert first.startswith("step 0 differs")
    assert "decode first" in engine
    assert "first come, first served" in simulator


def test_parity_with_other_graphs_says_no(loop: TinyLoop) -> None:
    """Any policy of the instance may be another one. The instance may not: it is what times were recorded on."""
    got = said("parity", loop / "full", "--shapes", "powers-of-two")
    assert got.status == 1
    assert "graph_tokens=None" in got.out.splitlines()[1]
    refused = said("parity", loop / "full", "--set", "num_kv_blocks=3")
    assert (refused.status, refused.out) == (2, "")
    assert "was recorded on its own instance; accepted: knobs of policies" in refused.err


def test_a_search_tells_its_default_and_its_best(loop: TinyLoop) -> None:
    """As the study's folder has them."""
    study, value = read_study(loop / "study"), told(loop, "tune")
    assert len(study.trials) == NUM_TRIALS
    assert candidate(value["best"]["candidate"]) == study.best.candidate
    assert value["default"]["goodput_per_s"] == study.default.goodput_per_s


def test_a_verification_tells_its_gain(loop: TinyLoop) -> None:
    """Three pairs, and who won."""
    done, value = read_verification(loop / "verified"), told(loop, "verify")
    assert len(value["gain"]["default_per_s"]) == len(value["gain"]["tuned_per_s"]) == 3
    assert candidate(value["winner"]) == done.winner


def test_an_export_is_the_winners(loop: TinyLoop) -> None:
    """Its KV pool in bytes, among the flags."""
    winner = read_verification(loop / "verified").winner
    value = told(loop, "export")
    assert value["max_cache_size"] == winner.instance.num_kv_tokens * KV_BYTES_PER_TOKEN
    assert value["max_seqs_per_batch"] == winner.instance.max_seqs_per_batch


def test_an_export_goes_to_a_file(loop: TinyLoop, tmp_path: Path) -> None:
    """The same flags; what is printed is where they are."""
    got = said("export", loop / "verified", "--to", "xllm", "--out", tmp_path / "new" / "xllm.json")
    assert (got.status, got.out) == (0, f"{tmp_path / 'new' / 'xllm.json'}\n")
    assert json.loads((tmp_path / "new" / "xllm.json").read_text(encoding="utf-8")) == told(loop, "export")


def test_every_policy_and_knob_is_listed(loop: TinyLoop) -> None:
    """From the classes themselves."""
    value = told(loop, "policies")
    assert set(value) >= {"batch", "failover", "route", "shapes"}
    for decides, entries in value.items():
        listed = {name: set(entry["knobs"]) for name, entry in entries.items()}
        assert listed == {name: set(knobs(cls)) for name, cls in policies(decides).items()}


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_equal_inputs_print_equal_bytes(form: tuple[str, ...], loop: TinyLoop, tmp_path: Path) -> None:
    """Simulated twice into the same place: nothing of the moment is in a result."""
    line = (
        *("simulate", loop / "learn.jsonl", *SETTINGS, "--set", "num_kv_blocks=32", "--policy", "unified-slo"),
        *("--calibration", loop / "calibration.json", "--out", tmp_path / "run", *form),
    )
    first = said(*line)
    shutil.rmtree(tmp_path / "run")
    assert first.status == 0
    assert said(*line).out == first.out


def test_equal_seeds_print_equal_bytes_in_other_processes(loop: TinyLoop, tmp_path: Path) -> None:
    """Hashes differ between processes; records do not."""
    outs, tables = [], []
    for seed in ("1", "2"):
        line = (
            *("simulate", loop / "learn.jsonl", *SETTINGS),
            *("--calibration", loop / "calibration.json", "--out", "run", "--json"),
        )
        folder = tmp_path / seed
        folder.mkdir()
        outs.append(
            subprocess.run(
                [sys.executable, "-m", "xllm_lab", *map(str, line)],
                cwd=folder,
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
                check=True,
                capture_output=True,
            ).stdout
        )
        tables.append([(folder / "run" / name).read_bytes() for name in ("requests.parquet", "steps.parquet")])
    assert outs[0] == outs[1]
    assert tables[0] == tables[1]


def test_a_trace_is_transformed_on_its_way_in(loop: TinyLoop, tmp_path: Path) -> None:
    """The first four requests, cut to ten tokens, at two a second, with promises."""
    got = said(
        *("simulate", loop / "held-out.jsonl", *SETTINGS, "--calibration", loop / "calibration.json"),
        *("--requests", "4", "--max-prompt-tokens", "10", "--max-output-tokens", "3", "--rate-per-s", "2"),
        *("--ttft-slo-ms", "0.5", "--tpot-slo-ms", "7", "--out", tmp_path / "run"),
    )
    assert got.status == 0
    requests = read_run(tmp_path / "run").workload.requests
    assert [r.arrival_us for r in requests] == [0, 500_000, 1_000_000, 1_500_000]
    assert {(r.prompt.num_tokens, r.output_tokens) for r in requests} == {(10, 3)}
    assert {(r.slo.ttft_us, r.slo.tpot_us) for r in requests} == {(500, 7_000)}


def test_a_run_like_another_takes_what_is_not_said(loop: TinyLoop, tmp_path: Path) -> None:
    """Another chunk length, and the rest as it was."""
    got = said(
        *("simulate", "--like", loop / "paced", "--set", "max_tokens_per_chunk=40"),
        *("--calibration", loop / "calibration.json", "--out", tmp_path / "run"),
    )
    assert got.status == 0
    own, was = read_run(tmp_path / "run").manifest, read_run(loop / "paced").manifest
    assert own.instance == was.instance
    assert own.policies == {**was.policies, "batch": {**was.policies["batch"], "max_tokens_per_chunk": 40}}


def test_leaving_the_calibrated_range_is_said(loop: TinyLoop, tmp_path: Path) -> None:
    """Prompts ten times as long as any that was measured: a warning on stderr, the result all the same."""
    got = said(
        *("simulate", loop / "learn.jsonl", *SETTINGS, "--length-scale", "10", "--set", "num_kv_blocks=400"),
        *("--calibration", loop / "calibration.json", "--out", tmp_path / "run", "--json"),
    )
    assert got.status == 0
    assert "outside the calibrated range" in got.err
    assert json.loads(got.out)["num_served"] == 16


def test_an_unfinished_search_is_resumed(loop: TinyLoop, tmp_path: Path) -> None:
    """Asked for one trial more than it has, after its last page was lost."""
    out = shutil.copytree(loop / "study", tmp_path / "study")
    (out / "study.json").unlink()
    got = said(
        *("tune", loop / "learn.jsonl", *SETTINGS, "--calibration", loop / "calibration.json"),
        *("--trials", str(NUM_TRIALS), "--workers", "1", "--out", out, "--quiet", "--json"),
    )
    assert got.status == 0, got.err
    assert read_study(out).trials == read_study(loop / "study").trials


def test_a_report_is_one_page(loop: TinyLoop, tmp_path: Path) -> None:
    """About everything the loop made."""
    got = said(
        *("report", tmp_path / "report.html", "--engine", loop / "paced", "--simulated", loop / "simulated"),
        *("--calibration", loop / "calibration.json", "--study", loop / "study"),
        *("--verification", loop / "verified", "--json"),
    )
    assert got.status == 0, got.err
    assert json.loads(got.out) == {"report": str(tmp_path / "report.html")}
    assert (tmp_path / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def test_progress_is_drawn_on_stderr(loop: TinyLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar over the requests of a long replay, and none with `--quiet`; never on stdout."""
    monkeypatch.setattr(progress, "LOG_S", 0.0)
    line = ("replay", loop / "learn.jsonl", *SETTINGS, *engine_words(), "--json", "--out")
    loud, quiet = said(*line, tmp_path / "loud"), said(*line, tmp_path / "quiet", "--quiet")
    assert "16/16" in loud.err
    assert quiet.err == ""
    json.loads(loud.out)
